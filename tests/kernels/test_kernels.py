"""Each operation's fast form against the readable reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex_kernels.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from loraplex_kernels.attention import (
    capped_attention,
    decode_attention,
    is_decode_fast,
    order_cells,
    paged_attention,
)
from loraplex_kernels.choice import most_likely
from loraplex_kernels.cpu import attention as cpu_attention
from loraplex_kernels.cpu.linear import FEW_ROWS
from loraplex_kernels.kv_cache import rotate_and_store
from loraplex_kernels.linear import PackedWeight, linear, pack_weight
from loraplex_kernels.norm import rms_norm, rms_norm_groups
from loraplex_kernels.reference import activation as reference_activation
from loraplex_kernels.reference import attention as reference_attention
from loraplex_kernels.reference import choice as reference_choice
from loraplex_kernels.reference import kv_cache as reference_kv_cache
from loraplex_kernels.reference import linear as reference_linear
from loraplex_kernels.reference import norm as reference_norm

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def assert_near(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == truth.dtype == dtype
    assert ours.shape == truth.shape
    assert (ours.float() - truth.float()).abs().max() <= DTYPES[dtype] * max(1.0, float(truth.float().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 130])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_addend", [False, True])
def test_a_packed_linear_equals_a_plain_one(dtype: torch.dtype, rows: int, has_bias: bool, has_addend: bool) -> None:
    x, weight = torch.randn(rows, 48, dtype=dtype), torch.randn(33, 48, dtype=dtype) / 7
    bias = torch.randn(33, dtype=dtype) if has_bias else None
    addend = torch.randn(rows, 33, dtype=dtype) if has_addend else None
    kept = None if addend is None else addend.clone()
    with torch.inference_mode():
        assert_near(
            linear(x, pack_weight(weight), bias, addend), reference_linear.linear(x, weight, bias, addend), dtype
        )
    assert addend is None or kept is None or torch.equal(addend, kept)


@pytest.mark.parametrize("rows", [*range(1, 10), FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(("out_size", "in_size"), [(64, 64), (192, 96), (4224, 32)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_addend", [False, True])
def test_few_rows_of_bfloat16_equal_sums_in_float64(
    rows: int, out_size: int, in_size: int, has_bias: bool, has_addend: bool
) -> None:
    x, weight = torch.randn(rows, in_size).bfloat16(), torch.randn(out_size, in_size).bfloat16()
    bias = torch.randn(out_size).bfloat16() if has_bias else None
    addend = torch.randn(rows, out_size).bfloat16() if has_addend else None
    truth = x.double() @ weight.double().T
    truth += 0 if bias is None else bias.double()
    truth += 0 if addend is None else addend.double()
    with torch.inference_mode():
        ours = linear(x, pack_weight(weight), bias, addend).double()
    # One rounding to 8 bits, of a sum whose terms were rounded to 24.
    assert ((ours - truth).abs() <= truth.abs() * 2**-8 + 1e-4).all()


def test_a_row_gives_the_same_whatever_rows_are_beside_it() -> None:
    x, weight = torch.randn(FEW_ROWS, 96).bfloat16(), pack_weight(torch.randn(128, 96).bfloat16())
    if not (isinstance(weight, PackedWeight) and weight.blocks):
        pytest.skip("this processor multiplies few rows by oneDNN")
    with torch.inference_mode():
        alone = [linear(row, weight) for row in x.split(1)]
        for count in range(1, FEW_ROWS + 1):
            assert torch.equal(linear(x[:count], weight), torch.cat(alone[:count]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("size", [0.001, 1.0, 100.0])
def test_rms_norm_equals_its_reference(dtype: torch.dtype, rows: int, size: float) -> None:
    x, weight = torch.randn(rows, 64, dtype=dtype) * size, (torch.rand(64) + 0.5).to(dtype)
    with torch.inference_mode():
        ours = rms_norm(x, weight, 1e-5)
        assert_near(ours, reference_norm.rms_norm(x, weight, 1e-5), dtype)
        assert_near(ours, F.rms_norm(x.float(), (64,), weight.float(), 1e-5).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "group_size"), [(1, 8), (5, 8), (5, 24)])
def test_rms_norm_of_groups_equals_its_reference_and_touches_no_other_column(
    dtype: torch.dtype, rows: int, group_size: int
) -> None:
    given, weight = torch.randn(rows, 40, dtype=dtype), (torch.rand(24) + 0.5).to(dtype)
    ours, truth = given.clone(), given.clone()
    rms_norm_groups(ours.narrow(1, 8, 24), weight, group_size, 1e-5)
    reference_norm.rms_norm_groups(truth.narrow(1, 8, 24), weight, group_size, 1e-5)
    assert_near(ours, truth, dtype)
    groups, group_weights = given[:, 8:32].float().view(rows, -1, group_size), weight.float().view(-1, group_size)
    plain = F.rms_norm(groups, (group_size,), None, 1e-5) * group_weights
    assert_near(ours[:, 8:32], plain.view(rows, -1).to(dtype), dtype)
    assert torch.equal(ours[:, :8], given[:, :8]) and torch.equal(ours[:, 32:], given[:, 32:])


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["norm", "activation"])
def test_what_is_not_a_number_stays_so_and_in_its_row(dtype: torch.dtype, operation: str) -> None:
    x = torch.randn(3, 8, dtype=dtype)
    x[1, 2] = float("nan")
    out = rms_norm(x, torch.ones(8, dtype=dtype), 1e-5) if operation == "norm" else silu_and_mul(x)
    assert out[1].isnan().any() and out[[0, 2]].isfinite().all()


def angles(tokens: int, turned: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(tokens, turned // 2)
    cos, sin = half.cos(), half.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def test_each_pair_of_a_head_is_turned_by_its_angle() -> None:
    half = torch.randn(3, 2)
    qkv = torch.randn(3, 4 * 4)
    heads = qkv.view(3, 4, 4)[:, :3].clone()
    turned = torch.complex(heads[..., :2], heads[..., 2:]) * torch.polar(torch.ones(3, 1, 2), half.unsqueeze(1))
    cos, sin = torch.cat((half.cos(), half.cos()), -1), torch.cat((-half.sin(), half.sin()), -1)
    rotate_and_store(qkv, cos, sin, torch.zeros(3, 8), torch.arange(3), num_heads=2, head_dim=4)
    assert torch.allclose(qkv.view(3, 4, 4)[:, :3], torch.cat((turned.real, turned.imag), -1), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [8, 4])
@pytest.mark.parametrize("tokens", [1, 7])
def test_rotating_and_storing_equals_its_reference_and_touches_no_other_cell(
    dtype: torch.dtype, turned: int, tokens: int
) -> None:
    qkv = torch.randn(tokens, (6 + 2 * 3) * 8, dtype=dtype)
    cos, sin = angles(tokens, turned, dtype)
    cells = torch.randperm(20)[:tokens]
    given = torch.randn(20, 2 * 3 * 8, dtype=dtype)
    results = []
    for operation in (rotate_and_store, reference_kv_cache.rotate_and_store):
        changed, cache = qkv.clone(), given.clone()
        operation(changed, cos, sin, cache, cells, 6, 8)
        results.append((changed, cache))
    (ours, our_cache), (truth, true_cache) = results
    assert_near(ours, truth, dtype)
    assert_near(our_cache, true_cache, dtype)
    assert torch.equal(ours[:, -3 * 8 :], qkv[:, -3 * 8 :])
    assert torch.equal(our_cache[cells], ours[:, 6 * 8 :])
    others = torch.ones(20, dtype=torch.bool)
    others[cells] = False
    assert torch.equal(our_cache[others], given[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.1, 5.0, 200.0])
def test_silu_and_mul_gates_the_second_half_by_the_first(dtype: torch.dtype, size: float) -> None:
    gate_up = torch.randn(3, 10).to(dtype) * size
    gate, up = gate_up.float().chunk(2, -1)
    ours = silu_and_mul(gate_up.clone())
    assert_near(ours, (gate * torch.sigmoid(gate) * up).to(dtype), dtype)
    assert_near(ours, reference_activation.silu_and_mul(gate_up.clone()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("num_heads", [3, 6])
@pytest.mark.parametrize(("num_sequences", "num_keys"), [(1, 1), (1, 40), (4, 40), (3, 300)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_paged_attention_equals_its_reference(
    dtype: torch.dtype, num_queries: int, num_heads: int, num_sequences: int, num_keys: int, has_mask: bool
) -> None:
    num_kv_heads, head_dim = 3, 8
    cache = torch.randn(512, 2 * num_kv_heads * head_dim, dtype=dtype)
    wide = torch.randn(num_sequences * num_queries, num_heads * head_dim + 10, dtype=dtype)
    queries = wide[:, : num_heads * head_dim].view(num_sequences, num_queries, num_heads * head_dim)
    cells = torch.randint(0, 512, (num_sequences, num_keys))
    mask = None
    if has_mask:
        hidden = torch.rand(num_sequences, num_queries, num_keys) > 0.6
        hidden[:, :, 0] = False
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    with torch.inference_mode():
        ordered = order_cells(cells, num_queries, num_kv_heads, dtype)
        ours = paged_attention(queries, cache, ordered, mask, num_kv_heads, 0.3)
        assert torch.equal(ours, paged_attention(queries, cache, cells, mask, num_kv_heads, 0.3)) or ordered.dim() == 3
        truth = reference_attention.paged_attention(queries, cache, cells, mask, num_kv_heads, 0.3)
    assert_near(ours, truth, dtype)


def test_keys_that_lie_one_after_the_other_need_no_cells() -> None:
    cache, queries = torch.randn(40, 2 * 3 * 8), torch.randn(1, 2, 6 * 8)
    run = torch.arange(10, 35).unsqueeze(0)
    for attend in (paged_attention, reference_attention.paged_attention):
        by_cells = attend(queries, cache, run, None, 3, 0.3)
        assert torch.allclose(attend(queries, cache[10:35], None, None, 3, 0.3), by_cells, atol=1e-6)


def test_rows_of_single_heads_name_the_same_cells() -> None:
    cells = torch.randint(0, 100, (2, 300))
    rows = order_cells(cells, 1, 3, torch.bfloat16)
    assert order_cells(cells[:, :9], 2, 3, torch.bfloat16).dim() == 2
    assert order_cells(cells, 1, 3, torch.float32) is cells
    cache, queries = torch.randn(100, 48).bfloat16(), torch.randn(2, 1, 24).bfloat16()
    truth = reference_attention.paged_attention(queries, cache, cells, None, 3, 0.3)
    assert torch.equal(reference_attention.paged_attention(queries, cache, rows, None, 3, 0.3), truth)


def test_many_queries_are_attended_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = torch.randint(0, 100, (2, 90))
    cache, queries = torch.randn(100, 48).bfloat16(), torch.randn(2, 50, 48).bfloat16()
    hidden = torch.arange(90) > torch.arange(40, 90).unsqueeze(1)
    mask = torch.zeros(2, 50, 90).masked_fill_(hidden, float("-inf")).bfloat16()
    rows = order_cells(cells, 50, 3, torch.bfloat16)
    for given in (mask, None):
        whole = paged_attention(queries, cache, rows, given, 3, 0.3)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_attention, "MAX_BATCHED_SCORES", 2 * 6 * 90 * 16)
            assert torch.allclose(paged_attention(queries, cache, rows, given, 3, 0.3), whole, atol=0.02)
        assert_near(whole, reference_attention.paged_attention(queries, cache, cells, given, 3, 0.3), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_shared", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("window", [1, 9, 1000])
def test_decoding_from_scattered_blocks_equals_its_reference(
    dtype: torch.dtype, num_shared: int, head_dim: int, window: int
) -> None:
    num_kv_heads, block_size = 2, 4
    cache = torch.randn(64 * block_size, 2 * num_kv_heads * head_dim, dtype=dtype)
    cache[0:block_size] = float("nan")  # block 0 stands where a sequence has no block
    seq_lens = torch.tensor([1, 4, 5, 37], dtype=torch.int32)
    block_table = (torch.randperm(63)[:40] + 1).view(4, 10).int()
    block_table[0, 1:] = block_table[1, 1:] = block_table[2, 2:] = 0
    width = num_shared * num_kv_heads * head_dim
    queries = torch.randn(4, width + 6, dtype=dtype)[:, :width]
    assert is_decode_fast(47, dtype, cache.device)
    ours = decode_attention(
        queries, cache, block_table, seq_lens,
        block_size=block_size, num_kv_heads=num_kv_heads, scale=0.3, window=window,
    )  # fmt: skip
    truth = reference_attention.decode_attention(
        queries, cache, block_table, seq_lens, block_size, num_kv_heads, 0.3, window
    )
    assert_near(ours, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_the_most_likely_token_equals_its_reference(dtype: torch.dtype, spread: float) -> None:
    logits = (torch.randn(7, 1001) * spread).to(dtype)
    logits[1, ::2] = float("-inf")
    logits[2, [5, 700, 900]] = logits[2].max() + 1  # a tie
    token_ids, logprobs = most_likely(logits)
    true_ids, true_logprobs = reference_choice.most_likely(logits)
    assert token_ids.tolist() == true_ids.tolist() and token_ids[2] == 5
    assert torch.allclose(logprobs, true_logprobs, atol=2e-6, rtol=1e-5)
    assert torch.allclose(logprobs, logits.float().log_softmax(1).amax(1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), None])
def test_a_broken_row_gives_no_token_and_harms_no_other(dtype: torch.dtype, broken: float | None) -> None:
    logits = torch.randn(3, 50, dtype=dtype)
    if broken is None:
        logits[1] = float("-inf")
    else:
        logits[1, 49] = broken
    for choose in (most_likely, reference_choice.most_likely):
        token_ids, logprobs = choose(logits)
        assert token_ids[1] == -1 and logprobs[1] == 0
        assert token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_gelu_and_mul_equal_their_references_and_torch(dtype: torch.dtype, rows: int, size: float) -> None:
    gate_up = torch.randn(rows, 2 * 24, dtype=dtype) * size
    gate, up = gate_up.float().chunk(2, -1)
    with torch.inference_mode():
        ours = gelu_tanh_and_mul(gate_up)
        assert_near(ours, reference_activation.gelu_tanh_and_mul(gate_up), dtype)
        assert_near(ours, (F.gelu(gate, approximate="tanh") * up).to(dtype), dtype)
        assert_near(gelu_and_mul(gate_up), (F.gelu(gate) * up).to(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("ordering", ["gathered", "ordered", "in order"])
def test_capped_attention_equals_its_reference(
    dtype: torch.dtype, num_queries: int, ordering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "MAX_BATCHED_SCORES", 2 * 3 * 6 * 300)  # so that queries come in parts
    num_sequences = 1 if ordering == "in order" else 3
    cache = torch.randn(300, 2 * 2 * 8, dtype=dtype)
    queries = torch.randn(num_sequences, num_queries, 6 * 8, dtype=dtype) * 3
    visible = 250 - 40 * torch.arange(num_queries).view(1, -1, 1).expand(num_sequences, -1, 300)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(torch.arange(300) >= visible, float("-inf"))
    cells: Tensor | None = torch.stack([torch.randperm(300) for _ in range(num_sequences)])
    if ordering == "in order":
        cells = None
    elif ordering == "ordered":
        cells = torch.arange(4).view(-1, 1, 1) + cells * 4
    with torch.inference_mode():
        ours = capped_attention(queries, cache, cells, mask, num_kv_heads=2, scale=0.4, cap=2.0)
        truth = reference_attention.capped_attention(queries, cache, cells, mask, 2, 0.4, 2.0)
        assert_near(ours, truth, dtype)
        plain = reference_attention.paged_attention(queries, cache, cells, mask, 2, 0.4)
    assert (plain.float() - truth.float()).abs().max() > 0.1
