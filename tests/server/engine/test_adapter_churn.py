"""Adapters that are loaded, replaced, split, evicted, broken and unloaded under running traffic, seeded.

A request gets the content that its name stood for when it was admitted, whatever happens to the name, to the memory and
to other requests meanwhile; and when all is over, nothing is held anywhere.
"""

import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama
from truth import Truth

from loraplex_models.adapters.slots import AdapterSlots
from loraplex_server.adapter_contents import AdapterContents
from loraplex_server.engine import sequence as sequence_module
from loraplex_server.engine.block_manager import root_hash
from loraplex_server.messages import LoadAdapter, UnloadAdapter

NUM_CONTENTS = 10
NUM_REQUESTS = 300
NUM_TOKENS = 10
MAX_STEPS = 5000
NAMES = ("red", "green", "blue", "black", "white")
AHEAD = {"overlap_steps": "on", "is_late": True}
BROKEN = "content 0"  # its files are not there when they are read


@dataclass
class World:
    """An engine, its contents by name, the prompts, and the greedy tokens of each content after each of them."""

    bench: EngineBench
    prompts: list[list[int]]
    answers: dict[tuple[str | None, int], list[int]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("churn")
    model = make_tiny_llama(folder / "base", vocab_size=256)
    adapters = {
        f"content {seed}": make_peft_adapter(folder / f"content {seed}", model, rank=(4, 8, 24)[seed % 3], seed=seed)
        for seed in range(NUM_CONTENTS)
    }
    bench = EngineBench(folder / "base", adapters)
    truth = Truth(model, adapters)
    draw = random.Random(0)
    head = [draw.randrange(3, 256) for _ in range(16)]
    prompts = [[*head[:length], 7 + length] for length in (3, 8, 16)]
    answers = {}
    for content in (None, *adapters):
        for number, prompt in enumerate(prompts):
            tokens = list(prompt)
            for _ in range(NUM_TOKENS):
                tokens.append(int(truth.logprobs(content, tokens)[-1].argmax()))
            answers[content, number] = tokens[len(prompt) :]
    shutil.rmtree(folder / BROKEN)
    return World(bench, prompts, answers)


@dataclass
class Admitted:
    """A request that runs, and what its name stood for when it came."""

    content: str | None
    prompt: int
    hold: Any
    is_cancelled: bool = False


@dataclass
class Churn:
    """One random history."""

    world: World
    draw: random.Random
    settings: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)  # name → the contents that a canary splits it between
    live: dict[str, Admitted] = field(default_factory=dict)
    objections: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0

    def __post_init__(self) -> None:
        bench = self.world.bench
        self.specs = bench.specs
        sizes = sorted(spec.num_bytes for spec in self.specs.values())
        bench.specs = {}  # nothing is known at the start
        bench.start(
            block_size=4,
            num_kv_blocks=self.draw.choice([14, 18, 60]),
            max_total_tokens=56,
            max_batch_size=self.draw.choice([3, 6]),
            max_batch_prefill_tokens=self.draw.choice([8, 64]),
            max_resident_adapters=self.draw.choice([1, 2, 4]),
            starvation_bound_s=self.draw.choice([0.3, 2.0, 50.0]),
            host_memory=sizes[-1] * self.draw.choice([1, 3, 6]),
            **self.settings,
        )
        bench.specs = self.specs
        self.engine = bench.engine
        self.engine.scheduler._clock = lambda: self.num_steps / 10
        self.contents = AdapterContents(self._tell)

    def _tell(self, message: LoadAdapter | UnloadAdapter) -> None:
        match message:
            case LoadAdapter(spec=spec):
                self.engine.load_adapter(spec)
            case UnloadAdapter(digest=digest):
                self.engine.unload_adapter(digest)

    def change_a_name(self) -> None:
        """Register, replace, split between two versions, or forget."""
        name = self.draw.choice(NAMES)
        if name in self.names and self.draw.random() < 0.3:
            for content in self.names.pop(name):
                self.contents.release(self.specs[content])
            return
        chosen = self.draw.sample(list(self.specs), self.draw.choice([1, 1, 2]))
        for content in chosen:
            self.contents.acquire(self.specs[content])
        for content in self.names.get(name, []):
            self.contents.release(self.specs[content])
        self.names[name] = chosen

    def keep_something(self) -> None:
        """Pin or unpin a content."""
        spec = self.draw.choice([*self.specs.values()])
        self.engine.keep_adapter(spec.digest, self.draw.random() < 0.5)

    def ask(self, request_id: str) -> None:
        """Admit a request for a name, or for the base."""
        name = self.draw.choice([None, *self.names])
        content = self.draw.choice(self.names[name]) if name is not None else None
        prompt = self.draw.randrange(len(self.world.prompts))
        hold = self.contents.holding(self.specs[content]) if content else None
        if hold is not None:
            hold.__enter__()
        self.live[request_id] = Admitted(content, prompt, hold)
        self.world.bench.add(
            request_id, self.world.prompts[prompt], content, max_new_tokens=NUM_TOKENS, ignore_eos=True
        )

    def cancel(self) -> None:
        """A client leaves."""
        if self.live:
            request_id = self.draw.choice([*self.live])
            self.engine.abort(request_id)
            self._let_go(request_id)
            self.happened["cancelled"] += 1

    def step(self) -> None:
        """One step, and a look at every answer that has ended."""
        self.num_steps += 1
        self.world.bench.step()
        self.happened.update(f"now in {status.tier}" for status in self.engine.adapters.take_statuses())
        self.engine.adapters.check_integrity()
        for request_id in [r for r in self.live if self._has_ended(r)]:
            self._check(request_id)
            self._let_go(request_id)

    def _has_ended(self, request_id: str) -> bool:
        outputs = self.world.bench.outputs[request_id]
        return bool(outputs) and outputs[-1].finish_reason is not None

    def _check(self, request_id: str) -> None:
        admitted, outputs = self.live[request_id], self.world.bench.outputs[request_id]
        tokens = [token for output in outputs for token in output.token_ids]
        error = outputs[-1].error
        self.happened["failed" if error else "answered"] += 1
        self.happened["cached"] += any(output.num_cached_tokens for output in outputs)
        if admitted.content == BROKEN:
            if error is None or tokens:
                self.objections.append(f"{request_id} has an answer of files that are gone")
        elif error is not None or tokens != self.world.answers[admitted.content, admitted.prompt]:
            self.objections.append(f"{request_id} for {admitted.content}: {error or tokens}")

    def _let_go(self, request_id: str) -> None:
        hold = self.live.pop(request_id).hold
        if hold is not None:
            hold.__exit__(None, None, None)

    def run(self) -> None:
        """The whole history, to the end of every request and name."""
        for number in range(NUM_REQUESTS):
            for act, chance in ((self.change_a_name, 0.15), (self.keep_something, 0.05), (self.cancel, 0.08)):
                if self.draw.random() < chance:
                    act()
            self.ask(str(number))
            for _ in range(self.draw.choice([0, 0, 1, 2, 3])):
                self.step()
        for _ in range(MAX_STEPS):
            if not self.live:
                break
            self.step()
        assert not self.live, [(r, a.content) for r, a in self.live.items()]
        for contents in self.names.values():
            for content in contents:
                self.contents.release(self.specs[content])
        for _ in range(MAX_STEPS):
            if not self.engine.has_work:
                break
            self.step()
        self.happened["preemptions"] += self.engine.scheduler.num_preemptions


