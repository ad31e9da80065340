"""Logits to tokens on a GPU: launches only; the host learns the tokens when it reads them."""

import torch
from torch import Tensor

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_server.engine.guided import GuidedRows
from loraplex_server.engine.sampled_tokens import PendingPrompt, PendingTokens
from loraplex_server.engine.sampler import Sampler
from loraplex_server.messages import SamplingParams


class DeviceSampler:
    """As `Sampler`. The token that a row got last also lies on the device: `last_token_ids`, [rows] int64 by row.

    A row whose logits were broken keeps its last token there, so that what is computed from it stays in the vocabulary.
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
        self._sampler = Sampler(
            num_rows,
            vocab_size,
            device,
            watermark_gamma=watermark_gamma,
            watermark_delta=watermark_delta,
            guided_rows=guided_rows,
        )
        self._needs_host: list[bool] = [False] * num_rows
        self.last_token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def add(self, row: int, params: SamplingParams, token_ids: list[int], num_output_tokens: int = 0) -> None:
        """As `Sampler.add`."""
        self._sampler.add(row, params, token_ids, num_output_tokens)
        self._needs_host[row] = params.watermark or params.guide is not None
        self.last_token_ids[row] = token_ids[-1]

    def remove(self, row: int) -> None:
        """As `Sampler.remove`."""
        self._sampler.remove(row)

    def needs_last_tokens(self, rows: list[int]) -> bool:
        """Whether these rows can be launched only when their last tokens were read: grammars and watermarks."""
        return any(self._needs_host[row] for row in rows)

    def launch(self, logits: Tensor, rows: list[int], lines: list[int] | None = None) -> PendingTokens:
        """As `TokenSampler.launch`."""
        pending = self._sampler.launch(logits, rows, lines)
        for row, token_id in zip(rows, pending.read().token_ids, strict=True):
            if token_id >= 0:
                self.last_token_ids[row] = token_id
        return pending

    def launch_prompt(self, logits: Tensor, token_ids: list[int], row: int) -> PendingPrompt:
        """As `TokenSampler.launch_prompt`."""
        return self._sampler.launch_prompt(logits, token_ids, row)


def make_sampler(
    num_rows: int,
    vocab_size: int,
    device: torch.device,
    *,
    watermark_gamma: float,
    watermark_delta: float,
    guided_rows: GuidedRows | None = None,
) -> Sampler | DeviceSampler:
    """The sampler for logits on that device."""
    kind = DeviceSampler if has_gpu_forms(device) else Sampler
    return kind(
        num_rows,
        vocab_size,
        device,
        watermark_gamma=watermark_gamma,
        watermark_delta=watermark_delta,
        guided_rows=guided_rows,
    )
