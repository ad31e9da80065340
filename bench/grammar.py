"""What a grammar costs: tokens a second with one and without, over HTTP, in alternating rounds; the ratio at the end.

8 requests at a time, greedy and sampled, to the demo model. Answers are equally long with a grammar and without: the
schema asks for more than fits, and without it the end token is ignored. The grammars of a load are all different, or
with --same all the same.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import peers
import report
from load import Dialect, Run, run_closed
from workload import Request, requests_for

from loraplex import demo

WARM_UP_TOKENS = 8
TARGET_RATIO = 0.8


def schema(number: int) -> dict[str, Any]:
    """A list of records without an end, with a field of its own for each number."""
    record = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            f"field_{number}": {"type": "integer"},
            "kind": {"enum": ["river", "mountain", "town", None]},
            "where": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3},
        },
        "required": ["name", f"field_{number}", "kind", "where"],
    }
    return {"type": "array", "items": record, "minItems": 1000}


def body(request: Request, num_tokens: int, *, has_grammar: bool, is_sampled: bool, is_same: bool) -> dict[str, Any]:
    """A body of POST /generate_stream."""
    parameters: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": is_sampled, "seed": 1}
    if has_grammar:
        number = 0 if is_same else int("".join(filter(str.isdigit, request.prompt)) or 0)
        parameters["grammar"] = {"type": "json", "value": schema(number)}
    else:
        parameters["ignore_eos_token"] = True
    return {"inputs": request.prompt, "parameters": parameters}


def main() -> int:
    """Start the server, run the rounds, print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight")
    parser.add_argument("--requests", type=int, default=16, help="requests of a load and round")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=3, help="times that each load is run")
    parser.add_argument("--same", action="store_true", help="one grammar for all requests")
    options = parser.parse_args()
    target = peers.loraplex(str(demo.prepare()), {}, [])
    loads = {
        f"{kind}, {'grammar' if has_grammar else 'free'}": (has_grammar, kind == "sampled")
        for kind in ("greedy", "sampled")
        for has_grammar in (False, True)
    }
    runs: dict[str, list[Run]] = {name: [] for name in loads}
    try:
        target.wait_until_ready()
        number = 1
        for round_number in range(options.rounds + 1):
            is_warm_up = round_number == 0
            for name, (has_grammar, is_sampled) in loads.items():
                requests = requests_for([None], "identical", options.requests, number)
                number += options.requests
                dialect = _dialect(has_grammar, is_sampled, options.same)
                length = WARM_UP_TOKENS if is_warm_up else options.max_new_tokens
                run = run_closed(target.host, target.port, dialect, requests, length, options.concurrency)
                if not is_warm_up:
                    runs[name].append(run)
    except peers.PeerFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    finally:
        target.stop()
    print(report.table(runs))
    if errors := report.errors(runs):
        print(errors)
        return 1
    return 0 if all([_print_ratio(kind, runs) for kind in ("greedy", "sampled")]) else 1


def _dialect(has_grammar: bool, is_sampled: bool, is_same: bool) -> Dialect:
    return replace(
        peers.TGI,
        body=lambda request, num_tokens: body(
            request, num_tokens, has_grammar=has_grammar, is_sampled=is_sampled, is_same=is_same
        ),
    )


def _print_ratio(kind: str, runs: dict[str, list[Run]]) -> bool:
    """The ratio round by round, and whether its median reaches what is asked of it."""
    ratios = [
        report.total_speed(guided) / report.total_speed(free)
        for guided, free in zip(runs[f"{kind}, grammar"], runs[f"{kind}, free"], strict=True)
    ]
    median = statistics.median(ratios)
    print(f"{kind}: tokens/s with a grammar / without = {median:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
          f"wanted: >= {TARGET_RATIO}")  # fmt: skip
    return median >= TARGET_RATIO


if __name__ == "__main__":
    sys.exit(main())
