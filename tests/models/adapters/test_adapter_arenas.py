"""Adapters go through host and device memory that a late device still reads; every step reads what it was given."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from late_copies import LateCopies
from tiny_models import make_tiny_llama

from loraplex_models.adapters.arena import Arena, Block
from loraplex_models.adapters.packed import map_tensors
from loraplex_models.adapters.paged_slots import AdapterRoom, ArrangedWeights, PagedAdapter, PagedAdapterSlots
from loraplex_models.adapters.slots import AdapterSlots, PreparedAdapter
from loraplex_models.adapters.weights import AdapterWeights, EndParts, ModuleParts
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

NUM_SLOTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("arenas")
    make_tiny_llama(folder)
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())


def random_weights(model: CausalLM, draw: random.Random, number: int) -> AdapterWeights:
    """Any ranks on some linears, biases of some, and sometimes a head of its own, which is longer than a frame."""
    generator = torch.Generator().manual_seed(number)
    sites = draw.sample(model.lora_sites, draw.randint(1, len(model.lora_sites)))
    modules = {}
    for site in sites:
        rank = draw.randint(1, 20)
        a, b = (
            torch.randn(rank, site.in_size, generator=generator),
            torch.randn(rank, site.out_size, generator=generator),
        )
        modules[site.module] = (a, b.t())
    parts = {
        site.module: ModuleParts(b_bias=torch.randn(site.out_size, generator=generator))
        for site in draw.sample(sites, draw.randint(0, len(sites)))
    }
    ends = {}
    if draw.random() < 0.3:
        weight = torch.randn(model.config.vocab_size, model.config.hidden_size, generator=generator)
        ends = {"lm_head": EndParts(None, weight, None, None, None, ModuleParts())}
    return AdapterWeights(str(number), 20, modules, parts, ends)


def tensors_of(adapter: PreparedAdapter) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(adapter, note)
    return found


class Device:
    """Slots over a late device, and what each adapter must be read as."""

    def __init__(self, model: CausalLM, draw: random.Random) -> None:
        self.draw = draw
        self.copies = LateCopies(draw)
        self.truth = AdapterSlots(model, 1)
        probe = PagedAdapterSlots(model, 1, 24)
        self.frame_bytes = probe._frame_bytes
        self.room = AdapterRoom(40 * self.frame_bytes, 60 * self.frame_bytes)
        self.slots = PagedAdapterSlots(model, NUM_SLOTS, 24, self.room, self.copies)
        self.num_read = 0

    def read(self, adapter: PagedAdapter, weights: AdapterWeights) -> None:
        """What a step does: at the time when it runs, find the adapter's numbers through the page table."""
        expected = self.truth.prepare(weights)
        places, views = adapter.places, tensors_of(adapter)
        starts = adapter.rows.starts[0].clone()
        cells, first = self.slots._rank_pages._cells, self.slots._rank_pages._first

        def compare() -> None:
            for index, part, a, b in expected.modules:
                in_size, out_size = a.shape[1], len(b)
                assert places[index, part, 0][0] == len(a)
                for page in range(-(-len(a) // 8)):
                    start = int(starts[first[index] + part, page])
                    ranks = a[8 * page : 8 * page + 8]
                    assert torch.equal(cells[start : start + ranks.numel()].view_as(ranks), ranks), weights.digest
                    start, ranks = start + 8 * in_size, b.t()[8 * page : 8 * page + 8].reshape(-1, out_size)
                    assert torch.equal(cells[start : start + ranks.numel()].view_as(ranks), ranks), weights.digest
            for view, tensor in zip(views, tensors_of(expected), strict=True):
                assert view.stride() == tensor.stride() and torch.equal(view, tensor), weights.digest
            self.num_read += 1

        self.copies.launch(compare)


def churn(model: CausalLM, seed: int, num_turns: int = 600) -> Device:
    """Adapters are read, brought over, run, cleared and dropped in any order, while the device is late."""
    draw = random.Random(seed)
    device = Device(model, draw)
    slots = device.slots
    known = [random_weights(model, draw, seed * 100 + number) for number in range(8)]
    on_host: dict[str, ArrangedWeights] = {}
    in_slots: dict[int, tuple[PagedAdapter, AdapterWeights]] = {}
    for _ in range(num_turns):
        weights = draw.choice(known)
        slot = draw.randrange(NUM_SLOTS)
        match draw.choice([0, 1, 2, 2, 3]):
            case 0 if weights.digest not in on_host:
                on_host[weights.digest] = slots.arrange(weights)
            case 1 if weights.digest in on_host:
                slots.drop(on_host.pop(weights.digest))
            case 2 if weights.digest in on_host:
                slots.clear(slot)
                in_slots.pop(slot, None)
                try:
                    adapter = slots.prepare(on_host[weights.digest])
                except ValueError:
                    continue  # no room, or not in one piece
                if draw.random() < 0.2:
                    slots.drop(adapter)
                else:
                    slots.install(slot, adapter)
                    in_slots[slot] = (adapter, weights)
            case 3 if slot in in_slots:
                slots.clear(slot)
                del in_slots[slot]
        for adapter, running in in_slots.values():
            if draw.random() < 0.5:
                device.read(adapter, running)
        device.copies.run_some(draw.choice([0, 0, 1, 3, 30]))
    for slot in in_slots:
        slots.clear(slot)
    for arranged in on_host.values():
        slots.drop(arranged)
    device.copies.run_all()
    return device


@pytest.mark.parametrize("seed", range(6))
def test_every_step_reads_its_adapter_however_late_the_device_is(model: CausalLM, seed: int) -> None:
    device = churn(model, seed)
    assert device.num_read > 30
    assert device.slots._host_arena.num_free_bytes == device.room.host_bytes
    assert device.slots._device_arena.num_free_bytes == device.room.device_bytes


send = LateCopies.send


def give_at_once(arena: Arena, block: Block, fence: Any = None) -> None:
    with arena._lock:
        arena._free.give(block.frames)


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Arena, "give", give_at_once),
        (LateCopies, "join", lambda copies, fence: None),
        (LateCopies, "send", lambda copies, pairs, after: send(copies, pairs)),
    ],
)
def test_memory_that_is_reused_or_read_too_early_is_noticed(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, fault: Callable[..., None]
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        for seed in range(6):
            churn(model, seed)


def test_neighbouring_frames_travel_in_one_copy(model: CausalLM) -> None:
    sent: list[int] = []

    class Counting(LateCopies):
        def send(self, pairs: Any, after: Any = ()) -> Any:
            sent.append(len(pairs))
            return super().send(pairs, after)

    room = AdapterRoom(2**22, 2**22)
    slots = PagedAdapterSlots(model, 2, 24, room, Counting(random.Random(1)))
    weights = replace(random_weights(model, random.Random(3), 1), ends={})
    adapter = slots.prepare(slots.arrange(weights))
    assert sent == [1] and len(adapter.block.frames) > 1
    assert not adapter.has_arrived()


def test_a_full_host_arena_gives_way_to_ordinary_memory(model: CausalLM) -> None:
    slots = PagedAdapterSlots(model, 1, 24, AdapterRoom(0, 2**22))
    weights = random_weights(model, random.Random(3), 1)
    arranged = slots.arrange(weights)
    adapter = slots.prepare(arranged)
    assert torch.equal(
        adapter.block.at((0, 0), adapter.block.frame_bytes), arranged.block.at((0, 0), adapter.block.frame_bytes)
    )
    slots.drop(arranged)
    assert slots._host_arena.num_free_bytes == 0


def test_an_adapter_that_the_device_has_no_room_for_is_refused_with_the_flag(model: CausalLM) -> None:
    slots = PagedAdapterSlots(model, 1, 24, AdapterRoom(2**22, 0))
    with pytest.raises(ValueError, match="--adapter-device-memory"):
        slots.prepare(random_weights(model, random.Random(3), 1))
    assert slots._host_arena.num_free_bytes > 0
