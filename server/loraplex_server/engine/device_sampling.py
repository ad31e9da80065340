"""The sampling parameters of a batch's rows as tensors on a GPU: gathered once for as long as the same rows come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.sampling_inputs import (
    DRAWS,
    IS_COUNTED,
    IS_REMEMBERED,
    Bans,
    Biases,
    Cuts,
    Draws,
    Masks,
    Penalties,
)
from loraplex_server.engine.noise import seed_keys
from loraplex_server.engine.sampling_batch import LOWEST_TEMPERATURE, has_penalty
from loraplex_server.engine.staging import send_arrays
from loraplex_server.engine.token_bans import has_bans
from loraplex_server.messages import SamplingParams

WORD_BITS = 32
ALWAYS = 2**31 - 1  # of a ban: it holds however long the output is

T = TypeVar("T")
Words = NDArray[np.int32]


@dataclass(slots=True)
class SampledRow:
    """A sequence in a row, as the host knows it."""

    index: int
    params: SamplingParams
    last_token_id: int  # the last that the host has read
    num_output: int  # with what was launched and not yet read

    @property
    def is_counted(self) -> bool:
        """Whether the device counts the row's tokens."""
        return has_penalty(self.params)

    @property
    def is_remembered(self) -> bool:
        """Whether the device keeps the row's output."""
        return any(len(word) > 1 for word in self.params.bad_words)

    @property
    def is_plain(self) -> bool:
        """Whether the row takes its best token as the scores come, and reports no others."""
        p = self.params
        is_masked = has_bans(p) or p.guide is not None
        return not (p.do_sample or is_masked or p.logit_bias or p.watermark or p.num_logprobs or has_penalty(p))


@dataclass(frozen=True, slots=True)
class WantedTops:
    """The rows that report likely tokens."""

    counts: dict[int, int]  # by place
    lines: Tensor  # int32: the places
    counts_on_device: Tensor  # int32


@dataclass(frozen=True, slots=True)
class SpecialRows:
    """The rows of a batch that ask for anything; a row's place among them is its line in the scores."""

    rows: list[SampledRow]
    lines: Tensor  # [places] int32, into the logits
    draws: Draws
    cuts: Cuts | None
    biases: Biases | None
    bans: Bans | None
    penalties: Penalties | None
    tops: WantedTops | None
    allowed: dict[int, Words]  # by place: tokens that the row may choose in any step
    masks: Masks | None  # the same on the device, where nothing is added in each step
    guided: list[int]  # places of the rows with a grammar
    watermarked: list[int]  # places


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """A set of rows, those that take their best token first."""

    order: list[int]  # of the rows as they were asked for: the plain ones, then the special ones
    rows: list[SampledRow]  # in that order
    num_plain: int
    plain_lines: Tensor  # int32, into the logits
    plain_rows: Tensor  # int32
    special: SpecialRows | None


def gather(rows: Sequence[SampledRow], lines: Sequence[int], vocab_size: int, device: torch.device) -> DeviceBatch:
    """Bring the parameters of the rows to the device, by one copy that nobody waits for."""
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    special = [i for i, row in enumerate(rows) if not row.is_plain]
    cargo = _Cargo()
    plain_lines = cargo.add(_only, ints([lines[i] for i in plain]))
    plain_rows = cargo.add(_only, ints([rows[i].index for i in plain]))
    special_rows = _special_rows(cargo, [rows[i] for i in special], [lines[i] for i in special], vocab_size)
    cargo.send(device)
    order = plain + special
    return DeviceBatch(
        order, [rows[i] for i in order], len(plain), plain_lines(), plain_rows(), special_rows() if special else None
    )


def ints(values: Sequence[int]) -> NDArray[np.int32]:
    """A column of numbers."""
    return np.array(values, dtype=np.int32)


