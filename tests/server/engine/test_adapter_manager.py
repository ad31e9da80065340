"""The manager on plain numbers: who is loaded, who is evicted, and what is given back."""

import tracemalloc

import pytest

from loraplex_server.engine.adapters.host_cache import FinishedLoad
from loraplex_server.engine.adapters.manager import MAX_LOADS_IN_FLIGHT, AdapterManager
from loraplex_server.messages import AdapterSpec

SIZE = 100


def spec(digest: str, num_bytes: int = SIZE) -> AdapterSpec:
    return AdapterSpec(adapter_id=f"name-{digest}", digest=digest, path=f"folder/{digest}", rank=8, num_bytes=num_bytes)


def manager(num_slots: int = 2, *, host: int = 1000, device: int = 1000, digests: str = "abc") -> AdapterManager:
    made = AdapterManager(num_slots, host_budget_bytes=host, device_budget_bytes=device)
    for digest in digests:
        made.register(spec(digest))
    return made


def ops(made: AdapterManager) -> list[tuple[str, str, int]]:
    made.check_integrity()
    return [(op.kind, op.digest, op.slot) for op in made.take_ops()]


def load(made: AdapterManager, digest: str, *, presses: bool = False) -> None:
    """Bring an adapter that is waited for onto the device, as far as there is room."""
    for _ in range(2):
        made.want({digest: presses})
        for kind, loaded, _ in ops(made):
            if kind in ("host_load", "device_load"):
                made.finished(FinishedLoad(loaded, "host" if kind == "host_load" else "device", SIZE, None))


def used(made: AdapterManager, digest: str, times: int = 1) -> None:
    """Let some sequences run with an adapter and end."""
    for _ in range(times):
        assert made.expect(digest) is None
        load(made, digest)
        made.acquire(digest)
        made.release(digest)


def test_a_wanted_adapter_is_loaded_once_into_each_tier_and_then_pinned_by_each_sequence():
    made = manager()
    made.expect("a")
    made.expect("a")
    made.want({"a": False})
    made.want({"a": False})
    assert ops(made) == [("host_load", "a", -1)]
    made.finished(FinishedLoad("a", "host", SIZE, None))
    assert not made.is_ready("a")
    made.want({"a": False})
    made.want({"a": False})
    assert ops(made) == [("device_load", "a", -1)]
    made.finished(FinishedLoad("a", "device", SIZE, None))
    assert made.is_ready("a")
    slot = made.acquire("a")
    assert ops(made) == [("slot_load", "a", slot)]
    assert made.acquire("a") == slot
    assert made.num_pins == 2


def test_an_unknown_version_is_refused_with_a_reason():
    assert "not known" in (manager().expect("z") or "")


def test_an_adapter_beyond_a_whole_budget_is_refused_with_the_flag_to_raise():
    made = manager(device=SIZE - 1)
    assert "--adapter-device-memory" in (made.expect("a") or "")
    made = manager(host=2 * SIZE)
    made.expect("a")
    made.want({"a": True})
    made.finished(FinishedLoad("a", "host", 3 * SIZE, None))  # as the header did not say
    ((digest, reason),) = made.take_failed()
    assert digest == "a" and "--adapter-host-memory" in reason
    assert made.host.used_bytes == 0
    assert ops(made)[-1] == ("host_evict", "a", -1)


def test_a_pinned_slot_is_never_given_to_another_adapter_however_much_it_presses():
    made = manager(num_slots=1)
    made.expect("a")
    load(made, "a")
    slot = made.acquire("a")
    made.expect("b")
    load(made, "b", presses=True)
    assert not made.is_ready("b")
    assert made.want({"b": True}) == "b"
    made.release("a")
    made.want({"b": True})
    assert ops(made) == [("slot_clear", "a", slot), ("device_load", "b", -1)]


def test_the_device_takes_as_many_bytes_as_its_budget_says_whatever_the_number_of_slots():
    made = manager(num_slots=8, device=2 * SIZE)
    for digest in "abc":
        made.expect(digest)
        load(made, digest)
        if made.is_ready(digest):
            made.acquire(digest)
    assert [made.is_ready(digest) for digest in "abc"] == [True, True, False]
    assert made.device.used_bytes == 2 * SIZE


