"""The scheduler on plain objects: its decisions, and what holds after any run."""

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_bench import SchedulerBench, expected

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.sequence import Sequence, Status


def test_decoding_sequences_come_before_chunks_and_rows_are_ordered_by_slot():
    bench = SchedulerBench(budget=6)
    bench.add([3] * 3, "b")
    bench.add([4] * 3)
    bench.add([5] * 3, "a")
    for _ in range(3):
        bench.step()
    bench.add([6] * 5, "a")
    bench.step()
    plan = bench.plans[-1]
    assert plan.num_decodes == 3
    assert [s.slot for s in plan.sequences[:3]] == sorted(s.slot for s in plan.sequences[:3])
    assert len(plan.sequences[3].token_ids) == 5


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    bench = SchedulerBench(budget=8)
    short = bench.add([3] * 2, max_new_tokens=8)
    bench.step()
    bench.add(list(range(3, 23)))
    for _ in range(3):
        bench.step()
    chunks = [len(s.token_ids) for plan in bench.plans[1:] for s in plan.sequences if len(s.token_ids) > 1]
    assert chunks == [8, 8, 4]
    assert short.num_output_tokens == 4


def test_a_preempted_sequence_gives_back_its_blocks_and_ends_with_the_same_tokens():
    bench = SchedulerBench(num_blocks=6, max_batch_size=4, budget=32)
    prompts = [[7, i, 9, 10, 11, 12] for i in range(3)]
    sequences = [bench.add(prompt, max_new_tokens=14) for prompt in prompts]
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.token_ids == expected(prompt, None, 14)
    assert bench.blocks.num_used == 0


def test_the_oldest_sequence_is_never_preempted():
    bench = SchedulerBench(num_blocks=6, budget=32)
    oldest = bench.add([3] * 6, max_new_tokens=14)
    bench.add([4] * 6, max_new_tokens=14)
    bench.add([5] * 6, max_new_tokens=14)
    while oldest.status is not Status.FINISHED:
        bench.step()
        assert oldest.status is not Status.WAITING


def test_a_sequence_whose_adapter_is_on_its_way_holds_nothing_and_delays_nobody():
    bench = SchedulerBench()
    waiting = bench.add([3] * 4, "a")
    other = bench.add([4] * 4)
    plan = bench.scheduler.schedule()
    assert [s.row for s in plan.sequences] == [other.row]
    assert waiting.status is Status.WAITING and not waiting.block_ids


def test_more_adapters_than_slots_are_served_one_after_the_other():
    bench = SchedulerBench(num_slots=1)
    sequences = [bench.add([3, 4, 5], name) for name in "abcabc"]
    bench.run()
    for sequence in sequences:
        assert sequence.token_ids == expected([3, 4, 5], sequence.request.adapter_digest, 4)


def test_a_sequence_that_waits_for_a_slot_cannot_be_overtaken_for_ever():
    bench = SchedulerBench(num_slots=1, num_blocks=64)
    for _ in range(2):
        bench.add([3, 4], "a", max_new_tokens=3)
    waiting = bench.add([5, 6], "b")
    steps = 0
    while waiting.status is Status.WAITING:
        bench.add([3, 4], "a", max_new_tokens=3)
        bench.step()
        steps += 1
        assert steps < 500


def test_a_shared_head_is_computed_once_per_adapter():
    bench = SchedulerBench(num_blocks=64, budget=64)
    head = list(range(3, 19))
    for adapter in (None, "a", None, "a"):
        sequence = bench.add([*head, 40], adapter)
        bench.run()
        assert sequence.token_ids == expected([*head, 40], adapter, 4)
    assert [s.num_cached_tokens for s in (sequence,)] == [16]
    computed = [len(p.sequences[0].token_ids) for p in bench.plans if p.sequences and p.sequences[0].start in (0, 16)]
    assert computed == [17, 17, 1, 1]


def test_removing_a_sequence_frees_its_blocks_row_and_pin_at_once():
    bench = SchedulerBench()
    running = bench.add([3] * 6, "a")
    for _ in range(3):
        bench.step()
    assert running.status is Status.RUNNING
    waiting = bench.add([3] * 6, "b")
    bench.scheduler.remove(running)
    bench.scheduler.remove(waiting)
    assert bench.blocks.num_used == 0 and bench.adapters.num_pins == 0
    bench.run()


def test_a_failed_adapter_ends_its_waiting_sequences_and_no_other():
    bench = SchedulerBench()
    doomed = bench.add([3] * 4, "a")
    other = bench.add([3] * 4)
    bench.scheduler.schedule()
    bench.adapters.finished(FinishedLoad("a", "host", 0, "file gone"))
    failed = bench.scheduler.take_failed()
    assert [p.sequence for p in failed] == [doomed] and "file gone" in (failed[0].error or "")
    assert other.status is Status.RUNNING


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mix_gives_each_sequence_its_own_answer_and_everything_back(data):
    bench = SchedulerBench(
        num_blocks=data.draw(st.integers(8, 20)),
        max_batch_size=data.draw(st.integers(1, 5)),
        budget=data.draw(st.integers(1, 20)),
        num_slots=data.draw(st.integers(1, 3)),
        num_in_host=data.draw(st.integers(1, 3)),
        starvation_bound_s=data.draw(st.sampled_from([0.0, 2.0, 10.0, 1000.0])),
        ahead=data.draw(st.integers(0, 1)),
    )
    stops = tuple(range(3, data.draw(st.integers(3, 12))))
    live: list[tuple[Sequence, list[int], str | None, int]] = []
    for _ in range(data.draw(st.integers(1, 10))):
        prompt = [3] * data.draw(st.integers(0, 9)) + data.draw(st.lists(st.integers(3, 5), min_size=1, max_size=9))
        adapter = data.draw(st.sampled_from([None, "a", "b", "c"]))
        count = data.draw(st.integers(1, 12))
        live.append((bench.add(prompt, adapter, count, stop_token_ids=stops), prompt, adapter, count))
        for _ in range(data.draw(st.integers(0, 3))):
            bench.step()
        if data.draw(st.integers(0, 4)) == 0:
            victim = live.pop(data.draw(st.integers(0, len(live) - 1)))
            bench.scheduler.remove(victim[0])
    bench.run()
    for sequence, prompt, adapter, count in live:
        assert sequence.status is Status.FINISHED
        assert sequence.token_ids == expected(prompt, adapter, count, stops)
    assert bench.blocks.num_used == 0 and bench.adapters.num_pins == 0
    assert not bench.scheduler.waiting and not bench.scheduler.running
