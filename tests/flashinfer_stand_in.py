"""A stand-in for FlashInfer without a GPU: what `run` gives depends on what `plan` was given, and on nothing else.

The parameters of `__init__`, `plan` and `run`, their order and defaults are those of
`flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper` in the wheel flashinfer_python-0.7.2.post1, compared by reading
both with `ast`. So a call that this class refuses to bind, the library would refuse too. What they mean is from the
wheel's docstrings and CUDA sources: `window_left` counts the keys before a query's own (variants.cuh), queries are the
last of a sequence's tokens, keys and values have equal strides (batch_prefill_sm90.cu), the plan travels through one
pinned buffer of the wrapper's that each call writes anew (scheduler.cuh).
"""

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_kernels import flashinfer_prompts
from loraplex_kernels.gpu import attention

MOST_NUMBERS = 1 << 12  # of a plan


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, qo_indptr_buf=None,
        paged_kv_indptr_buf=None, paged_kv_indices_buf=None, paged_kv_last_page_len_buf=None, custom_mask_buf=None,
        mask_indptr_buf=None, backend="auto", jit_args=None, jit_kwargs=None, variant_owns_mask=False,
    ) -> None:  # fmt: skip
        assert kv_layout == "NHD" and backend == "auto" and not use_cuda_graph
        self._device = float_workspace_buffer.device
        is_gpu = self._device.type == "cuda"
        self._pinned = torch.zeros(MOST_NUMBERS, dtype=torch.int32, pin_memory=is_gpu)
        self._workspace = torch.zeros(MOST_NUMBERS, dtype=torch.int32, device=self._device)
        self.num_runs = 0

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None, o_data_type=None,
        non_blocking=True, prefix_len_ptr=None, token_pos_in_items_ptr=None, token_pos_in_items_len=0,
        max_item_len_ptr=None, seq_lens=None, seq_lens_q=None, block_tables=None, max_token_per_sequence=None,
        max_sequence_kv=None, fixed_split_size=None, disable_split_kv=False, uniform_q_len=None,
    ) -> None:  # fmt: skip
        assert causal and pos_encoding_mode == "NONE" and non_blocking and q_data_type == kv_data_type
        host = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(one.dtype == torch.int32 and one.device.type == "cpu" for one in host)
        assert self._device.type != "cuda" or all(one.is_pinned() for one in host)
        starts, blocks = paged_kv_indptr.tolist(), paged_kv_indices.tolist()
        own = [blocks[start:end] for start, end in pairwise(starts)]
        width = max(len(one) for one in own)
        table = [one + [0] * (width - len(one)) for one in own]
        lengths = [
            (len(one) - 1) * page_size + last for one, last in zip(own, paged_kv_last_page_len.tolist(), strict=True)
        ]
        assert seq_lens.tolist() == lengths
        numbers = torch.tensor([*qo_indptr.tolist(), *lengths, *(block for row in table for block in row)])
        self._pinned[: len(numbers)] = numbers
        self._workspace.copy_(self._pinned, non_blocking=True)
        count = len(lengths)
        self._query_start = self._workspace[: count + 1]
        self._seq_lens = self._workspace[count + 1 : 2 * count + 1]
        self._table = self._workspace[2 * count + 1 : len(numbers)].view(count, width)
        self._max_query_len = max(qo_indptr.diff().tolist())
        self._heads = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        window = attention.NO_WINDOW if window_left < 0 else window_left + 1
        self._score = (head_dim_qk**-0.5 if sm_scale is None else sm_scale, window, logits_soft_cap)
        self._num_rows = int(qo_indptr[-1])

    def run(
        self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None,
        return_lse=False, lse_base="log2", lse_layout="NH", enable_pdl=None, window_left=None, sinks=None,
        kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, use_fp16_softmax=None, uses_spcompress=None,
    ) -> Tensor:  # fmt: skip
        num_heads, num_kv_heads, head_dim, page_size = self._heads
        keys, values = paged_kv_cache
        assert q.shape == out.shape == (self._num_rows, num_heads, head_dim) and q.stride(2) == 1
        assert keys.shape[1:] == values.shape[1:] == (page_size, num_kv_heads, head_dim)
        assert keys.stride() == values.stride() and out.is_contiguous()
        cell = keys.stride(1)
        assert values.storage_offset() - keys.storage_offset() == cell // 2
        cache = keys.as_strided((keys.shape[0] * page_size, cell), (cell, 1))
        found = attention.chunk_attention(
            q.flatten(1), cache, self._table, self._query_start, self._seq_lens, self._max_query_len, page_size,
            num_kv_heads, *self._score,
        )  # fmt: skip
        out.copy_(found.view(out.shape))
        self.num_runs += 1
        return out


class FlashInferStandIn:
    """What `import flashinfer` gives; `wrappers` are those that were made, for models of any heads and types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wrappers: list[BatchPrefillWithPagedKVCacheWrapper] = []
        monkeypatch.setitem(sys.modules, "flashinfer", self)  # type: ignore[arg-type]
        monkeypatch.setattr(flashinfer_prompts, "HEAD_DIMS", range(1, 257))
        monkeypatch.setattr(flashinfer_prompts, "DTYPES", (torch.float32,))
        monkeypatch.setattr(flashinfer_prompts, "WORKSPACE_BYTES", 16)

    def BatchPrefillWithPagedKVCacheWrapper(self, *arguments: Any, **settings: Any) -> Any:
        self.wrappers.append(BatchPrefillWithPagedKVCacheWrapper(*arguments, **settings))
        return self.wrappers[-1]
