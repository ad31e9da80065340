"""A model over several ranks, in threads, against the same model on one."""

from pathlib import Path

import pytest
import torch
from paged_model import PagedModel
from ranks import run_ranks
from tiny_families import FAMILIES, make_family_adapter, make_tiny
from torch import Tensor

from loraplex_models.adapters.cut import cut_adapter
from loraplex_models.adapters.manifest import check_adapter
from loraplex_models.adapters.slots import AdapterSlots
from loraplex_models.adapters.weights import load_adapter_weights
from loraplex_models.config import read_config
from loraplex_models.cuts import RankPart
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup

TOKENS = list(range(3, 60))


def logits(folder: Path, adapters: list[Path], group: ParallelGroup) -> list[Tensor]:
    """The logits of a prompt with each adapter, and without, in one batch."""
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"), group=group)
    config = read_config(folder)
    slots = AdapterSlots(model, len(adapters) or 1)
    for slot, adapter in enumerate(adapters):
        weights = load_adapter_weights(adapter, check_adapter(adapter, config, max_rank=64), dtype=torch.float32)
        slots.set(slot, cut_adapter(weights, RankPart(config, group.rank, group.size)))
    paged = PagedModel(model, slots=slots)
    names = [str(slot) for slot in range(-1, len(adapters))]
    for name in names:
        paged.add(name, TOKENS, int(name))
    for count in (30, 20, 1, 6):
        paged.step(dict.fromkeys(names, count))
    return [paged.logits(name) for name in names]


UNCUT = {"OLMo 2"}
CASES = [("Llama", 3), ("Llama", 4), *((name, 2) for name in FAMILIES if name not in UNCUT)]


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ranks_together_give_the_logits_of_one(name: str, size: int, tmp_path: Path) -> None:
    family = FAMILIES[name]
    truth = make_tiny(family, tmp_path / "model")
    adapters = [make_family_adapter(tmp_path / f"r{rank}", truth, family, rank) for rank in (4, 12, 64)]
    alone = logits(tmp_path / "model", adapters, ParallelGroup.single())
    for of_rank in run_ranks(size, tmp_path, lambda group: logits(tmp_path / "model", adapters, group)):
        for one, other in zip(alone, of_rank, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-3)
