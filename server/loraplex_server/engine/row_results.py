"""What a step gives each of its rows: launched as soon as the logits are, read when the host wants the tokens."""

from dataclasses import dataclass, field

from torch import Tensor

from loraplex_server.engine.sampled_tokens import PendingPrompt, PendingTokens, TokenSampler
from loraplex_server.engine.step import StepPlan
from loraplex_server.messages import TopLogprob


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row of a step gave. `target_logprobs` belong to the plan's target_ids.

    A token_id of -1: there was no finite score to choose by; `problem` says why, where it is known.
    """

    token_id: int | None = None
    logprob: float = 0.0
    top_logprobs: list[TopLogprob] = field(default_factory=list)
    target_logprobs: list[float] = field(default_factory=list)
    target_top_logprobs: list[list[TopLogprob]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class PendingRows:
    """The results of a step that was launched."""

    rows: list[int]  # those that sample
    tokens: PendingTokens | None  # of `rows`
    prompts: dict[int, PendingPrompt]  # by row

    def read(self) -> dict[int, RowResult]:
        """Wait for the results, by row. Once, and in the order of the steps."""
        prompts = {row: pending.read() for row, pending in self.prompts.items()}
        results = {
            row: RowResult(target_logprobs=found.logprobs, target_top_logprobs=found.top_logprobs)
            for row, found in prompts.items()
        }
        if self.tokens is not None:
            sampled = self.tokens.read()
            for row, token_id, logprob, top in zip(
                self.rows, sampled.token_ids, sampled.logprobs, sampled.top_logprobs, strict=True
            ):
                targets = results.get(row, RowResult())
                results[row] = RowResult(
                    token_id, logprob, top, targets.target_logprobs, targets.target_top_logprobs,
                    sampled.problems.get(row),
                )  # fmt: skip
        return results


def launch_choice(sampler: TokenSampler, plan: StepPlan, logits: Tensor) -> PendingRows:
    """Begin to choose tokens for the rows that sample, and log-probabilities for those with targets.

    logits: [S, vocab], the lines that the plan's sequences give one after the other; they may be changed.
    """
    rows: list[int] = []
    lines: list[int] = []
    prompts: dict[int, PendingPrompt] = {}
    line = 0
    for sequence in plan.sequences:
        if sequence.target_ids:
            wanted = logits[line : line + len(sequence.target_ids)]
            prompts[sequence.row] = sampler.launch_prompt(wanted, sequence.target_ids, sequence.row)
        line += len(sequence.token_ids) if sequence.target_ids else int(sequence.samples)
        if sequence.samples:
            rows.append(sequence.row)
            lines.append(line - 1)
    return PendingRows(rows, sampler.launch(logits, rows, lines) if rows else None, prompts)
