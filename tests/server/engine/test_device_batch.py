"""What a GPU step is given: one copy of all numbers, and decodes filled up to the size of a graph."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_adapters import BOTH, write_adapter
from msgspec.structs import replace
from tiny_families import FAMILIES, make_tiny
from tiny_models import make_peft_adapter, make_tiny_llama
from triton_interpreter import needs_interpreter

from loraplex_kernels import dispatch
from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_models.adapters.weights import AdapterWeights, load_adapter_weights
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_server.engine import graphs as graphs_of_decodes
from loraplex_server.engine.device_batch import DeviceBatchBuilder
from loraplex_server.engine.graphs import OFTEN, StepGraphs, TargetSets, graph_sizes, run_again
from loraplex_server.engine.staging import StagedInputs, send_arrays
from loraplex_server.engine.step import FUTURE_TOKEN, ScheduledSequence, StepPlan

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_BLOCKS = 4, 40, 9
SPARE_CELL = NUM_BLOCKS * BLOCK_SIZE


def test_all_arrays_travel_in_one_buffer() -> None:
    arrays = [np.arange(5, dtype=np.int64), np.arange(6, dtype=np.int32).reshape(2, 3)[:, 1:], np.zeros((0,), np.int32)]
    sent = send_arrays(arrays, CPU)
    for array, tensor in zip(arrays, sent, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array.copy()))
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent}) == 1


def test_staged_inputs_stay_in_place_and_change_only_when_sent() -> None:
    inputs = StagedInputs([((3,), np.int64), ((2, 2), np.int32)], CPU)
    first, second = inputs.tensors
    for turn in (1, 2):
        one, two = inputs.write()
        one[:], two[:] = turn, turn + 1
        inputs.send()
        assert inputs.tensors == (first, second)
        assert first.tolist() == [turn] * 3 and second.tolist() == [[turn + 1] * 2] * 2


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 256])
def test_every_batch_fits_a_graph_that_is_not_much_larger(largest: int, parts) -> None:
    model, _ = parts
    sizes = graph_sizes(model, largest, 300)
    decodes = [size.num_decodes for size in sizes if not size.num_tokens]
    assert decodes == sorted(set(decodes)) and decodes[-1] == largest
    for count in range(1, largest + 1):
        size = next(size for size in sizes if size.takes(count, 0, 0))
        assert not size.num_tokens and size.num_decodes - count < max(8, count / 2, 4)
        for num_tokens in (1, 64, 65, 256):
            size = next(size for size in sizes if size.takes(count, 1, num_tokens))
            assert size.num_tokens < max(65, 2 * num_tokens) and size.num_decodes in (min(16, largest), largest)
    assert not any(size.takes(1, 1, 257) or size.takes(1, 9, 9) for size in sizes)
    assert [size.num_tokens for size in graph_sizes(model, 4, 24)[-1:]] == [24]


def with_experts(folder: Path) -> tuple[CausalLM, list[AdapterWeights]]:
    """A model of experts in the forms of a GPU, an adapter on its experts and one on its attention."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about its support of stacked parameters
        reference = make_tiny(FAMILIES["Mixtral"], folder / "model", num_hidden_layers=1)
        paths = [
            write_adapter(folder / "0", reference, target_modules=["q_proj"], target_parameters=BOTH),
            make_peft_adapter(folder / "1", reference, rank=18, target_modules=["v_proj", "o_proj"], seed=2),
        ]
    return loaded(folder, paths)


def loaded(folder: Path, adapters: list[Path]) -> tuple[CausalLM, list[AdapterWeights]]:
    model = load_model(folder / "model", dtype=torch.float32, device=CPU, group=ParallelGroup.single())
    return model, [
        load_adapter_weights(path, check_adapter(path, model.config, max_rank=64), dtype=torch.float32)
        for path in adapters
    ]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("graphs")
    reference = make_tiny_llama(folder / "model")
    adapters = [
        make_peft_adapter(folder / "0", reference, rank=3),
        make_peft_adapter(folder / "1", reference, rank=18, target_modules=["v_proj", "o_proj"], seed=2),
    ]
    return loaded(folder, adapters)


