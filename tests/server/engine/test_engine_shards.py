"""An engine over several ranks, each a thread, against one rank and against transformers with peft."""

import random
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from engines import EngineBench
from expert_adapters import BOTH, write_adapter
from ranks import run_ranks
from slow_dequantization import FIXTURES
from tiny_families import FAMILIES, make_tiny
from tiny_models import make_peft_adapter, make_tiny_llama

from loraplex_models.adapters.weights import AdapterWeights
from loraplex_models.parallel import ParallelGroup
from loraplex_server.control import ControlLine
from loraplex_server.engine.heartbeat import Heartbeat
from loraplex_server.engine.process import build_worker
from loraplex_server.engine.shards import follow
from loraplex_server.messages import TokenOutput

RANKS = (4, 12, 64)
GPTQ = "autogptq-b4-g32-act-asym"
GPTQ_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
Outputs = dict[str, list[TokenOutput]]


def follow_rank(folder: Path, group: ParallelGroup, unreadable: Path | None, overlap_steps: str) -> None:
    """The life of a rank that is not the first, and that cannot read one folder."""
    bench = EngineBench(folder, {}, group=group)
    config, limits = bench.settle(overlap_steps=overlap_steps)
    ours, theirs = socket.socketpair()
    heartbeat = Heartbeat(ControlLine(ours))
    worker = build_worker(config, bench.model, limits)
    read = worker.host_cache._read

    def read_or_fail(path: str) -> AdapterWeights:
        if path == str(unreadable):
            raise FileNotFoundError(path)
        return read(path)

    worker.host_cache._read = read_or_fail
    try:
        follow(worker, group, heartbeat)
    finally:
        heartbeat.close()
        ours.close()
        theirs.close()


def over_ranks(
    size: int,
    tmp_path: Path,
    folder: Path,
    adapters: dict[str, Path],
    play: Callable[[EngineBench], None],
    unreadable: Path | None = None,
    overlap_steps: str = "off",
) -> Outputs:
    """What the engine says when `play` is done with it."""

    def work(group: ParallelGroup) -> Outputs:
        if group.rank > 0:
            follow_rank(folder, group, unreadable, overlap_steps)
            return {}
        bench = EngineBench(folder, adapters, group=group)
        bench.start(overlap_steps=overlap_steps)
        try:
            play(bench)
        finally:
            bench.engine.close()
        return bench.outputs

    return run_ranks(size, tmp_path, work)[0]


def mixed(bench: EngineBench) -> None:
    """Requests of all adapters and of none, short and long, that come while others run."""
    rng = random.Random(3)
    for number in range(12):
        prompt = [rng.randrange(3, 250) for _ in range(rng.choice([1, 7, 40]))]
        adapter = rng.choice([None, *bench.specs])
        bench.add(str(number), prompt, adapter, max_new_tokens=9, num_logprobs=2)
        bench.step()
    bench.run()


def token_ids(outputs: Outputs) -> dict[str, list[int]]:
    assert all(said[-1].finish_reason and not said[-1].error for said in outputs.values()), outputs
    return {name: [token for output in said for token in output.token_ids] for name, said in outputs.items()}


@pytest.fixture(scope="module", params=["Llama", "Mixtral", "OLMo 2", "GPTQ"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A model and adapters of ranks that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("world")
    if request.param == "GPTQ":
        shutil.copytree(FIXTURES / GPTQ, folder / "model")
        raw = make_tiny_llama(folder / "plain", **GPTQ_SHAPE)
    else:
        raw = make_tiny(FAMILIES[request.param], folder / "model")
    linears = FAMILIES["Llama" if request.param == "GPTQ" else request.param].linears
    adapters = {
        f"r{rank}": make_peft_adapter(folder / f"r{rank}", raw, rank=rank, target_modules=linears, seed=rank)
        for rank in RANKS
    }
    if request.param in ("Llama", "GPTQ"):
        adapters["dora"] = make_peft_adapter(folder / "dora", raw, rank=5, target_modules=linears, use_dora=True)
    if request.param == "Mixtral":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peft about its support of stacked parameters
            adapters["experts"] = write_adapter(folder / "experts", raw, target_modules=[], target_parameters=BOTH)
    return folder / "model", adapters


def test_ranks_together_give_the_tokens_of_one(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, adapters = world
    alone = token_ids(over_ranks(1, tmp_path, folder, adapters, mixed))
    assert len({tuple(tokens) for tokens in alone.values()}) > 6
    for size, overlap_steps in ((2, "on"), (4, "off")):
        together = over_ranks(size, tmp_path, folder, adapters, mixed, overlap_steps=overlap_steps)
        assert token_ids(together) == alone


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_one_rank_cannot_read_costs_its_own_requests_only(use_dora: bool, tmp_path: Path) -> None:
    """With DoRA the other rank waits for its share."""
    raw = make_tiny(FAMILIES["Llama"], tmp_path / "model")
    adapters = {
        name: make_peft_adapter(tmp_path / name, raw, rank=4, seed=seed, use_dora=use_dora)
        for seed, name in enumerate("ab")
    }

    def play(bench: EngineBench) -> None:
        for name in (None, "a", "b", "a"):
            bench.add(f"{name} {len(bench.outputs)}", [5, 6, 7], name)
        bench.run()

    outputs = over_ranks(2, tmp_path, tmp_path / "model", adapters, play, unreadable=adapters["a"])
    assert outputs["a 1"][-1].error == outputs["a 3"][-1].error
    assert "rank 1 could not load it" in str(outputs["a 1"][-1].error)
    fine = {name: said for name, said in outputs.items() if not name.startswith("a")}
    assert all(len(tokens) == 8 for tokens in token_ids(fine).values())
