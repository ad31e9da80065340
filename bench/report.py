"""Figures of the runs: a table with a line for each load, and the ratios between them."""

import statistics
from dataclasses import dataclass

from load import Answer, Run


@dataclass(frozen=True, slots=True)
class Ratio:
    """One load's speed over another's, and what is wanted of it."""

    text: str
    above: str
    below: str
    wanted: float | None = None
    decode: bool = False  # of single streams, after their first token; else tokens of the whole load a second


def table(runs: dict[str, list[Run]]) -> str:
    """One line a load: latencies over all its rounds, speeds as the median of the rounds."""
    head = ["load", "tok/s", "decode tok/s", "TTFT ms p50", "p99", "between tokens ms p50", "p99", "tokens", "failed"]
    lines = [[name, *_figures(rounds)] for name, rounds in runs.items()]
    return aligned([head, *lines])


def ratios(runs: dict[str, list[Run]], wanted: list[Ratio]) -> str:
    """One line a ratio, taken round by round: median, and in brackets the lowest and the highest."""
    lines = [["ratio", "median", "range", "wanted"]]
    for ratio in wanted:
        if ratio.above not in runs or ratio.below not in runs:
            continue
        speed = decode_speed if ratio.decode else total_speed
        pairs = zip(runs[ratio.above], runs[ratio.below], strict=True)
        values = [speed(above) / below_speed for above, below in pairs if (below_speed := speed(below))]
        if not values:
            continue
        lines.append(
            [
                ratio.text,
                f"{statistics.median(values):.2f}",
                f"{min(values):.2f} - {max(values):.2f}",
                f">= {ratio.wanted:g}" if ratio.wanted else "",
            ]
        )
    return aligned(lines)


def errors(runs: dict[str, list[Run]]) -> str:
    """The different errors of each load, one a line; empty when nothing failed."""
    found = {
        f"{name}: {answer.error}"
        for name, rounds in runs.items()
        for run in rounds
        for answer in run.answers
        if answer.error
    }
    return "\n".join(sorted(found))


def total_speed(run: Run) -> float:
    """Tokens a second of the whole load."""
    return sum(answer.num_tokens for answer in run.answers) / run.duration_s


def decode_speed(run: Run) -> float:
    """Tokens a second of a single stream after its first token: the median of the requests."""
    speeds = [
        (answer.num_tokens - 1) / span
        for answer in run.answers
        if answer.num_tokens > 1 and (span := answer.token_times[-1] - answer.token_times[0]) > 0
    ]
    return statistics.median(speeds) if speeds else 0.0


def _figures(rounds: list[Run]) -> list[str]:
    answers = [answer for run in rounds for answer in run.answers if answer.error is None]
    num_failed = sum(len(run.answers) for run in rounds) - len(answers)
    first = [answer.token_times[0] for answer in answers]
    between = [gap for answer in answers for gap in _gaps(answer)]
    return [
        f"{statistics.median(total_speed(run) for run in rounds):.1f}",
        f"{statistics.median(decode_speed(run) for run in rounds):.1f}",
        _milliseconds(first, 50),
        _milliseconds(first, 99),
        _milliseconds(between, 50),
        _milliseconds(between, 99),
        str(sum(answer.num_tokens for answer in answers)),
        str(num_failed),
    ]


def _gaps(answer: Answer) -> list[float]:
    return [b - a for a, b in zip(answer.token_times, answer.token_times[1:], strict=False)]


def _milliseconds(seconds: list[float], percent: int) -> str:
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    return f"{ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] * 1000:.1f}"


def aligned(lines: list[list[str]]) -> str:
    """Columns side by side."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [lines[0], rule, *lines[1:]]
    )