def check_baseline(churn: Churn) -> None:
    """Assert that nothing is held: no block, pin, slot, byte or weight."""
    engine = churn.engine
    engine.blocks.check_integrity()
    adapters, worker = engine.adapters, engine._executor._worker
    assert (engine.blocks.num_used, adapters.num_pins, adapters.num_registered, adapters.num_loading) == (0, 0, 0, 0)
    assert (adapters.host.used_bytes, adapters.device.used_bytes) == (0, 0)
    assert not worker.host_cache._weights and not worker.host_cache._prepared
    assert not any(table.slots or table.weights for table in worker._slots._tables)
    assert not engine.scheduler.waiting and not engine.scheduler.running


def test_under_any_churn_every_answer_is_that_of_the_version_admitted_and_nothing_stays_behind(world: World):
    happened: Counter[str] = Counter()
    for seed in range(4):
        churn = Churn(world, random.Random(seed), AHEAD if seed % 2 else {})
        churn.run()
        assert not churn.objections, (seed, churn.objections[:3])
        check_baseline(churn)
        happened += churn.happened
    print(f"\n{dict(happened)}")
    assert happened["answered"] > 2 * NUM_REQUESTS and happened["failed"] > 20 and happened["cancelled"] > 50
    assert min(happened[what] for what in ("cached", "preemptions", "now in host", "now in disk")) > 20


def _hash_without_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_module, "root_hash", lambda *_: root_hash(None))


def _old_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = AdapterSlots.install, {}

    def keep_first(self: AdapterSlots, slot: int, adapter: Any):
        plain(self, slot, seen.setdefault((id(self), slot), adapter))

    monkeypatch.setattr(AdapterSlots, "install", keep_first)


@pytest.mark.parametrize("plant", [_hash_without_version, _old_weights_stay])
def test_a_planted_mix_up_of_versions_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch, plant):
    plant(monkeypatch)
    churn = Churn(world, random.Random(0))
    churn.run()
    assert churn.objections
