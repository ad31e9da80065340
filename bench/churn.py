"""Change adapters under running traffic, over HTTP, and check that no answer comes from a version that was not served.

Operators replace, split (canary), pin, register and delete names without pause, over pools far smaller than all
contents, while clients ask for the names, for single versions and for the base, and some of them leave early. A version
may answer a request if it was served at any moment between the request's sending and its first token. Ends with 1 when
an answer is wrong, a request fails without cause, or something is held when all is over.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import peers
import psutil
from tiny_world import RANKS, TrueAnswer, Truth, make_model, random_prompts, write_adapter
from tokenizers import Tokenizer

NUM_CONTENTS = 60
NUM_NAMES = 12
NUM_OPERATORS = 3  # each with names of its own
NUM_TOKENS = 8
NUM_PROMPTS = 3
PROMPT_LENGTH = 20
CANCEL_SHARE = 0.08
IDLE_TIMEOUT_S = 30
HELD = (
    "loraplex_running",
    "loraplex_waiting",
    "loraplex_kv_blocks_used",
    "loraplex_adapter_pins",
    "loraplex_adapters_registered",
    "loraplex_adapter_host_bytes",
    "loraplex_adapter_device_bytes",
)


@dataclass(slots=True)
class Span:
    """A time in which a name may have stood for a content; None: it stood for nothing."""

    content: str | None
    begin: float
    end: float = float("inf")


@dataclass(slots=True)
class Name:
    """What the operator knows of a name: its versions now, and all that it has stood for."""

    versions: dict[str, str] = field(default_factory=dict)  # of those that exist now: version → content
    active: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=lambda: [Span(None, 0.0)])

    def become(self, active: dict[str, str], began: float) -> None:
        """Note that from some moment since `began` the name stands for these versions' contents."""
        now = time.perf_counter()
        contents: list[str | None] = [*active.values()] or [None]
        for span in self.spans:
            if span.end == float("inf") and span.content not in contents:
                span.end = now
        served = {span.content for span in self.spans if span.end == float("inf")}
        self.spans += [Span(content, began) for content in contents if content not in served]
        self.active = [*active]

    def allowed(self, begin: float, end: float) -> set[str | None]:
        """What a request between these moments may have got."""
        return {span.content for span in self.spans if span.begin <= end and span.end >= begin}


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a request: judged when all changes are known, since a change's answer may come after its effect."""

    name: str | None
    prompt: int
    sent: float
    until: float  # the first token, or the refusal
    token_ids: list[int]
    error: str


