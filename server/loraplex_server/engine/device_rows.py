"""The sequences in the rows of a GPU's sampler: what the host knows of them, and what lies on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.row_state import RowState
from loraplex_server.engine.device_sampling import SampledRow
from loraplex_server.engine.staging import send_arrays
from loraplex_server.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sequence that the device does not know yet."""

    row: SampledRow
    token_ids: NDArray[np.int64]
    num_prompt: int


class DeviceRows:
    """Rows by their index. What enters is brought to the device with the next launch, in one copy."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self._device = device
        self._vocab_size = vocab_size
        self._rows: list[SampledRow | None] = [None] * num_rows
        self._entering: dict[int, _Entry] = {}
        self._lengths = torch.zeros(2, num_rows, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._counts = torch.zeros(num_rows, 2, vocab_size, dtype=torch.int32, device=device)
        self._outputs = torch.zeros(num_rows, 1, dtype=torch.int32, device=device)

    @property
    def state(self) -> RowState:
        """What the kernels read and advance."""
        return RowState(self.last_token_ids, self._lengths[0], self._lengths[1], self._counts, self._outputs)

    def __getitem__(self, index: int) -> SampledRow:
        row = self._rows[index]
        assert row is not None, f"row {index} is free"
        return row

    def holds(self, row: SampledRow) -> bool:
        """Whether that sequence is still in its row."""
        return self._rows[row.index] is row

    def add(self, index: int, params: SamplingParams, token_ids: list[int], num_output_tokens: int) -> None:
        """A sequence enters a free row."""
        assert self._rows[index] is None, f"row {index} is taken"
        row = self._rows[index] = SampledRow(index, params, token_ids[-1], num_output_tokens)
        self._entering[index] = _Entry(row, np.array(token_ids, dtype=np.int64), len(token_ids) - num_output_tokens)

    def remove(self, index: int) -> SampledRow:
        """The sequence leaves its row."""
        row = self[index]
        self._rows[index] = None
        self._entering.pop(index, None)
        return row

    def bring(self) -> None:
        """Bring those that have entered to the device."""
        if not self._entering:
            return
        entries = list(self._entering.values())
        self._entering = {}
        lengths = np.array([[len(entry.token_ids), entry.num_prompt] for entry in entries], dtype=np.int32).T
        listed = [entry for entry in entries if entry.row.is_counted or entry.row.is_remembered]
        indices, sent_lengths, last, *token_ids = send_arrays(
            [
                np.array([entry.row.index for entry in entries], dtype=np.int64),
                lengths,
                np.array([entry.token_ids[-1] for entry in entries], dtype=np.int64),
                *(entry.token_ids for entry in listed),
            ],
            self._device,
        )
        self._lengths.index_copy_(1, indices, sent_lengths)
        self.last_token_ids.index_copy_(0, indices, last)
        for entry, ids in zip(listed, token_ids, strict=True):
            if entry.row.is_counted:
                self._count(entry, ids)
            if entry.row.is_remembered and entry.row.num_output:
                self.reserve(entry.row.num_output)
                self._outputs[entry.row.index, : entry.row.num_output] = ids[entry.num_prompt :]

    def reserve(self, num_output: int) -> None:
        """Make room for outputs of that many tokens."""
        capacity = self._outputs.shape[1]
        if num_output > capacity:
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self._outputs = torch.nn.functional.pad(self._outputs, (0, max(num_output, 2 * capacity) - capacity))

    def _count(self, entry: _Entry, token_ids: Tensor) -> None:
        counts = self._counts[entry.row.index]
        ones = torch.ones_like(token_ids, dtype=torch.int32)
        counts.zero_()
        counts[0].scatter_add_(0, token_ids[: entry.num_prompt], ones[: entry.num_prompt])
        counts[1].scatter_add_(0, token_ids[entry.num_prompt :], ones[entry.num_prompt :])
