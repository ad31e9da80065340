"""Logits to tokens: one pass over the whole batch, whatever each row's parameters are."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.choice import most_likely
from loraplex_server.engine import logits as processors
from loraplex_server.engine.guided import GuidedRows
from loraplex_server.engine.noise import TokenNoise, seed_keys, step_keys
from loraplex_server.engine.sampled_tokens import (
    NO_TOKEN,
    PendingPrompt,
    PendingTokens,
    PromptLogprobs,
    ReadyPrompt,
    ReadyTokens,
    SampledTokens,
)
from loraplex_server.engine.sampling_batch import (
    LOWEST_TEMPERATURE,
    Batch,
    Bias,
    Cut,
    Draws,
    Penalties,
    has_penalty,
)
from loraplex_server.engine.token_bans import TokenBans, has_bans
from loraplex_server.messages import SamplingParams, TopLogprob

_PROMPT_LOGPROB_ROWS = 64  # at a time: 49,152 float32 scores of a row take 192 KiB


class Sampler:
    """Chooses the next token of each row, by the parameters of the sequence that is in the row.

    A draw depends on the row's logits, its seed and its number of output tokens only: not on the rest of the
    batch, nor on the row's place, nor on what happened before a preemption.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        device: torch.device,
        *,
        watermark_gamma: float,
        watermark_delta: float,
        guided_rows: GuidedRows | None = None,
    ):
        self._vocab_size = vocab_size
        self._device = device
        self._gamma = watermark_gamma
        self._delta = watermark_delta
        self._guided_rows = guided_rows
        self._bans = TokenBans()
        self._noise = TokenNoise(vocab_size, device)
        self._params: list[SamplingParams | None] = [None] * num_rows
        self._num_prompt = np.zeros(num_rows, dtype=np.int64)
        self._num_tokens = np.zeros(num_rows, dtype=np.int64)
        # The tokens of the rows that penalties or the watermark look back on; it grows when the first comes.
        self._history = torch.zeros(num_rows, 0, dtype=torch.int64, device=device)
        self._scores = torch.empty(0, vocab_size, device=device)
        self._logprobs = torch.empty(0, vocab_size, device=device)
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._batch: Batch | None = None

    def add(self, row: int, params: SamplingParams, token_ids: list[int], num_output_tokens: int = 0) -> None:
        """Put a sequence into a free row: its tokens so far, of which the last `num_output_tokens` are output."""
        assert self._params[row] is None, f"row {row} is taken"
        self._params[row] = params
        self._num_tokens[row] = len(token_ids)
        self._num_prompt[row] = len(token_ids) - num_output_tokens
        if params.guide is not None:
            self._guides.start(row, params.guide, token_ids[len(token_ids) - num_output_tokens :])
        if has_bans(params):
            self._bans.start(row, params, token_ids[len(token_ids) - num_output_tokens :])
        if _looks_back(params):
            self._reserve_history(len(token_ids) + 1)
            self._history[row, : len(token_ids)] = torch.tensor(token_ids, device=self._device)
        self._batch = None

    def remove(self, row: int) -> None:
        """Free a row; what it knew is forgotten."""
        params = self._params_of(row)
        if params.guide is not None:
            self._guides.stop(row)
        if has_bans(params):
            self._bans.stop(row)
        self._params[row] = None
        self._batch = None

    def launch(self, logits: Tensor, rows: list[int], lines: list[int] | None = None) -> PendingTokens:
        """As `TokenSampler.launch`; all is done when it returns."""
        chosen = logits if lines is None or len(lines) == len(logits) else logits[lines]
        return ReadyTokens(self.sample(chosen, rows))

    def launch_prompt(self, logits: Tensor, token_ids: list[int], row: int) -> PendingPrompt:
        """As `TokenSampler.launch_prompt`; all is done when it returns."""
        found = PromptLogprobs(self.prompt_logprobs(logits, token_ids), self.prompt_top_logprobs(logits, row))
        return ReadyPrompt(found)

    def sample(self, logits: Tensor, rows: list[int]) -> SampledTokens:
        """Choose a token for each row and remember it.

        logits: [rows, vocab]; a row with a grammar or bans is cut to the tokens that it allows, the others are not
        changed.
        """
        batch = self._batch
        if batch is None or batch.rows != rows:
            batch = self._batch = self._gather(rows)
        if batch.banning:
            self._bans.cut(logits, batch.banning, [rows[position] for position in batch.banning])
        if not batch.guided:
            return self._sample(logits, batch)
        guided = [rows[position] for position in batch.guided]
        masks, problems = self._guides.masks(guided)
        processors.keep_allowed(logits, batch.guided, masks)
        sampled = self._sample(logits, batch)
        chosen = {row: sampled.token_ids[i] for i, row in zip(batch.guided, guided, strict=True)}
        self._guides.advance({row: token_id for row, token_id in chosen.items() if token_id != NO_TOKEN})
        return replace(sampled, problems=problems)

    def _sample(self, logits: Tensor, batch: Batch) -> SampledTokens:
        rows = batch.rows
        if batch.is_plain:
            token_ids, logprobs = most_likely(logits)
            chosen_ids: list[int] = token_ids.tolist()
            self._advance(batch, token_ids, [token_id != NO_TOKEN for token_id in chosen_ids])
            return SampledTokens(chosen_ids, logprobs.tolist(), [[] for _ in rows])

        self._reserve_scratch(len(rows))
        scores = logits
        if logits.dtype is not torch.float32 or batch.changes_scores:
            scores = self._scores[: len(rows)]
            processors.copy_as_float(logits, scores)
        self._look_back(scores, batch)

        token_ids = processors.argmax(scores)
        best = scores.gather(1, token_ids[:, None])
        is_sound = best.isfinite()
        all_sound = bool(is_sound.all())
        if not all_sound:
            scores = torch.where(is_sound, scores, 0)
            best = torch.where(is_sound, best, 0)
        if batch.draws:
            self._draw(scores, best, token_ids, batch.draws)
        logprobs = torch.log_softmax(scores, 1, out=self._logprobs[: len(rows)])
        chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
        sound = is_sound[:, 0].tolist()
        top_logprobs = _top_logprobs(logprobs, {i: n for i, n in batch.top_counts.items() if sound[i]})
        self._advance(batch, token_ids, sound)
        if not all_sound:
            token_ids.masked_fill_(~is_sound[:, 0], NO_TOKEN)
            chosen.masked_fill_(~is_sound[:, 0], 0)
        return SampledTokens(token_ids.tolist(), chosen.tolist(), top_logprobs)

    def prompt_logprobs(self, logits: Tensor, token_ids: list[int]) -> list[float]:
        """The log-probability of each given token under its row of raw logits. logits: [tokens, vocab]."""
        targets = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None]
        values: list[float] = []
        for start in range(0, len(token_ids), _PROMPT_LOGPROB_ROWS):
            part = slice(start, start + _PROMPT_LOGPROB_ROWS)
            logprobs = logits[part].float().log_softmax(dim=1)
            values += logprobs.gather(1, targets[part])[:, 0].tolist()
        return values

    def prompt_top_logprobs(self, logits: Tensor, row: int) -> list[list[TopLogprob]]:
        """The likeliest tokens of each line of raw logits, as many as the row's sequence asks for in its prompt."""
        number = self._params_of(row).num_prompt_logprobs
        found: list[list[TopLogprob]] = []
        for start in range(0, len(logits) if number else 0, _PROMPT_LOGPROB_ROWS):
            logprobs = logits[start : start + _PROMPT_LOGPROB_ROWS].float().log_softmax(dim=1)
            found += _top_logprobs(logprobs, dict.fromkeys(range(len(logprobs)), number))
        return found

    def _look_back(self, scores: Tensor, batch: Batch) -> None:
        """Bias, watermark and penalties, in place."""
        if batch.bias:
            scores.index_put_((batch.bias.positions, batch.bias.token_ids), batch.bias.values, accumulate=True)
        if batch.watermarked:
            rows = batch.row_index[batch.watermarked]
            previous = self._history[self._index(rows), self._index(self._num_tokens[rows] - 1)].tolist()
            part = scores[batch.watermarked]
            processors.add_watermark(part, previous, self._gamma, self._delta)
            scores[batch.watermarked] = part
        if batch.penalties:
            rows = batch.penalties.rows
            lengths = self._num_tokens[rows]
            part = scores[batch.penalties.index]
            processors.penalise(
                part,
                self._history[self._index(rows), : lengths.max()],
                self._index(lengths),
                batch.penalties.prompt_lengths,
                batch.penalties.repetition,
                batch.penalties.frequency,
                batch.penalties.presence,
                batch.penalties.count,
            )
            scores[batch.penalties.index] = part

    def _draw(self, scores: Tensor, best: Tensor, token_ids: Tensor, draws: Draws) -> None:
        """Temper and cut the sampled rows of `scores`, and draw their `token_ids`, both in place."""
        # With the maximum at 0 no temperature, however small, overflows.
        part = (scores[draws.index] - best[draws.index]).div_(draws.temperature)
        for cut in draws.cuts:
            if cut.index is None:
                cut.keep(part)
            else:
                some = part[cut.index]
                cut.keep(some)
                part[cut.index] = some
        scores[draws.index] = part
        positions = self._num_tokens[draws.rows] - self._num_prompt[draws.rows]
        noise = self._noise.exponential(step_keys(draws.keys, positions))
        token_ids[draws.index] = processors.argmax(part.exp_().div_(noise))

    def _advance(self, batch: Batch, token_ids: Tensor, sound: list[bool]) -> None:
        """Count one more token for each sound row, and remember it where penalties or the watermark need it."""
        if batch.remembered:
            rows = batch.row_index[batch.remembered]
            self._reserve_history(int(self._num_tokens[rows].max()) + 1)
            # In a row that is not sound the cell stays beyond what counts.
            self._history[self._index(rows), self._index(self._num_tokens[rows])] = token_ids[batch.remembered]
        for position in batch.banning:
            if sound[position]:
                self._bans.advance(batch.rows[position], int(token_ids[position]))
        self._num_tokens[batch.row_index] += np.array(sound, dtype=np.int64)
        self.last_token_ids.numpy()[batch.row_index] = np.maximum(token_ids.numpy(), 0)

    def _reserve_scratch(self, num_rows: int) -> None:
        # Fresh buffers of this size are fresh pages each time: 1 ms for 8 rows, more than the sampling itself.
        if num_rows > len(self._scores):
            shape = (min(2 * num_rows, len(self._params)), self._vocab_size)
            with torch.inference_mode(False):
                self._scores = torch.empty(shape, device=self._device)
                self._logprobs = torch.empty(shape, device=self._device)

    def _reserve_history(self, length: int) -> None:
        capacity = self._history.shape[1]
        if length > capacity:
            # A tensor made in inference mode could not be written to outside of it, and `add` may be called there.
            with torch.inference_mode(False):
                more = max(length, 2 * capacity) - capacity
                self._history = torch.nn.functional.pad(self._history, (0, more))

    def _gather(self, rows: list[int]) -> Batch:
        """Collect the parameters of the rows into tensors."""
        params = [self._params_of(row) for row in rows]
        row_index = np.array(rows, dtype=np.int64)
        penalised = [i for i, p in enumerate(params) if has_penalty(p)]
        sampled = [i for i, p in enumerate(params) if p.do_sample]
        return Batch(
            rows=list(rows),
            row_index=row_index,
            watermarked=[i for i, p in enumerate(params) if p.watermark],
            penalties=self._gather_penalties(penalised, row_index, params) if penalised else None,
            bias=self._gather_bias(params) if any(p.logit_bias for p in params) else None,
            draws=self._gather_draws(sampled, row_index, params) if sampled else None,
            remembered=[i for i, p in enumerate(params) if _looks_back(p)],
            guided=[i for i, p in enumerate(params) if p.guide is not None],
            banning=[i for i, p in enumerate(params) if has_bans(p)],
            top_counts={i: p.num_logprobs for i, p in enumerate(params) if p.num_logprobs},
        )

    def _gather_penalties(
        self, positions: list[int], row_index: NDArray[np.int64], params: list[SamplingParams]
    ) -> Penalties:
        some = [params[i] for i in positions]
        rows = row_index[positions]
        return Penalties(
            index=self._ints(positions),
            rows=rows,
            prompt_lengths=self._index(self._num_prompt[rows]),
            repetition=self._floats([p.repetition_penalty for p in some]),
            frequency=self._floats([p.frequency_penalty for p in some]),
            presence=self._floats([p.presence_penalty for p in some]),
            count=self._floats([p.count_penalty for p in some]) if any(p.count_penalty for p in some) else None,
        )

    def _gather_bias(self, params: list[SamplingParams]) -> Bias:
        entries = [(i, token_id, value) for i, p in enumerate(params) for token_id, value in p.logit_bias.items()]
        positions, token_ids, values = zip(*entries, strict=True)
        return Bias(self._ints([*positions]), self._ints([*token_ids]), self._floats([*values]))

    def _gather_draws(self, positions: list[int], row_index: NDArray[np.int64], params: list[SamplingParams]) -> Draws:
        some = [params[i] for i in positions]
        vocab_size = self._vocab_size
        top = [i for i, p in enumerate(some) if 0 < p.top_k < vocab_size or p.top_p < 1]
        floor = [i for i, p in enumerate(some) if p.min_p > 0]
        typical = [i for i, p in enumerate(some) if p.typical_p < 1]
        cuts: list[Cut] = []
        if top:
            top_k = self._ints([min(some[i].top_k or vocab_size, vocab_size) for i in top])
            top_p = self._floats([some[i].top_p for i in top])
            cuts.append(Cut(self._subset(top, some), partial(processors.keep_top, top_k=top_k, top_p=top_p)))
        if floor:
            min_p = self._floats([some[i].min_p for i in floor])
            cuts.append(Cut(self._subset(floor, some), partial(processors.keep_min_p, min_p=min_p)))
        if typical:
            typical_p = self._floats([some[i].typical_p for i in typical])
            cuts.append(Cut(self._subset(typical, some), partial(processors.keep_typical, typical_p=typical_p)))
        return Draws(
            index=self._ints(positions),
            rows=row_index[positions],
            keys=seed_keys([p.seed for p in some]),
            temperature=self._floats([max(p.temperature, LOWEST_TEMPERATURE) for p in some])[:, None],
            cuts=cuts,
        )

    def _subset(self, positions: list[int], of: list[SamplingParams]) -> Tensor | None:
        return None if len(positions) == len(of) else self._ints(positions)

    def _params_of(self, row: int) -> SamplingParams:
        params = self._params[row]
        assert params is not None, f"row {row} is free"
        return params

    @property
    def _guides(self) -> GuidedRows:
        assert self._guided_rows is not None, "a grammar came to a sampler without a vocabulary"
        return self._guided_rows

    def _index(self, values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _looks_back(params: SamplingParams) -> bool:
    return params.watermark or has_penalty(params)


def _top_logprobs(logprobs: Tensor, counts: dict[int, int]) -> list[list[TopLogprob]]:
    top_logprobs: list[list[TopLogprob]] = [[] for _ in range(len(logprobs))]
    if counts:
        found = processors.top_tokens(logprobs[list(counts)], list(counts.values()))
        for position, tokens in zip(counts, found, strict=True):
            top_logprobs[position] = [TopLogprob(*token) for token in tokens]
    return top_logprobs
