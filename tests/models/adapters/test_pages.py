"""What adapters take on a device: counted from the header, against what the paged slots allocate."""

import warnings
from pathlib import Path

import pytest
import torch
from adapter_files import SHAPES
from engines import EngineBench, checked_spec
from expert_adapters import BOTH, write_adapter
from tiny_families import FAMILIES, make_tiny
from tiny_models import make_peft_adapter, make_tiny_llama

from loraplex_kernels import dispatch
from loraplex_models.adapters.manifest import check_adapter, module_shapes
from loraplex_models.adapters.paged_slots import PagedAdapterSlots
from loraplex_models.adapters.pages import num_device_bytes, pages_for
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

ADAPTERS = {
    "rank 8": {"rank": 8},
    "rank 64": {"rank": 64},
    "rank 9": {"rank": 9},
    "q and v": {"rank": 16, "target_modules": ["q_proj", "v_proj"]},
    "one layer": {"rank": 4, "layers_to_transform": [1]},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 20, "layers.1.mlp.gate_proj": 33}},
}


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (64, 8), (512, 64)])
def test_a_rank_is_rounded_up_to_pages_of_eight_rows(rank: int, pages: int) -> None:
    assert pages_for(rank) == pages
    by_hand = sum(2 * pages * 8 * (num_in + num_out) * 4 for num_in, num_out in SHAPES.values())
    assert num_device_bytes([(kind, rank, 2) for kind in SHAPES], 0, SHAPES, 4) == by_hand


def test_an_adapter_takes_pages_of_its_own_linears_only() -> None:
    assert num_device_bytes([("self_attn.v_proj", 8, 1)], 0, SHAPES, 2) == 8 * (32 + 16) * 2


def test_dense_elements_count() -> None:
    assert num_device_bytes([], 100, SHAPES, 2) == 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pages")
    model = make_tiny_llama(made / "model")
    for name, fields in ADAPTERS.items():
        make_peft_adapter(made / name, model, **fields)
    return made


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_count_is_what_paged_slots_allocate(name: str, folder: Path) -> None:
    model = load_model(folder / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single())
    manifest = check_adapter(folder / name, model.config, max_rank=64)
    counted = num_device_bytes(manifest.rank_rows, manifest.dense_elements, module_shapes(model.config), 4)
    slots = PagedAdapterSlots(model, 1, 64)
    arranged = slots.arrange(load_adapter_weights(folder / name, manifest, dtype=torch.float32))
    page_bytes = {
        (linear.index, part, 0): 8 * (linear.in_size + size) * 4
        for linear in model.linears
        for part, size in enumerate(linear.parts.values())
    }
    assert sum(len(pages) * page_bytes[module] for module, (_, pages) in arranged.places.items()) == counted
    # Frames hold four of the largest pages; packing leaves less than one page of each empty, but for the last.
    frame = 4 * max(page_bytes.values())
    assert counted <= arranged.device_bytes == arranged.num_bytes <= counted * 4 / 3 + frame


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]])
def test_the_count_of_pages_on_experts_is_what_paged_slots_allocate(
    targets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft about its support of stacked parameters
        reference = make_tiny(FAMILIES["Mixtral"], tmp_path / "model", num_hidden_layers=1)
        adapter = write_adapter(tmp_path / "a", reference, target_modules=["q_proj"], target_parameters=targets, r=11)
    model = load_model(
        tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"), group=ParallelGroup.single()
    )
    manifest = check_adapter(adapter, model.config, max_rank=64)
    counted = num_device_bytes(manifest.rank_rows, manifest.dense_elements, module_shapes(model.config), 4)
    slots = PagedAdapterSlots(model, 1, 64)
    arranged = slots.arrange(load_adapter_weights(adapter, manifest, dtype=torch.float32))
    linears = {linear.index: linear for linear in (*model.linears, *model.expert_linears)}
    taken = [
        len(pages) * 8 * (linears[index].in_size + tuple(linears[index].parts.values())[part]) * 4
        for (index, part, _), (_, pages) in arranged.places.items()
    ]
    assert sum(taken) == counted
    assert len(taken) == 1 + 6 * (3 if targets == BOTH else 1)


def test_ranks_8_and_64_side_by_side_take_one_to_eight_and_unloaded_nothing(folder: Path) -> None:
    bench = EngineBench(folder / "model", {name: folder / name for name in ("rank 8", "rank 64")})
    for name in bench.specs:
        bench.add(name, [3, 4, 5], name)
    bench.run()
    manager = bench.engine.adapters
    device_bytes = {status.adapter_id: status.device_bytes for status in manager.take_statuses()}
    assert device_bytes["rank 64"] == 8 * device_bytes["rank 8"] > 0
    assert manager.device.used_bytes == sum(device_bytes.values())
    for name, status_bytes in device_bytes.items():
        before = manager.device.used_bytes
        bench.engine.unload_adapter(checked_spec(name, folder / name, folder / "model").digest)
        assert manager.device.used_bytes == before - status_bytes
    bench.run()
    assert manager.device.used_bytes == 0 and manager.host.used_bytes == 0
