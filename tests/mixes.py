"""One random mix of requests through a real engine, held answer by answer against transformers and peft."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from engines import EngineBench
from truth import Truth


@dataclass(frozen=True)
class MixRequest:
    """One request of a mix."""

    prompt: list[int]
    adapter: str | None
    max_new_tokens: int
    ignore_eos: bool = False


def play(
    bench: EngineBench, truth: Truth, rng: random.Random, requests: Iterable[MixRequest], end_tokens: set[int]
) -> tuple[list[str], Counter[str]]:
    """Let the requests arrive at random times, some cancelled; returns what is wrong with the answers and what was met.

    The engine must have been started for this mix; it must end with nothing held.
    """
    arrived: dict[str, MixRequest] = {}
    cancelled: set[str] = set()
    for number, request in enumerate(requests):
        name = str(number)
        arrived[name] = request
        sampling = {"max_new_tokens": request.max_new_tokens, "ignore_eos": request.ignore_eos}
        bench.add(name, request.prompt, request.adapter, **sampling)
        for _ in range(rng.choice([0, 0, 0, 1, 5])):
            bench.step()
        if rng.random() < 0.1:
            victim = rng.choice(list(arrived))
            cancelled.add(victim)
            bench.engine.abort(victim)
    bench.run()
    objections = []
    for name, request in sorted(arrived.items(), key=lambda item: item[1].adapter or ""):
        if name in cancelled and not (bench.outputs[name] and bench.outputs[name][-1].finish_reason):
            continue
        answer = bench.answer(name)
        objection = truth.objection(
            request.adapter, request.prompt, answer, set() if request.ignore_eos else end_tokens
        )
        if objection:
            what = f"request {name} ({request.adapter}, {len(request.prompt)} prompt tokens)"
            objections.append(f"{what}: {objection}")
    engine = bench.engine
    engine.blocks.check_integrity()
    assert engine.blocks.num_used == 0 and engine.adapters.num_pins == 0
    happened = Counter(
        mixes=1,
        answers=len(arrived) - len(cancelled),
        preemptions=engine.scheduler.num_preemptions,
        prefix_hits=sum(o.num_cached_tokens > 0 for outputs in bench.outputs.values() for o in outputs),
    )
    return objections, happened
