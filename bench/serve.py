"""Measure the server over HTTP: latencies, tokens a second, and ratios, beside peers in the same run.

By default: the demo model and the example adapters, 8 greedy requests of 64 tokens at a time, base only and over
base and adapters in turn, then single streams; and the same work by transformers + peft, one by one. Rounds
alternate between all of them, so that a busy machine is as busy for each. Nothing is asserted: read the ratios.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import peers
import report
from load import Run
from report import Ratio
from workload import DISTRIBUTIONS, Request, requests_for

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """A line of the table: a kind of work for one target."""

    name: str
    target: peers.Target
    adapters: list[str | None]
    num_requests: int
    concurrency: int
    distribution: str = "distinct"


def main() -> int:
    """Start what is to be measured, run the rounds, print the report."""
    options = _options()
    adapters = dict(adapter.split("=", 1) for adapter in options.adapter)
    if not options.url and not options.model:
        options.model, adapters = _demo(adapters)
    targets: list[peers.HttpTarget | peers.OneByOne] = []
    try:
        _start(options, adapters, targets)
        loads = _loads(options, list(adapters), {target.name: target for target in targets})
        runs = _measure(options, loads)
    except peers.PeerFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        for target in targets:
            target.stop()
    _print(options, runs)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", help="measure a server that runs already; name its adapters by --adapter NAME=")
    add("--model", help="folder of the base model (default: the demo model)")
    add("--adapter", action="append", default=[], metavar="NAME=PATH", help="repeatable (default: the examples)")
    add("--server-argument", action="append", default=[], help="one more argument for loraplex serve; repeatable")
    add("--distribution", choices=DISTRIBUTIONS, default="distinct", help="how requests spread over base and adapters")
    add("--concurrency", type=int, default=8, help="requests in flight")
    add("--rate", type=float, help="open loop instead: requests a second, at random times; loraplex only")
    add("--requests", type=int, help="requests of a load and round (default: 2 for each in flight)")
    add("--max-new-tokens", type=int, default=64, help="length of each answer")
    add("--rounds", type=int, default=3, help="times that each load is run")
    add("--threads", type=int, default=min(os.cpu_count() or 1, 4), help="threads of the peers")
    add("--no-peers", action="store_true", help="leave transformers + peft out")
    add("--vllm-python", help="interpreter of an environment with vLLM: measure it too")
    add("--llamacpp-python", help="interpreter of an environment with xllamacpp: measure llama.cpp too")
    add("--llamacpp-folder", help="folder with model.gguf and NAME.gguf of each adapter, for llama.cpp")
    options = parser.parse_args()
    if bool(options.llamacpp_python) != bool(options.llamacpp_folder):
        parser.error("--llamacpp-python and --llamacpp-folder go together")
    if options.url and not options.model:
        options.no_peers = True
    options.requests = options.requests or 2 * options.concurrency
    return options


def _demo(adapters: dict[str, str]) -> tuple[str, dict[str, str]]:
    from loraplex import demo  # only needed where no model is named

    examples = dict(example.split("=", 1) for example in demo.example_adapters())
    return str(demo.prepare()), adapters or examples


def _start(
    options: argparse.Namespace, adapters: dict[str, str], targets: list[peers.HttpTarget | peers.OneByOne]
) -> None:
    """Start the targets, one after another; those started are in `targets` even when one fails."""
    starts: list[Callable[[], peers.HttpTarget | peers.OneByOne]] = []
    if options.url:
        address = urlsplit(options.url)
        port = address.port or 80
        starts.append(lambda: peers.HttpTarget("loraplex", peers.TGI, port, host=address.hostname or "127.0.0.1"))
    else:
        starts.append(lambda: peers.loraplex(options.model, adapters, options.server_argument))
    if not options.no_peers and not options.rate:
        starts.append(lambda: peers.OneByOne(options.model, adapters, options.threads))
    if options.vllm_python:
        starts.append(lambda: peers.vllm(options.vllm_python, options.model, adapters, options.threads))
    if options.llamacpp_python:
        starts.append(
            lambda: peers.llamacpp(
                options.llamacpp_python, options.llamacpp_folder, list(adapters), options.threads, options.concurrency
            )
        )
    for start in starts:
        targets.append(start())
        _say(f"starting {targets[-1].name}")
        targets[-1].wait_until_ready()


def _loads(
    options: argparse.Namespace, adapters: list[str], targets: dict[str, peers.HttpTarget | peers.OneByOne]
) -> list[Load]:
    """Every line of the table, in the order of a round: what is compared stands side by side."""
    mix: list[str | None] = [None, *adapters]
    many, few = options.requests, max(len(mix), 2)
    loads: list[Load] = []

    def add(name: str, target: str, adapters: list[str | None], count: int, concurrency: int, spread: str) -> None:
        if target in targets:
            loads.append(Load(f"{target} {name}", targets[target], adapters, count, concurrency, spread))

    at_once = _at_once(options)
    add(f"base {at_once}", "loraplex", [None], many, options.concurrency, "identical")
    add(f"mix {at_once}", "loraplex", mix, many, options.concurrency, options.distribution)
    for peer in ("vllm", "llama.cpp"):
        add(f"mix {at_once}", peer, mix, many, options.concurrency, options.distribution)
    add("mix one by one", "transformers+peft", mix, few, 1, options.distribution)
    for target in ("loraplex", "llama.cpp"):
        add("base x1", target, [None], few, 1, "identical")
    for target in ("loraplex", "llama.cpp"):
        if adapters:
            add("adapter x1", target, [*adapters], few, 1, "distinct")
    if not adapters:
        loads = [load for load in loads if load.name != f"loraplex mix {at_once}"]
    return loads


def _measure(options: argparse.Namespace, loads: list[Load]) -> dict[str, list[Run]]:
    runs: dict[str, list[Run]] = {load.name: [] for load in loads}
    number = 1
    for round_number in range(options.rounds + 1):
        is_warm_up = round_number == 0
        for load in loads:
            count = (
                min(load.num_requests, max(load.concurrency, len(load.adapters))) if is_warm_up else load.num_requests
            )
            requests = requests_for(load.adapters, load.distribution, count, number, seed=round_number)
            number += count
            run = _run(options, load, requests, WARM_UP_TOKENS if is_warm_up else options.max_new_tokens)
            if not is_warm_up:
                runs[load.name].append(run)
                _say(f"round {round_number}: {load.name}: {report.total_speed(run):.1f} tok/s")
    return runs


def _run(options: argparse.Namespace, load: Load, requests: list[Request], num_tokens: int) -> Run:
    if options.rate and load.concurrency > 1 and isinstance(load.target, peers.HttpTarget):
        return load.target.run_at_rate(requests, num_tokens, options.rate)
    return load.target.run(requests, num_tokens, load.concurrency)


def _print(options: argparse.Namespace, runs: dict[str, list[Run]]) -> None:
    at_once = _at_once(options)
    base, mix = f"loraplex base {at_once}", f"loraplex mix {at_once}"
    wanted = [
        Ratio("mix over base only, same server", mix, base, 0.65),
        Ratio("mix over transformers+peft one by one", mix, "transformers+peft mix one by one", 4),
        Ratio("mix over vllm", mix, f"vllm mix {at_once}", 2),
        Ratio("mix over llama.cpp", mix, f"llama.cpp mix {at_once}", 2),
        *(
            Ratio(f"one stream of {name} over llama.cpp, {what}", f"loraplex {load}", f"llama.cpp {load}", 0.9, decode)
            for name, load in (("base", "base x1"), ("an adapter", "adapter x1"))
            for what, decode in (("whole request", False), ("decode", True))
        ),
        Ratio(
            "one stream of an adapter over one of base, decode", "loraplex adapter x1", "loraplex base x1", decode=True
        ),
    ]
    how = f"Poisson, {options.rate:g} requests/s" if options.rate else f"{options.concurrency} requests in flight"
    print(
        f"\n{how}, {options.distribution}, {options.max_new_tokens} new tokens, greedy, {options.rounds} rounds; "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}\n"
    )
    print(report.table(runs), end="\n\n")
    print(report.ratios(runs, wanted))
    if failures := report.errors(runs):
        print(f"\nfailed:\n{failures}")


def _at_once(options: argparse.Namespace) -> str:
    return f"at {options.rate:g}/s" if options.rate else f"x{options.concurrency}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
