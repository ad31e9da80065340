"""Serve a thousand adapters from a device pool for 32 and a host pool for 200, and check every answer over HTTP.

A random tiny model, adapters of ranks 4 to 64 over all linears, 32 clients that ask without pause. Traffic over 32
adapters that all fit, then over all of them, skewed (Zipf) and uniform. Every answer is held against transformers with
that adapter merged, computed beforehand. Ends with 1 when an answer is wrong, a request fails, or one has waited longer
than the starvation bound.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import peers
from load import Stream, ask
from report import aligned
from tiny_world import RANKS, Truth, make_model, random_prompts, write_adapter
from tokenizers import Tokenizer
from workload import zipf_weights

NUM_PROMPTS = 4
PROMPT_LENGTH = 24
NUM_TOKENS = 12
STARVATION_BOUND_S = 5.0
RESIDENCE_POLL_S = 0.25
WARM_UP_S = 3.0
RESIDENT = 'vllm:lora_adapter_loaded{adapter_name="'


@dataclass(slots=True)
class World:
    """The model, its adapters, the prompts, and what each adapter answers to each of them."""

    folder: Path
    names: list[str]
    prompts: list[str]
    truth: dict[str, list[list[int]]] = field(default_factory=dict)
    margins: dict[str, list[list[float]]] = field(default_factory=dict)

    @property
    def mean_bytes(self) -> int:
        """What an adapter's tensors take on average."""
        sizes = [(self.folder / name / "adapter_model.safetensors").stat().st_size for name in self.names]
        return sum(sizes) // len(sizes)


@dataclass(slots=True)
class Outcome:
    """What came of one load."""

    ttft_s: list[float] = field(default_factory=list)
    resident_ttft_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    num_tokens: int = 0
    duration_s: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)


def make_world(folder: Path, num_adapters: int) -> World:
    """Write everything, and let transformers answer for each adapter."""
    model = make_model(folder / "base")
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    prompts = [bytes(prompt).decode() for prompt in random_prompts(NUM_PROMPTS, PROMPT_LENGTH, 0)]
    prompt_ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    truth = Truth(model)
    world = World(folder, [f"a{number:04}" for number in range(num_adapters)], prompts)
    for number, name in enumerate(world.names):
        write_adapter(folder / name, model, RANKS[number % len(RANKS)], number)
        answers = truth.answers(folder / name, prompt_ids, NUM_TOKENS)
        world.truth[name] = [answer.token_ids for answer in answers]
        world.margins[name] = [answer.margins for answer in answers]
    return world


class Load:
    """Clients that each ask for one adapter after the other until the time is up."""

    def __init__(self, world: World, target: peers.HttpTarget, choices: Iterator[str]):
        self._world = world
        self._target = target
        self._choices = choices
        self._turns = itertools.count()
        self._resident: set[str] = set()
        self.outcome = Outcome()

    def run(self, num_clients: int, seconds: float) -> Outcome:
        """Ask for so long, after a warm-up that is checked but not timed."""
        before = _counters(self._target)
        asyncio.run(self._run(num_clients, seconds))
        after = _counters(self._target)
        self.outcome.counts = {name: after[name] - before.get(name, 0.0) for name in after}
        return self.outcome

    async def _run(self, num_clients: int, seconds: float) -> None:
        began = time.perf_counter()
        watcher = asyncio.create_task(self._watch_residents())
        end = began + WARM_UP_S + seconds
        await asyncio.gather(*(self._client(began + WARM_UP_S, end) for _ in range(num_clients)))
        self.outcome.duration_s = time.perf_counter() - began - WARM_UP_S
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)

    async def _watch_residents(self) -> None:
        while True:
            text = await asyncio.to_thread(_metrics, self._target)
            self._resident = {
                line[len(RESIDENT) :].partition('"')[0] for line in text.splitlines() if line.startswith(RESIDENT)
            }
            await asyncio.sleep(RESIDENCE_POLL_S)

    async def _client(self, counts_from: float, end: float) -> None:
        while (now := time.perf_counter()) < end:
            name, prompt = next(self._choices), next(self._turns) % NUM_PROMPTS
            was_resident = name in self._resident
            parameters = {"max_new_tokens": NUM_TOKENS, "adapter_id": name, "ignore_eos_token": True}
            body = {"inputs": self._world.prompts[prompt], "parameters": parameters}
            stream = await ask(self._target.host, self._target.port, "/generate_stream", body)
            self._check(name, prompt, stream, was_resident and name in self._resident, now >= counts_from)

    def _check(self, name: str, prompt: int, stream: Stream, was_resident: bool, is_timed: bool) -> None:
        outcome = self.outcome
        events = [json.loads(data) for _, data in stream.events]
        token_ids = [event["token"]["id"] for event in events if "token" in event]
        if stream.error or len(token_ids) != NUM_TOKENS:
            outcome.failed.append(f"{name}: {stream.error or events[-1:]}")
            return
        for mine, theirs, margin in zip(
            self._world.truth[name][prompt], token_ids, self._world.margins[name][prompt], strict=True
        ):
            if mine != theirs:
                if margin > 1e-3:  # else both were all but equal, and the rest follows from the choice
                    outcome.wrong.append(f"{name}: {token_ids} instead of {self._world.truth[name][prompt]}")
                break
        if is_timed:
            outcome.num_tokens += len(token_ids)
            ttft = stream.events[0][0] - stream.sent_at
            outcome.ttft_s.append(ttft)
            if was_resident:
                outcome.resident_ttft_s.append(ttft)


