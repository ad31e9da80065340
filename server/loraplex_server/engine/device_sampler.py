"""Logits to tokens on a GPU: launches only; the host learns the tokens when it reads them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.choice import choose_rows
from loraplex_kernels.cuts import cut_scores
from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.draw import draw, temper
from loraplex_kernels.row_state import Chosen, Tops
from loraplex_kernels.sampling_inputs import Masks
from loraplex_kernels.scores import add_biases, add_to_lists, ban_tokens, copy_scores, penalise
from loraplex_kernels.top_tokens import given_tokens, top_tokens
from loraplex_server.engine.device_rows import DeviceRows
from loraplex_server.engine.device_sampling import DeviceBatch, SpecialRows, gather, ints, mask_lines, pack_bits
from loraplex_server.engine.fetching import FetchedResults
from loraplex_server.engine.guided import GuidedRows
from loraplex_server.engine.logits import green_list
from loraplex_server.engine.sampled_tokens import (
    PendingPrompt,
    PendingTokens,
    PromptLogprobs,
    ReadyTokens,
    SampledTokens,
)
from loraplex_server.engine.sampler import Sampler
from loraplex_server.engine.staging import Shape, send_arrays
from loraplex_server.messages import SamplingParams, TopLogprob


class DeviceSampler:
    """As `Sampler`, for logits on a GPU: a launch never waits for the device, and what follows needs no host.

    A batch of rows that take their best token as it comes is one kernel; rows that ask for more have a line in the
    scores, and kernels for what is asked in their batch. Draws are those of `Sampler`, up to the rounding of scores.
    A row with a grammar or a watermark may be launched only when its last token was read: the host computes from it
    what the row may choose or favours.
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
        self._rows = DeviceRows(num_rows, vocab_size, device)
        self.last_token_ids = self._rows.last_token_ids
        self._scores = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=device)
        self._logsums = torch.empty(num_rows, dtype=torch.float32, device=device)
        self._batch: DeviceBatch | None = None
        self._batch_key: tuple[list[int], list[int]] | None = None

    def add(self, row: int, params: SamplingParams, token_ids: list[int], num_output_tokens: int = 0) -> None:
        """As `TokenSampler.add`."""
        self._rows.add(row, params, token_ids, num_output_tokens)
        if params.guide is not None:
            self._guides.start(row, params.guide, token_ids[len(token_ids) - num_output_tokens :])
        self._batch = None

    def remove(self, row: int) -> None:
        """As `TokenSampler.remove`."""
        if self._rows.remove(row).params.guide is not None:
            self._guides.stop(row)
        self._batch = None

    def launch(self, logits: Tensor, rows: list[int], lines: list[int] | None = None) -> PendingTokens:
        """As `TokenSampler.launch`; the logits stay as they are."""
        if not rows:
            return ReadyTokens(SampledTokens([], [], []))
        self._rows.bring()
        batch = self._batch_of(rows, list(range(len(rows))) if lines is None else lines)
        special = batch.special
        shapes: list[Shape] = [((batch.num_plain,), np.int64), ((batch.num_plain,), np.float32)]
        if special is not None:
            num_tops = (0, 0) if special.tops is None else (len(special.tops.counts), max(special.tops.counts.values()))
            shapes += [((len(special.rows),), np.int64), ((len(special.rows),), np.float32)]
            shapes += [(num_tops[:1], np.int32), (num_tops, np.int32), (num_tops, np.float32)]
        results = FetchedResults(shapes, self._device)
        plain, rest = Chosen(*results.tensors[:2]), results.tensors[2:]
        if batch.num_plain:
            choose_rows(logits, batch.plain_lines, batch.plain_rows, self._rows.state, plain)
        problems: dict[int, str] = {}
        if special is not None:
            problems = self._choose(logits, special, Chosen(*rest[:2]), Tops(*rest[2:]))
        results.fetch()
        for row in batch.rows:
            row.num_output += 1
        return _Launched(self, batch, results, problems)

    def launch_prompt(self, logits: Tensor, token_ids: list[int], row: int) -> PendingPrompt:
        """As `TokenSampler.launch_prompt`."""
        num_tokens = len(token_ids)
        most = min(self._rows[row].params.num_prompt_logprobs, self._vocab_size)
        results = FetchedResults(
            [
                ((num_tokens,), np.float32), ((num_tokens,), np.float32), ((num_tokens,), np.int32),
                ((num_tokens, most), np.int32), ((num_tokens, most), np.float32),
            ],
            self._device,
        )  # fmt: skip
        logprobs, logsums, *tops = results.tensors
        given, lines, counts = send_arrays(
            [np.array(token_ids, dtype=np.int64), ints(range(num_tokens)), ints([most] * num_tokens)], self._device
        )
        given_tokens(logits, given, logsums, logprobs)
        if most:
            top_tokens(logits, lines, counts, logsums, Tops(*tops))
        results.fetch()
        return _LaunchedPrompt(results, most)

    def take_in(self, batch: DeviceBatch, token_ids: Sequence[int]) -> None:
        """Note the tokens that a batch's rows got, for what the host computes from them; in the order of its rows."""
        wanted: dict[int, int] = {}
        for row, token_id in zip(batch.rows, token_ids, strict=True):
            if token_id >= 0:
                row.last_token_id = token_id
                if row.params.guide is not None and self._rows.holds(row):
                    wanted[row.index] = token_id
        if wanted:
            self._guides.advance(wanted)

    def _choose(self, logits: Tensor, special: SpecialRows, chosen: Chosen, tops: Tops) -> dict[int, str]:
        """Choose for the rows that ask for more than their best token; returns why some can have none."""
        num_places, state = len(special.rows), self._rows.state
        scores, logsums = self._scores[:num_places], self._logsums[:num_places]
        masks, problems = self._masks(special)
        copy_scores(logits, special.lines, masks, scores)
        if special.bans is not None:
            self._reserve_outputs(special)
            state = self._rows.state
            ban_tokens(scores, special.bans, state)
        if special.biases is not None:
            add_biases(scores, special.biases)
        if special.watermarked:
            add_to_lists(scores, self._green_lists(special), self._delta)
        if special.penalties is not None:
            penalise(scores, special.penalties, state)
        temper(scores, special.draws, chosen, logsums)
        if special.cuts is not None:
            cut_scores(scores, special.cuts, chosen.token_ids)
        draw(scores, special.draws, state, chosen, logsums)
        if special.tops is not None:
            top_tokens(scores, special.tops.lines, special.tops.counts_on_device, logsums, tops)
        return problems

    def _masks(self, special: SpecialRows) -> tuple[Masks | None, dict[int, str]]:
        """The tokens that rows may choose from, and why rows with a grammar may choose none."""
        if not special.guided:
            return special.masks, {}
        guided, problems = self._guides.masks([special.rows[place].index for place in special.guided])
        places = sorted({*special.guided, *special.allowed})
        num_words = -(-self._vocab_size // 32)
        words = np.full((len(places), num_words), -1, dtype=np.int32)
        for place, mask in zip(special.guided, guided, strict=True):
            words[places.index(place)] = mask[:num_words]
        for place, allowed in special.allowed.items():
            words[places.index(place)] &= allowed
        return Masks(*send_arrays([words, mask_lines(places, len(special.rows))], self._device)), problems

    def _green_lists(self, special: SpecialRows) -> Masks:
        """The tokens that each watermarked row's last token favours."""
        lists = [
            pack_bits(green_list(special.rows[place].last_token_id, self._vocab_size, self._gamma), self._vocab_size)
            for place in special.watermarked
        ]
        lines = mask_lines(special.watermarked, len(special.rows))
        return Masks(*send_arrays([np.stack(lists), lines], self._device))

    def _reserve_outputs(self, special: SpecialRows) -> None:
        self._rows.reserve(max((row.num_output + 1 for row in special.rows if row.is_remembered), default=0))

    def _batch_of(self, rows: list[int], lines: list[int]) -> DeviceBatch:
        if self._batch is None or self._batch_key != (rows, lines):
            self._batch = gather([self._rows[row] for row in rows], lines, self._vocab_size, self._device)
            self._batch_key = (list(rows), list(lines))
        return self._batch

    @property
    def _guides(self) -> GuidedRows:
        assert self._guided_rows is not None, "a grammar came to a sampler without a vocabulary"
        return self._guided_rows


class _Launched:
    """Tokens that were launched on a GPU."""

    def __init__(
        self, sampler: DeviceSampler, batch: DeviceBatch, results: FetchedResults, problems: Mapping[int, str]
    ):
        self._sampler = sampler
        self._batch = batch
        self._results = results
        self._problems = dict(problems)

    def read(self) -> SampledTokens:
        """Wait for them."""
        batch = self._batch
        ids, logprobs, *rest = self._results.read()
        token_ids, values = ids.tolist(), logprobs.tolist()
        if rest:
            token_ids += rest[0].tolist()
            values += rest[1].tolist()
        self._sampler.take_in(batch, token_ids)
        num_rows = len(batch.rows)
        sampled = SampledTokens([0] * num_rows, [0.0] * num_rows, [[] for _ in range(num_rows)], self._problems)
        for position, token_id, logprob in zip(batch.order, token_ids, values, strict=True):
            sampled.token_ids[position] = token_id
            sampled.logprobs[position] = logprob
        if batch.special is not None and batch.special.tops is not None:
            for place, *found in zip(batch.special.tops.counts, *rest[2:], strict=True):
                position = batch.num_plain + place
                if token_ids[position] >= 0:
                    sampled.top_logprobs[batch.order[position]] = _sorted_tops(*found)
        return sampled


class _LaunchedPrompt:
    """Log-probabilities of a prompt that were launched on a GPU."""

    def __init__(self, results: FetchedResults, num_top: int):
        self._results = results
        self._num_top = num_top

    def read(self) -> PromptLogprobs:
        """Wait for them."""
        logprobs, _logsums, *tops = self._results.read()
        return PromptLogprobs(logprobs.tolist(), [*map(_sorted_tops, *tops)] if self._num_top else [])


def _sorted_tops(
    num_found: np.generic, token_ids: NDArray[np.generic], logprobs: NDArray[np.generic]
) -> list[TopLogprob]:
    """The best first, the lower id first where several are equal."""
    pairs = zip(token_ids[: int(num_found)].tolist(), logprobs[: int(num_found)].tolist(), strict=True)
    return [TopLogprob(*pair) for pair in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]


def sampler_kind(device: torch.device) -> type[Sampler] | type[DeviceSampler]:
    """The sampler for logits on that device."""
    return DeviceSampler if has_gpu_forms(device) else Sampler


def sampling_warm_ups() -> list[SamplingParams]:
    """Requests that together call every kernel of the sampler in each form that a step may need."""
    everything = SamplingParams(
        max_new_tokens=2, do_sample=True, top_k=1, top_p=0.5, min_p=0.1, typical_p=0.5, repetition_penalty=1.1,
        logit_bias={0: 1.0}, watermark=True, allowed_token_ids=(0, 1), bad_words=((0, 0),), num_logprobs=1,
        prompt_logprobs=True, num_prompt_logprobs=1,
    )  # fmt: skip
    return [SamplingParams(max_new_tokens=2, do_sample=True), everything]