# Of a chunk: its slot, its tokens, how many of them are the base's, and whether it ends its prompt.
Chunk = tuple[int, int, int, bool]


def step(decode_slots: list[int], chunks: list[Chunk], rng: random.Random) -> StepPlan:
    """Sequences in the middle of their blocks: decodes with one new token each, then chunks of prompts."""
    every = [(slot, 1, 0, True) for slot in decode_slots] + chunks
    blocks = rng.sample(range(NUM_BLOCKS), 7 * len(every))
    sequences = []
    for row, (slot, length, num_base_tokens, samples) in enumerate(every):
        start = rng.randrange(6 * BLOCK_SIZE - length)
        mine = blocks[7 * row : 7 * row + (start + length - 1) // BLOCK_SIZE + 1]
        sequences.append(
            ScheduledSequence(
                row=row,
                token_ids=[rng.randrange(500) for _ in range(length)],
                start=start,
                new_block_ids=mine,
                slot=slot,
                samples=samples,
                num_base_tokens=num_base_tokens,
            )
        )
    return StepPlan(step_id=1, sequences=sequences, num_decodes=len(decode_slots))


@needs_interpreter
@pytest.mark.parametrize("has_experts", [False, True])
def test_a_filled_up_batch_gives_the_logits_of_the_batch_alone(
    has_experts: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One graph serves batches of other sizes, other adapters and other ranks, one after the other.

    Every second decode's token is the one that its row chose last. The linears that decodes touch get graphs of their
    own when they come for the second time, and a batch that touches others has the graph for all.
    """
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    monkeypatch.setattr(graphs_of_decodes, "OFTEN", 2)
    model, adapters = with_experts(tmp_path) if has_experts else request.getfixturevalue("parts")
    slots = PagedAdapterSlots(model, 2, 64)
    cache, other = (model.new_kv_cache(NUM_BLOCKS + 1, BLOCK_SIZE) for _ in range(2))
    for layer, same in zip(cache.layers, other.layers, strict=True):
        layer[:SPARE_CELL] = torch.randn(SPARE_CELL, layer.shape[1])
        same.copy_(layer)
    captured = []

    def capture(forward):
        captured.append(forward)
        return run_again(forward)

    graphs = StepGraphs(
        model, cache, slots.captured_pages, sizes=graph_sizes(model, 4, 16), max_blocks=MAX_BLOCKS,
        spare_cell=SPARE_CELL, capture=capture,
    )  # fmt: skip
    rng = random.Random(5)
    second = [-1, -1, 1]
    mixes: list[tuple[list[int], list[Chunk], list[AdapterWeights]]] = [
        ([-1, 0, 1], [], adapters), ([-1, -1, -1], [], adapters), (second, [], adapters), (second, [], adapters),
        (second, [], adapters[::-1]), ([-1, 1], [(1, 5, 0, True), (0, 9, 4, False)], adapters),
        ([], [(0, 7, 0, True)], adapters[::-1]), ([-1], [(-1, 3, 0, False), (-1, 1, 0, True)], adapters),
    ]  # fmt: skip
    with torch.inference_mode():
        for decode_slots, chunks, weights in mixes:
            for slot, one in enumerate(weights):
                slots.set(slot, one)
            plan, builder = step(decode_slots, chunks, rng), DeviceBatchBuilder(5, MAX_BLOCKS, BLOCK_SIZE, slots, CPU)
            whole = builder.build(plan)
            truth = model.forward(whole, other)
            chosen, count = torch.full((5,), 7), len(decode_slots)
            chosen[1:count:2] = whole.token_ids[1:count:2]
            unread = [
                replace(one, token_ids=[FUTURE_TOKEN]) if one.row % 2 and one.row < count else one
                for one in plan.sequences
            ]
            arrays = DeviceBatchBuilder(5, MAX_BLOCKS, BLOCK_SIZE, slots, CPU).arrays(replace(plan, sequences=unread))
            assert torch.equal(builder.batch(plan, arrays, chosen).token_ids, whole.token_ids)
            touched = slots.touched({one.slot for one in plan.sequences if one.slot >= 0})
            ours = graphs.run(plan, arrays, touched=touched, last_token_ids=chosen)
            assert ours is not None and ours.shape == truth.shape and (ours - truth).abs().max() < 1e-4
            for layer, same in zip(cache.layers, other.layers, strict=True):
                assert torch.allclose(layer[:SPARE_CELL], same[:SPARE_CELL], atol=1e-4)
    assert len(captured) == graphs.num_captured == 5


def test_any_step_has_the_smallest_known_set_of_linears_that_holds_its_own() -> None:
    everything, rng = frozenset(range(8)), random.Random(3)
    sets = TargetSets(everything, 2)
    assert sets.choose(frozenset()) == frozenset()
    narrow, wide = frozenset({1, 2}), frozenset({1, 2, 3})
    assert {sets.choose(wide) for _ in range(OFTEN - 1)} == {everything}
    assert sets.choose(wide) == sets.choose(narrow) == wide
    assert {sets.choose(narrow) for _ in range(OFTEN)} == {wide, narrow}
    known = [frozenset(), narrow, wide, everything]
    for _ in range(3000):
        touched = frozenset(rng.sample(range(8), rng.randrange(9)))
        assert sets.choose(touched) == next(one for one in known if one >= touched)


def test_a_step_with_an_adapter_of_routers_has_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    reference = make_tiny(FAMILIES["Mixtral"], tmp_path / "model", num_hidden_layers=1)
    paths = [
        make_peft_adapter(tmp_path / name, reference, target_modules=linears)
        for name, linears in (("attention", ["q_proj"]), ("router", ["q_proj", "gate"]))
    ]
    model, adapters = loaded(tmp_path, paths)
    slots = PagedAdapterSlots(model, 2, 64)
    for slot, weights in enumerate(adapters):
        slots.set(slot, weights)
    assert not slots.need_plain_steps({0}) and slots.need_plain_steps({0, 1})
    assert [pages is None for pages in slots.captured_pages] == [False, False, True, False, False]
    slots.set(1, adapters[0])
    assert not slots.need_plain_steps({0, 1})


def test_a_step_that_fits_no_graph_has_none(parts) -> None:
    model, _ = parts
    slots = PagedAdapterSlots(model, 1, 8)
    graphs = StepGraphs(
        model, model.new_kv_cache(1, BLOCK_SIZE), (), sizes=graph_sizes(model, 3, 8), max_blocks=MAX_BLOCKS,
        spare_cell=0, capture=run_again,
    )  # fmt: skip
    long, all_rows = step([-1], [(-1, 9, 0, True)], random.Random(1)), step([], [(-1, 8, 0, True)], random.Random(1))
    wanted = replace(all_rows, sequences=[replace(one, target_ids=one.token_ids) for one in all_rows.sequences])
    for plan in (long, wanted):
        arrays = DeviceBatchBuilder(4, MAX_BLOCKS, BLOCK_SIZE, slots, CPU).arrays(plan)
        assert graphs.run(plan, arrays, touched=frozenset()) is None


@needs_interpreter
def test_the_widest_batch_takes_the_room_of_adapters_and_computes(parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    model, _ = parts
    slots = PagedAdapterSlots(model, 1, 8)
    builder = DeviceBatchBuilder(1, MAX_BLOCKS, BLOCK_SIZE, slots, CPU)
    batch = builder.widest_batch(MAX_BLOCKS * BLOCK_SIZE)
    assert len(batch.token_ids) == MAX_BLOCKS * BLOCK_SIZE and all(batch.lora.pages)
    with torch.inference_mode():
        assert model.forward(batch, model.new_kv_cache(MAX_BLOCKS, BLOCK_SIZE)).isfinite().all()