def _metrics(target: peers.HttpTarget) -> str:
    with urllib.request.urlopen(f"http://{target.host}:{target.port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def _counters(target: peers.HttpTarget) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in _metrics(target).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if name.startswith("loraplex_adapter_")}


def skewed(names: list[str], seed: int) -> Iterator[str]:
    """Names at random, the first most often (Zipf with exponent 1)."""
    draw, weights = random.Random(seed), zipf_weights(len(names))
    while True:
        yield from draw.choices(names, weights, k=1000)


def uniform(names: list[str], seed: int) -> Iterator[str]:
    """Names at random, all alike."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(names)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def _line(name: str, outcome: Outcome) -> list[str]:
    milliseconds = [
        f"{1000 * value:.0f}"
        for value in (
            _percentile(outcome.ttft_s, 0.5),
            _percentile(outcome.ttft_s, 0.99),
            max(outcome.ttft_s, default=0.0),
            _percentile(outcome.resident_ttft_s, 0.5),
            _percentile(outcome.resident_ttft_s, 0.99),
        )
    ]
    loads = [f"{outcome.counts.get(f'loraplex_adapter_{what}', 0):.0f}" for what in COUNTED]
    return [
        name,
        str(len(outcome.ttft_s)),
        f"{outcome.num_tokens / outcome.duration_s:.0f}",
        *milliseconds,
        str(len(outcome.resident_ttft_s)),
        *loads,
        str(len(outcome.wrong)),
        str(len(outcome.failed)),
    ]


COUNTED = ('loads{tier="host"}', 'loads{tier="device"}', 'evictions{tier="host"}', 'evictions{tier="device"}')
HEAD = (
    "load", "requests", "tok/s", "TTFT ms p50", "p99", "max", "resident p50", "p99", "of", "host loads",
    "device loads", "host evictions", "device evictions", "wrong", "failed",
)  # fmt: skip


def main() -> int:
    """Make the world, run the three loads, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--device-adapters", type=int, default=32, help="adapters that the device pool holds")
    parser.add_argument("--host-adapters", type=int, default=200, help="adapters of mean size that host memory holds")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        world = make_world(Path(folder), options.adapters)
        print(f"{options.adapters} adapters and their answers made in {time.perf_counter() - began:.0f} s", flush=True)
        return _measure(world, options)


def _measure(world: World, options: argparse.Namespace) -> int:
    flags = ["--dtype", "float32", "--num-threads", "1", "--num-kv-blocks", "2048", "--max-batch-size", "64"]
    flags += ["--max-resident-adapters", str(options.device_adapters), "--log-level", "warn"]
    flags += ["--adapter-host-memory", str(options.host_adapters * world.mean_bytes)]
    flags += ["--starvation-bound-s", str(STARVATION_BOUND_S)]
    adapters = {name: str(world.folder / name) for name in world.names}
    began = time.perf_counter()
    target = peers.loraplex(str(world.folder / "base"), adapters, flags)
    outcomes: dict[str, Outcome] = {}
    try:
        target.wait_until_ready()
        print(f"server ready after {time.perf_counter() - began:.1f} s", flush=True)
        few = world.names[: options.device_adapters]
        for name, choices in (
            (f"{len(few)} adapters, uniform", uniform(few, 1)),
            (f"{len(world.names)} adapters, skewed", skewed(world.names, 2)),
            (f"{len(world.names)} adapters, uniform", uniform(world.names, 3)),
        ):
            outcomes[name] = Load(world, target, choices).run(options.clients, options.seconds)
    finally:
        target.stop()
    print(aligned([list(HEAD), *(_line(name, outcome) for name, outcome in outcomes.items())]))
    base = _percentile(next(iter(outcomes.values())).resident_ttft_s, 0.99)
    for name, outcome in outcomes.items():
        ratio = _percentile(outcome.resident_ttft_s, 0.99) / base
        print(f"{name}: p99 TTFT of resident adapters {ratio:.2f} times that of {options.device_adapters} adapters")
        for problem in (outcome.wrong + outcome.failed)[:5]:
            print(f"  {problem}")
    longest = max(max(outcome.ttft_s, default=0.0) for outcome in outcomes.values())
    print(f"longest wait for a first token {longest:.2f} s, the starvation bound is {STARVATION_BOUND_S} s")
    is_well = longest < STARVATION_BOUND_S and not any(o.wrong or o.failed for o in outcomes.values())
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
