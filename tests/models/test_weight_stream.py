"""A checkpoint read by threads into few buffers and copied on by a late device: every byte is safetensors' own."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_copies import LateCopies, LateFence
from paged_model import PagedModel
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

from loraplex_models import loader, streamed_tensors
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import read_config
from loraplex_models.cuts import Cut, RankPart
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_models.weight_stream import BUFFERS_A_READER, WeightStream

CPU = torch.device("cpu")
CHUNK = 3000  # bytes: most tensors here take several, and end within one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    make_tiny_llama(made, dtype=torch.bfloat16, shard_bytes=60_000)
    return made


def truth_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateCopies]:
    """A late device, and a window small enough that it is full most of the time."""
    monkeypatch.setattr(streamed_tensors, "AHEAD_BYTES", 30_000)
    copies = LateCopies(random.Random(4))
    yield copies
    copies.run_all()


def take_all(folder: Path, copies: LateCopies, draw: random.Random) -> None:
    """Take all tensors, of each layer in any order, and compare them once the device has come to the end."""
    truth = truth_of(folder)
    names = sorted(truth, key=lambda name: (name.split(".")[2:3], draw.random()))
    stream = WeightStream(CPU, copies, num_readers=3, chunk_bytes=CHUNK)
    with Checkpoint(folder, stream=stream) as checkpoint:
        taken = {name: checkpoint.take(name, tuple(truth[name].shape)) for name in names[:-2]}
        copies.run_all()
        for name, tensor in taken.items():
            assert tensor.dtype == truth[name].dtype and torch.equal(tensor, truth[name]), name
        assert checkpoint.left_over() == sorted(names[-2:])


@pytest.mark.parametrize("seed", range(3))
def test_all_bytes_are_safetensors_own_whatever_order_they_are_asked_for_in(
    folder: Path, late: LateCopies, seed: int
) -> None:
    take_all(folder, late, random.Random(seed))
    assert late.num_sent > 50


def test_a_buffer_that_is_filled_before_it_was_emptied_is_noticed(
    folder: Path, late: LateCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LateFence, "synchronize", lambda fence: None)
    with pytest.raises(AssertionError):
        take_all(folder, late, random.Random(1))


def test_host_memory_is_a_few_buffers_whatever_the_checkpoint_is(folder: Path, late: LateCopies) -> None:
    stream = WeightStream(CPU, late, num_readers=3, chunk_bytes=CHUNK)
    assert len(stream._pinned) == 3 * BUFFERS_A_READER * CHUNK
    stream.close()


@pytest.mark.parametrize("runs", [((0, 7),), ((5, 64),), ((1, 3), (60, 64), (10, 30)), ((0, 0),)])
def test_rows_are_read_by_themselves(folder: Path, late: LateCopies, runs: tuple[tuple[int, int], ...]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    stream = WeightStream(CPU, late, num_readers=2, chunk_bytes=CHUNK)
    part = RankPart(read_config(folder), 0, 2)
    with Checkpoint(folder, part=part, stream=stream) as checkpoint:
        rows = checkpoint.take(name, (64, 64), rows=Cut(64, runs))
        late.run_all()
        assert torch.equal(rows, torch.cat([truth_of(folder)[name][start:stop] for start, stop in runs]))
        assert late.num_sent <= 4, "more was read than these rows"


@pytest.mark.parametrize("rank", range(3))
def test_each_ranks_linears_are_those_of_mapped_files(folder: Path, rank: int) -> None:
    part = RankPart(read_config(folder), rank, 3)
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in truth_of(folder).items() if "proj" in name}
    stream = WeightStream(CPU, num_readers=2, chunk_bytes=CHUNK)
    with Checkpoint(folder, part=part) as mapped, Checkpoint(folder, part=part, stream=stream) as streamed:
        for module, (out_size, in_size) in shapes.items():
            cut = part.linear(module)
            assert cut is not None
            in_part = in_size if cut.inputs is None else cut.inputs.part_size
            out_part = out_size if cut.outputs is None else cut.outputs.part_size
            truth = mapped.linear(module).read(in_part, out_part, has_bias=False).weight
            ours = streamed.linear(module).read(in_part, out_part, has_bias=False).weight
            assert isinstance(truth, torch.Tensor) and isinstance(ours, torch.Tensor)
            assert ours.shape == (out_part, in_part) and torch.equal(ours, truth), module


def logits(model: CausalLM) -> torch.Tensor:
    paged = PagedModel(model)
    paged.add("a", list(range(10, 30)))
    return paged.run_alone("a", 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_streamed_model_is_the_mapped_one_and_says_how_far_it_is(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "device": CPU, "group": ParallelGroup.single()}
    truth = logits(load_model(folder, **settings))
    made: list[WeightStream] = []

    def open_stream(*_: Any) -> WeightStream:
        made.append(WeightStream(CPU, num_readers=3, chunk_bytes=CHUNK))
        return made[-1]

    monkeypatch.setattr(loader, "open_stream", open_stream)
    seen: list[tuple[int, int]] = []
    assert torch.equal(logits(load_model(folder, progress=lambda *step: seen.append(step), **settings)), truth)
    assert made and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(5000)}, tmp_path / "model.safetensors")
    stream = WeightStream(CPU, num_readers=2, chunk_bytes=CHUNK)
    with Checkpoint(tmp_path, stream=stream) as checkpoint:
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-8000])
        with pytest.raises(CheckpointError, match=r"'model\.safetensors': tensor 'b' cannot be read: it ends at byte"):
            checkpoint.take("b", (5000,))
        assert checkpoint.take("a", (3,)).tolist() == [0, 0, 0]


def test_shape_and_type_are_checked_before_anything_is_read(tmp_path: Path, late: LateCopies) -> None:
    save_file({"a": torch.zeros(3), "n": torch.zeros(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    stream = WeightStream(CPU, late, num_readers=1, chunk_bytes=CHUNK)
    with Checkpoint(tmp_path, stream=stream) as checkpoint:
        with pytest.raises(CheckpointError, match=r"has shape \[3\], config\.json asks for \[4\]"):
            checkpoint.take("a", (4,))
        with pytest.raises(CheckpointError, match=r"'n' is of torch\.int64"):
            checkpoint.take("n", (2,))
    assert late.num_sent == 0


def test_what_was_read_ahead_and_not_taken_is_waited_for_before_its_memory_goes(
    tmp_path: Path, late: LateCopies
) -> None:
    names = [f"layers.{number}.weight" for number in range(6)]
    save_file({name: torch.ones(1000) for name in names}, tmp_path / "model.safetensors")
    stream = WeightStream(CPU, late, num_readers=2, chunk_bytes=CHUNK)
    with Checkpoint(tmp_path, stream=stream) as checkpoint:
        checkpoint.take(names[0], (1000,))
    assert not any(late._streams[1])