def test_of_equals_the_one_used_longest_ago_is_evicted_first():
    made = manager(num_slots=2)
    for digest in "aba":
        used(made, digest)
    used(made, "c")
    assert [made.is_ready(digest) for digest in "abc"] == [True, False, True]


def test_what_was_used_more_often_stays_but_not_for_ever():
    digests = "abcdefghijklmnop"
    made = manager(num_slots=2, host=10_000, digests=digests)
    used(made, "a", 5)
    for digest in "bcd":
        used(made, digest)
    assert made.is_ready("a")
    for digest in digests[4:]:
        used(made, digest)
    assert not made.is_ready("a")


def test_a_small_adapter_is_kept_before_a_large_one_since_its_reload_costs_more_for_its_bytes():
    made = manager(num_slots=9, device=1000, digests="")
    for digest, num_bytes in (("small", 50), ("large", 900), ("next", 100)):
        made.register(spec(digest, num_bytes))
        made.expect(digest)
        for tier in ("host", "device"):
            made.want({digest: False})
            made.finished(FinishedLoad(digest, tier, num_bytes, None))
        made.acquire(digest)
        made.release(digest)
    assert made.is_ready("small") and not made.is_ready("large")


def test_an_idle_adapter_that_is_needed_later_goes_only_when_a_nearer_one_presses():
    made = manager(num_slots=1)
    made.expect("b")
    load(made, "b")
    for digest in "ac":
        made.expect(digest)
        made.want({digest: False})
        made.finished(FinishedLoad(digest, "host", SIZE, None))
    made.want({"a": False, "b": False})
    assert made.is_ready("b")
    made.want({"b": True, "c": True})  # the later one does not get the nearer one's place
    assert made.is_ready("b")
    made.want({"a": True, "b": True})
    assert not made.is_ready("b")


def test_no_more_loads_are_under_way_than_the_threads_can_use_and_the_nearest_go_first():
    made = manager(digests="abcdefgh", host=10_000)
    for digest in "abcdefgh":
        made.expect(digest)
    made.want(dict.fromkeys("hgfedcba", False))
    assert [digest for _, digest, _ in ops(made)] == list("hgfedcba")[:MAX_LOADS_IN_FLIGHT]


def test_a_pressing_adapter_that_finds_no_room_is_not_passed_by_smaller_ones():
    made = manager(num_slots=9, host=250, digests="")
    for digest, num_bytes in (("pinned", SIZE), ("large", 200), ("small", 50)):
        made.register(spec(digest, num_bytes))
        made.expect(digest)
    load(made, "pinned")
    made.acquire("pinned")
    made.take_ops()
    assert made.want({"large": True, "small": True}) == "large"
    assert ops(made) == []
    made.want({"large": False, "small": False})
    assert ops(made) == [("host_load", "small", -1)]


def test_host_memory_beyond_the_budget_is_given_back_from_idle_adapters_only():
    made = manager(num_slots=3, host=2 * SIZE)
    for digest in "ab":
        made.expect(digest)
        load(made, digest)
        made.acquire(digest)
    made.take_ops()
    made.expect("c")
    made.want({"c": True})
    assert ops(made) == []
    made.release("a")
    made.want({"c": True})
    assert [(kind, digest) for kind, digest, _ in ops(made)] == [
        ("slot_clear", "a"),
        ("host_evict", "a"),
        ("host_load", "c"),
    ]
    assert made.host.used_bytes == 2 * SIZE


def test_a_failed_load_is_reported_once_and_tried_again_for_the_next_request():
    made = manager()
    for tier in ("host", "device"):
        made.expect("a")
        if tier == "device":
            made.want({"a": False})
            made.finished(FinishedLoad("a", "host", SIZE, None))
        made.want({"a": False})
        made.finished(FinishedLoad("a", tier, 0, "file gone"))
        assert made.take_failed() == [("a", "file gone")]
        assert made.take_failed() == []
        made.unexpect("a")
        made.take_ops()
        assert made.num_loading == 0
    used(made, "a")


