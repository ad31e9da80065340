"""The kernels that read a linear's output, with and without the delta of adapters, against their references."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rank_pages import delta_of
from torch import Tensor
from triton_cases import DEVICE, DTYPES, assert_near, error

from loraplex_kernels.gpu import activation as gpu_activation
from loraplex_kernels.gpu import kv_cache as gpu_kv_cache
from loraplex_kernels.gpu import norm as gpu_norm
from loraplex_kernels.kv_cache import HeadNorms
from loraplex_kernels.lora_pages import RowDelta
from loraplex_kernels.norm import Norm
from loraplex_kernels.reference import activation as reference_activation
from loraplex_kernels.reference import kv_cache as reference_kv_cache
from loraplex_kernels.reference import norm as reference_norm


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *itertools.product(("silu_and_mul", "gelu_tanh_and_mul", "gelu_and_mul"), (None, (70, 70), (140,))),
        *itertools.product(("silu", "gelu_tanh", "gelu"), (None, (140,))),
    ],
)
def test_activations_add_the_delta_first(dtype: torch.dtype, parts: tuple[int, ...] | None, name: str) -> None:
    gate_up = numbers(5, 140, dtype=dtype) * 3
    delta = None if parts is None else delta_of(parts, dtype)
    ours = getattr(gpu_activation, name)(gate_up, delta)
    assert_near(ours, getattr(reference_activation, name)(gate_up.clone(), delta))
    assert ours.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 72, 600])
def test_rms_norm_in_triton(dtype: torch.dtype, hidden: int) -> None:
    x, weight = numbers(3, hidden, dtype=dtype) * 10, numbers(hidden, dtype=dtype)
    assert_near(gpu_norm.rms_norm(x, weight, 1e-5), reference_norm.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_groups_in_triton_touches_no_other_column(dtype: torch.dtype) -> None:
    given, weight = numbers(3, 40, dtype=dtype), numbers(24, dtype=dtype)
    for group_size in (8, 24):
        ours, truth = given.clone(), given.clone()
        gpu_norm.rms_norm_groups(ours.narrow(1, 8, 24), weight, group_size, 1e-5)
        reference_norm.rms_norm_groups(truth.narrow(1, 8, 24), weight, group_size, 1e-5)
        assert_near(ours, truth)
        assert torch.equal(ours[:, :8], given[:, :8]) and torch.equal(ours[:, 32:], given[:, 32:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("has_post_norm", [False, True])
@pytest.mark.parametrize("kind", ["none", "rms", "centred", "biased"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_residual_and_norm_in_one_pass(
    dtype: torch.dtype, has_delta: bool, has_post_norm: bool, kind: str, share: float
) -> None:
    x, given, *weights = (numbers(*shape, dtype=dtype) for shape in ((5, 72), (5, 72), (72,), (72,), (72,)))
    delta = delta_of((72,), dtype) if has_delta else None
    norm = {
        "none": None,
        "rms": Norm(weights[0], 1e-5),
        "centred": Norm(weights[0], 1e-5, is_centred=True),
        "biased": Norm(weights[0], 1e-5, weights[1], is_centred=True),
    }[kind]
    results = []
    for operation in (gpu_norm.add_norm, reference_norm.add_norm):
        residual = given.clone()
        out = operation(x, residual, norm, delta, Norm(weights[2], 1e-3) if has_post_norm else None, share)
        results.append((out, residual))
    (ours, our_residual), (truth, true_residual) = results
    assert_near(ours, truth)
    assert_near(our_residual, true_residual)
    assert (ours is our_residual) == (norm is None)
    if not (has_delta or has_post_norm) and share == 1:
        assert torch.equal(our_residual, x + given)
    if kind == "biased":
        theirs = F.layer_norm(true_residual, (72,), weights[0], weights[1], 1e-5)
        assert_near(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [None, 3, 1])
def test_sums_of_squares_of_queries_and_keys(dtype: torch.dtype, parts: int | None) -> None:
    sizes = (1100, 30, 20)
    qkv = numbers(5, sum(sizes), dtype=dtype) / 8
    delta = None if parts is None else delta_of(sizes if parts == 3 else (sum(sizes),), dtype)
    ours, truth = (
        operation(qkv, sizes[:2], delta) for operation in (gpu_norm.head_squares, reference_norm.head_squares)
    )
    assert_near(ours, truth, dtype)


HEADS, KV_HEADS, CELLS = 4, 2, 12


def rotated(
    operation, head_dim: int, turned: int, dtype: torch.dtype, delta: RowDelta | None, has_norms: bool, cells: Tensor,
    *, has_squares: bool = False, are_neighbours: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    torch.manual_seed(1)
    qkv = numbers(5, (HEADS + 2 * KV_HEADS) * head_dim, dtype=dtype)
    half = torch.randn(5, turned // 2)
    cos, sin = torch.cat((half.cos(), half.cos()), -1), torch.cat((-half.sin(), half.sin()), -1)
    norms = HeadNorms(numbers(HEADS * head_dim, dtype=dtype), numbers(KV_HEADS * head_dim, dtype=dtype), 1e-5)
    if has_squares:
        norms = replace(norms, squares=torch.rand(5, 2, device=DEVICE) * 30, widths=(100, 50))
    cache = numbers(CELLS, 2 * KV_HEADS * head_dim, dtype=dtype)
    operation(
        qkv, cos.to(DEVICE, dtype), sin.to(DEVICE, dtype), cache, cells, HEADS, head_dim, delta,
        norms if has_norms else None, are_neighbours=are_neighbours,
    )  # fmt: skip
    return qkv, cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "turned"), [(16, 16), (16, 8), (24, 24), (80, 32)])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("parts", [None, 3, 1])
def test_rotating_and_storing_in_triton(
    dtype: torch.dtype, head_dim: int, turned: int, has_norms: bool, parts: int | None
) -> None:
    sizes = (HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim)
    delta = None if parts is None else delta_of(sizes if parts == 3 else (sum(sizes),), dtype)
    cells = torch.randperm(CELLS)[:5].to(DEVICE)
    ours = rotated(gpu_kv_cache.rotate_and_store, head_dim, turned, dtype, delta, has_norms, cells)
    truth = rotated(reference_kv_cache.rotate_and_store, head_dim, turned, dtype, delta, has_norms, cells)
    assert_near(ours[0][:, : sum(sizes[:2])], truth[0][:, : sum(sizes[:2])])
    assert_near(ours[1], truth[1])
    others = torch.ones(CELLS, dtype=torch.bool)
    others[cells.cpu()] = False
    assert torch.equal(ours[1][others], truth[1][others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [24, 16])
@pytest.mark.parametrize("has_squares", [False, True])
@pytest.mark.parametrize("are_neighbours", [False, True])
def test_rotating_neighbours_and_norms_over_all_heads(
    dtype: torch.dtype, turned: int, has_squares: bool, are_neighbours: bool
) -> None:
    delta = delta_of((HEADS * 24, KV_HEADS * 24, KV_HEADS * 24), dtype)
    cells = torch.randperm(CELLS)[:5].to(DEVICE)
    ours, truth = (
        rotated(
            operation, 24, turned, dtype, delta, True, cells, has_squares=has_squares, are_neighbours=are_neighbours
        )
        for operation in (gpu_kv_cache.rotate_and_store, reference_kv_cache.rotate_and_store)
    )
    assert_near(ours[0][:, : 24 * (HEADS + KV_HEADS)], truth[0][:, : 24 * (HEADS + KV_HEADS)])
    assert_near(ours[1], truth[1])


def test_turning_the_wrong_pairs_or_the_sums_of_other_rows_are_noticed() -> None:
    cells = torch.arange(5, device=DEVICE)
    given = (16, 16, torch.float32, None, True, cells)
    truth = rotated(reference_kv_cache.rotate_and_store, *given, has_squares=True, are_neighbours=True)
    for faults in ({"has_squares": True}, {"are_neighbours": True}):
        ours = rotated(gpu_kv_cache.rotate_and_store, *given, **faults)
        assert error(ours[1], truth[1]) > 0.05


def test_a_delta_for_the_wrong_rows_is_noticed() -> None:
    delta = delta_of((70, 70), torch.float32)
    values = delta.values.nan_to_num(3.0)
    shifted = replace(delta.tiles, row_slots=delta.tiles.row_slots.roll(1))
    gate_up = numbers(5, 140, dtype=torch.float32)
    truth = reference_activation.silu_and_mul(gate_up, replace(delta, values=values))
    for faulty in (replace(delta, values=values, tiles=shifted), None):
        assert error(gpu_activation.silu_and_mul(gate_up, faulty), truth) > 0.05


def test_a_wrong_cell_of_the_cache_is_noticed() -> None:
    cells = torch.tensor([3, 1, 4, 0, 5], device=DEVICE)
    truth = rotated(reference_kv_cache.rotate_and_store, 16, 16, torch.float32, None, False, cells)
    ours = rotated(gpu_kv_cache.rotate_and_store, 16, 16, torch.float32, None, False, cells + 1)
    assert error(ours[1], truth[1]) > 0.05