class Churn:
    """The operator, the clients, and what they have seen."""

    def __init__(self, folder: Path, target: peers.HttpTarget, answers: dict[str | None, list[TrueAnswer]]):
        self._folder = folder
        self._answers = answers
        self.contents = [content for content in answers if content is not None]
        self._prompts: list[str] = []
        self._draw = random.Random(0)
        self._names = {f"name-{number}": Name() for number in range(NUM_NAMES)}
        self._http = httpx.AsyncClient(base_url=f"http://{target.host}:{target.port}", timeout=120)
        self._seen: list[Seen] = []
        self._is_over = False
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.rss_mib: list[float] = []

    async def run(self, prompts: list[str], num_requests: int, num_clients: int) -> None:
        """All of it; afterwards no name is left."""
        self._prompts = prompts
        turns = iter(range(num_requests))
        names = [*self._names]
        operators = [asyncio.create_task(self._operate(names[i::NUM_OPERATORS])) for i in range(NUM_OPERATORS)]
        await asyncio.gather(*(self._client(turns, num_requests) for _ in range(num_clients)))
        self._is_over = True
        await asyncio.gather(*operators)
        for one in self._seen:
            self._judge(one)
        for name in self._names:
            await self._http.delete(f"/adapters/{name}")
        await self._wait_until_idle()
        await self._http.aclose()

    async def _operate(self, names: list[str]) -> None:
        acts = (self._replace, self._replace, self._add_version, self._split, self._pin, self._delete)
        while not self._is_over:
            await self._draw.choice(acts)(self._draw.choice(names))
            await asyncio.sleep(self._draw.random() * 0.05)

    async def _register(self, name: str, **fields: Any) -> tuple[str, str] | None:
        """POST a random content; the version's name and the content, or None when it was refused."""
        content = self._draw.choice(self.contents)
        body = {"name": name, "source": "local", "id": str(self._folder / content)} | fields
        answer = await self._http.post("/adapters", json=body)
        self.seen[f"register {answer.status_code}"] += 1
        if answer.status_code != 200:
            self.wrong.append(f"register: {answer.status_code} {answer.text[:200]}")
            return None
        return answer.json()["versions"][-1]["version"], content

    async def _replace(self, name: str) -> None:
        known, began = self._names[name], time.perf_counter()
        registered = await self._register(name)
        if registered is not None:
            version, content = registered
            for old in known.active:
                known.versions.pop(old, None)
            known.versions[version] = content
            known.become({version: content}, began)

    async def _add_version(self, name: str) -> None:
        known = self._names[name]
        if not known.versions or len(known.versions) > 3:
            return
        label = f"v{self._draw.randrange(10**6)}"
        registered = await self._register(name, version=label, activate=False)
        if registered is not None:
            known.versions[label] = registered[1]

    async def _split(self, name: str) -> None:
        known, began = self._names[name], time.perf_counter()
        if not known.versions:
            return
        chosen = self._draw.sample([*known.versions], min(len(known.versions), self._draw.choice([1, 2])))
        # Both the old and the new shares count from here, until the answer is there.
        answer = await self._http.put(f"/adapters/{name}", json={"split": dict.fromkeys(chosen, 1.0)})
        self.seen[f"split {answer.status_code}"] += 1
        known.become({version: known.versions[version] for version in chosen}, began)

    async def _pin(self, name: str) -> None:
        if self._names[name].versions:
            answer = await self._http.put(f"/adapters/{name}", json={"pinned": self._draw.random() < 0.3})
            self.seen[f"pin {answer.status_code}"] += 1

    async def _delete(self, name: str) -> None:
        known, began = self._names[name], time.perf_counter()
        if known.versions and self._draw.random() < 0.3:
            answer = await self._http.delete(f"/adapters/{name}")
            self.seen[f"delete {answer.status_code}"] += 1
            known.versions = {}
            known.become({}, began)

    async def _client(self, turns: Any, num_requests: int) -> None:
        for turn in turns:
            if turn % max(num_requests // 10, 1) == num_requests // 20:
                self.rss_mib.append(_rss_mib())
            await self._ask(self._draw.choice([None, *self._names]), turn % NUM_PROMPTS)

    async def _ask(self, name: str | None, prompt: int) -> None:
        parameters: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
        if name is not None:
            parameters["adapter_id"] = name
        body = {"inputs": self._prompts[prompt], "parameters": parameters}
        leaves_after = self._draw.randrange(NUM_TOKENS) if self._draw.random() < CANCEL_SHARE else None
        token_ids: list[int] = []
        error = ""
        sent, first = time.perf_counter(), 0.0
        async with self._http.stream("POST", "/generate_stream", json=body) as answer:
            if answer.status_code != 200:
                error = (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if leaves_after is not None and len(token_ids) >= leaves_after:
                    break
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    if "token" not in event:
                        error = line
                        break
                    first = first or time.perf_counter()
                    token_ids.append(event["token"]["id"])
        if leaves_after is not None and not error:
            self.seen["left early"] += 1
        else:
            self._seen.append(Seen(name, prompt, sent, first or time.perf_counter(), token_ids, error))

    def _judge(self, seen: Seen) -> None:
        allowed = {None} if seen.name is None else self._names[seen.name].allowed(seen.sent, seen.until)
        if seen.error:
            is_due = "adapter_not_found" in seen.error and seen.name is not None and None in allowed
            self.seen["not found, as it should be" if is_due else "failed"] += 1
            if not is_due:
                self.wrong.append(f"{seen.name}: {seen.error[:300]}")
            return
        served = allowed if seen.name is None else allowed - {None}
        met = any(self._answers[content][seen.prompt].is_met_by(seen.token_ids) for content in served)
        self.seen["right" if met else "wrong"] += 1
        if not met:
            fitting = [content for content, own in self._answers.items() if own[seen.prompt].is_met_by(seen.token_ids)]
            self.wrong.append(f"{seen.name}: the answer of {fitting}, served were {sorted(map(str, served))}")

    async def _wait_until_idle(self) -> None:
        deadline = time.perf_counter() + IDLE_TIMEOUT_S
        held: dict[str, float] = {}
        while time.perf_counter() < deadline:
            lines = [line.rsplit(" ", 1) for line in (await self._http.get("/metrics")).text.splitlines()]
            series = {line[0]: float(line[1]) for line in lines if line[0] in HELD}
            held = {name: value for name, value in series.items() if value}
            if not held and len(series) == len(HELD):
                return
            await asyncio.sleep(0.2)
        self.wrong.append(f"still held: {held}")


def _rss_mib() -> float:
    """Private memory of the server's processes."""
    children = [c for c in psutil.Process().children(recursive=True) if "loraplex.processes" in " ".join(c.cmdline())]
    return sum(child.memory_info().rss - child.memory_info().shared for child in children) / 2**20


def main() -> int:
    """Make the world, start the server, run the churn, print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text).resolve()
        model = make_model(folder / "base")
        tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
        prompts = [bytes(prompt).decode() for prompt in random_prompts(NUM_PROMPTS, PROMPT_LENGTH, 0)]
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        truth = Truth(model)
        answers: dict[str | None, list[TrueAnswer]] = {None: truth.answers(None, ids, NUM_TOKENS)}
        for number in range(NUM_CONTENTS):
            content = f"content-{number}"
            write_adapter(folder / content, model, RANKS[number % len(RANKS)], number)
            answers[content] = truth.answers(folder / content, ids, NUM_TOKENS)
        mean_bytes = sum(f.stat().st_size for f in folder.glob("content-*/*.safetensors")) // NUM_CONTENTS
        flags = ["--dtype", "float32", "--num-threads", "1", "--num-kv-blocks", "1024", "--log-level", "warn"]
        flags += ["--adapter-root", str(folder), "--allow-runtime-adapters", "--max-resident-adapters", "8"]
        flags += ["--adapter-host-memory", str(14 * mean_bytes)]
        target = peers.loraplex(str(folder / "base"), {}, flags)
        try:
            target.wait_until_ready()
            churn = Churn(folder, target, answers)
            began = time.perf_counter()
            asyncio.run(churn.run(prompts, options.requests, options.clients))
        finally:
            target.stop()
    print(f"{options.requests} requests in {time.perf_counter() - began:.0f} s")
    for what, count in sorted(churn.seen.items()):
        print(f"{what:28} {count}")
    print("memory of the server's processes in MiB:", " ".join(f"{mib:.0f}" for mib in churn.rss_mib))
    for problem in churn.wrong[:10]:
        print(f"  {problem}")
    return 1 if churn.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