def test_a_forgotten_adapter_serves_its_running_sequence_and_then_goes():
    made = manager()
    made.expect("a")
    load(made, "a")
    slot = made.acquire("a")
    made.take_ops()
    made.forget("a")
    assert ops(made) == []
    made.release("a")
    assert ops(made) == [("slot_clear", "a", slot), ("host_evict", "a", -1)]
    assert made.expect("a") is not None
    assert made.host.used_bytes == made.device.used_bytes == 0


@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize("error", [None, "file gone"])
def test_an_adapter_forgotten_while_it_loads_goes_when_the_load_has_ended(tier: str, error: str | None):
    made = manager()
    made.expect("a")
    made.want({"a": False})
    if tier == "device":
        made.finished(FinishedLoad("a", "host", SIZE, None))
        made.want({"a": False})
    made.unexpect("a")
    made.forget("a")
    assert made.num_registered == 3
    made.finished(FinishedLoad("a", tier, SIZE, error))
    assert made.num_registered == 2 and made.num_loading == 0
    assert made.host.used_bytes == made.device.used_bytes == 0
    made.check_integrity()


def test_an_adapter_made_known_again_while_it_is_forgotten_stays():
    made = manager()
    made.expect("a")
    load(made, "a")
    made.acquire("a")
    made.forget("a")
    made.register(spec("a"))
    made.release("a")
    assert made.is_ready("a")


def test_a_preempted_sequence_waits_again_and_its_slot_may_be_lent():
    made = manager(num_slots=1)
    made.expect("a")
    load(made, "a")
    made.acquire("a")
    made.release("a", will_return=True)
    used(made, "b")
    load(made, "a")
    made.acquire("a")
    assert made.num_pins == 1


def test_ten_thousand_registered_adapters_take_less_than_a_hundred_megabytes():
    tracemalloc.start()
    made = manager(digests="")
    for number in range(10_000):
        made.register(
            AdapterSpec(
                adapter_id=f"an-organisation/a-fine-tune-of-some-model-{number}",
                digest=f"{number:064x}",
                path=f"/var/cache/hub/models--an-organisation--{number}/snapshots/{number:040x}",
                rank=16,
                num_bytes=1,
            )
        )
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 20_000_000


def test_every_change_of_tier_is_told_once_and_the_latest_counts():
    made = manager(host=2 * SIZE, num_slots=1)
    used(made, "a")
    (status,) = made.take_statuses()
    assert (status.digest, status.tier, status.num_bytes, status.device_bytes) == ("a", "device", SIZE, SIZE)
    used(made, "b")
    used(made, "c")
    assert {s.digest: s.tier for s in made.take_statuses()} == {"a": "disk", "b": "host", "c": "device"}
    assert made.take_statuses() == []
    made.forget("c")
    assert [(s.digest, s.tier) for s in made.take_statuses()] == [("c", "gone")]
    made.expect("a")
    made.want({"a": False})
    made.finished(FinishedLoad("a", "host", 0, "file gone"))
    assert made.take_statuses()[-1].error == "file gone"


def test_a_kept_adapter_is_loaded_unasked_and_leaves_only_for_one_that_presses():
    made = manager(num_slots=1)
    made.keep("a", True)
    assert made.is_short_of_kept
    for _ in range(2):
        made.want({})
        for kind, loaded, _ in ops(made):
            if kind.endswith("load") and not kind.startswith("slot"):
                made.finished(FinishedLoad(loaded, "host" if kind == "host_load" else "device", SIZE, None))
    assert made.is_ready("a") and not made.is_short_of_kept
    made.expect("b")
    load(made, "b")
    assert made.is_ready("a")
    load(made, "b", presses=True)
    assert made.is_ready("b") and made.is_short_of_kept


def test_a_kept_adapter_that_cannot_be_loaded_is_not_tried_for_ever():
    made = manager()
    made.keep("a", True)
    made.want({})
    made.finished(FinishedLoad("a", "host", 0, "file gone"))
    assert not made.is_short_of_kept