def pack_bits(token_ids: Sequence[int] | NDArray[np.int64], vocab_size: int) -> Words:
    """A set of tokens as bits, [words] int32: that of token i is bit i, the lowest bit of a word first."""
    bits = np.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, dtype=np.uint8)
    bits[np.asarray(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def mask_lines(places: Sequence[int], num_places: int) -> NDArray[np.int32]:
    """The line of each place's mask, where the masks are those of `places`; -1 for none."""
    lines = np.full(num_places, -1, dtype=np.int32)
    lines[list(places)] = np.arange(len(places))
    return lines


class _Cargo:
    """Columns on their way to the device in one copy, and what is made of them there."""

    def __init__(self) -> None:
        self._columns: list[NDArray[np.generic]] = []
        self._sent: tuple[Tensor, ...] = ()

    def add(self, make: Callable[..., T], *columns: NDArray[np.generic]) -> Callable[[], T]:
        """Take the columns along; what is returned gives, after `send`, `make` of them on the device."""
        start = len(self._columns)
        self._columns += columns
        return lambda: make(*self._sent[start : start + len(columns)])

    def send(self, device: torch.device) -> None:
        """Begin the copy."""
        self._sent = send_arrays(self._columns, device)


def _special_rows(
    cargo: _Cargo, rows: list[SampledRow], lines: list[int], vocab_size: int
) -> Callable[[], SpecialRows]:
    params = [row.params for row in rows]
    on_device = cargo.add(_only, ints(lines))
    draws = cargo.add(
        Draws,
        ints([row.index for row in rows]),
        ints([_flags(row) for row in rows]),
        _floats([max(p.temperature, LOWEST_TEMPERATURE) for p in params]),
        seed_keys([p.seed for p in params]).view(np.int64),
    )
    cuts, biases, bans = _cuts(cargo, params, vocab_size), _biases(cargo, params), _bans(cargo, rows)
    penalties, tops = _penalties(cargo, rows), _tops(cargo, params, vocab_size)
    allowed = {i: pack_bits(p.allowed_token_ids, vocab_size) for i, p in enumerate(params) if p.allowed_token_ids}
    guided = [i for i, p in enumerate(params) if p.guide is not None]
    masks: Callable[[], Masks | None] = _nothing
    if allowed and not guided:
        masks = cargo.add(Masks, np.stack(list(allowed.values())), mask_lines(list(allowed), len(rows)))
    return lambda: SpecialRows(
        rows=rows,
        lines=on_device(),
        draws=draws(),
        cuts=cuts(),
        biases=biases(),
        bans=bans(),
        penalties=penalties(),
        tops=tops(),
        allowed=allowed,
        masks=masks(),
        guided=guided,
        watermarked=[i for i, p in enumerate(params) if p.watermark],
    )


def _flags(row: SampledRow) -> int:
    return DRAWS * row.params.do_sample + IS_COUNTED * row.is_counted + IS_REMEMBERED * row.is_remembered


def _cuts(cargo: _Cargo, params: list[SamplingParams], vocab_size: int) -> Callable[[], Cuts | None]:
    places = [i for i, p in enumerate(params) if _has_cut(p, vocab_size)]
    if not places:
        return _nothing
    some = [params[i] for i in places]
    with np.errstate(divide="ignore"):
        least = np.log(_floats([p.min_p for p in some]))  # 0 gives -inf: off
    return cargo.add(
        Cuts,
        ints(places),
        ints([min(p.top_k or vocab_size, vocab_size) for p in some]),
        _floats([p.top_p for p in some]),
        least,
        _floats([p.typical_p for p in some]),
    )


def _has_cut(p: SamplingParams, vocab_size: int) -> bool:
    return p.do_sample and (0 < p.top_k < vocab_size or p.top_p < 1 or p.min_p > 0 or p.typical_p < 1)


def _biases(cargo: _Cargo, params: list[SamplingParams]) -> Callable[[], Biases | None]:
    entries = [(i, token_id, value) for i, p in enumerate(params) for token_id, value in p.logit_bias.items()]
    if not entries:
        return _nothing
    places, token_ids, values = zip(*entries, strict=True)
    return cargo.add(Biases, ints(places), ints(token_ids), _floats(values))


def _bans(cargo: _Cargo, rows: list[SampledRow]) -> Callable[[], Bans | None]:
    entries: list[tuple[int, int, int, int, tuple[int, ...]]] = []
    for place, row in enumerate(rows):
        p = row.params
        if p.min_new_tokens:
            entries += [(place, row.index, token_id, p.min_new_tokens, ()) for token_id in p.held_back_token_ids]
        entries += [(place, row.index, word[-1], ALWAYS, word[:-1]) for word in p.bad_words]
    if not entries:
        return _nothing
    places, indices, token_ids, until, runs = zip(*entries, strict=True)
    lengths = [len(run) for run in runs]
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    together = [token_id for run in runs for token_id in run] or [0]  # something to point to
    make = partial(Bans, longest=max(lengths))
    columns = (places, indices, token_ids, until, starts, lengths, together)
    return cargo.add(make, *(ints(column) for column in columns))


def _penalties(cargo: _Cargo, rows: list[SampledRow]) -> Callable[[], Penalties | None]:
    places = [i for i, row in enumerate(rows) if row.is_counted]
    if not places:
        return _nothing
    some = [rows[i].params for i in places]
    return cargo.add(
        Penalties,
        ints(places),
        ints([rows[i].index for i in places]),
        _floats([p.repetition_penalty for p in some]),
        _floats([p.frequency_penalty for p in some]),
        _floats([p.presence_penalty for p in some]),
        _floats([p.count_penalty for p in some]),
    )


def _tops(cargo: _Cargo, params: list[SamplingParams], vocab_size: int) -> Callable[[], WantedTops | None]:
    counts = {i: min(p.num_logprobs, vocab_size) for i, p in enumerate(params) if p.num_logprobs}
    if not counts:
        return _nothing
    return cargo.add(partial(WantedTops, counts), ints(list(counts)), ints(list(counts.values())))


def _floats(values: Sequence[float]) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def _only(tensor: Tensor) -> Tensor:
    return tensor


def _nothing() -> None:
    return None
