"""Mixtures of experts on the CPU: one compiled pass to choose and sort, one to sum."""

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.compiled import exp, floats, halves, is_compiled, jit, load, longs, store
from loraplex_kernels.reference import moe as _reference


@jit
def _route(scores, num_chosen, rescales, weights, rows, tokens, starts):
    num_tokens, num_experts = scores.shape
    shares = np.empty(num_experts, np.float32)
    chosen = np.empty((num_tokens, num_chosen), np.int64)
    starts[:] = 0
    for token in range(num_tokens):
        highest = load(scores[token, 0])
        for expert in range(num_experts):
            shares[expert] = load(scores[token, expert])
            highest = max(highest, shares[expert])
        total = np.float32(0)
        for expert in range(num_experts):
            shares[expert] = exp(shares[expert] - highest)
            total += shares[expert]
        sum_of_chosen = np.float32(0)
        for choice in range(num_chosen):
            best = 0
            for expert in range(1, num_experts):
                if shares[expert] > shares[best]:
                    best = expert
            chosen[token, choice] = best
            weights[token, choice] = shares[best] / total
            sum_of_chosen += shares[best] / total
            shares[best] = np.float32(-1)
            starts[best + 1] += 1
        if rescales:
            for choice in range(num_chosen):
                weights[token, choice] /= sum_of_chosen
    for expert in range(num_experts):
        starts[expert + 1] += starts[expert]
    free = starts[:num_experts].copy()
    for token in range(num_tokens):
        for choice in range(num_chosen):
            row = free[chosen[token, choice]]
            free[chosen[token, choice]] += 1
            rows[token, choice] = row
            tokens[row] = token


@jit
def _route_tokens(is_half, scores, num_tokens, num_experts, num_chosen, rescales, weights, rows, tokens, starts):
    shape = (num_tokens, num_chosen)
    shares, places = floats(weights, shape), longs(rows, shape)
    owners, firsts = longs(tokens, num_tokens * num_chosen), longs(starts, num_experts + 1)
    if is_half:
        _route(halves(scores, (num_tokens, num_experts)), num_chosen, rescales, shares, places, owners, firsts)
    else:
        _route(floats(scores, (num_tokens, num_experts)), num_chosen, rescales, shares, places, owners, firsts)


def route_tokens(scores: Tensor, num_chosen: int, rescales: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    if not is_compiled(scores.dtype):
        return _reference.route_tokens(scores, num_chosen, rescales)
    num_tokens, num_experts = scores.shape
    weights = torch.empty(num_tokens, num_chosen)
    rows = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
    tokens = torch.empty(num_tokens * num_chosen, dtype=torch.int64)
    starts = torch.empty(num_experts + 1, dtype=torch.int64)
    _route_tokens(
        scores.dtype is torch.bfloat16, scores.data_ptr(), num_tokens, num_experts, num_chosen, rescales,
        weights.data_ptr(), rows.data_ptr(), tokens.data_ptr(), starts.data_ptr(),
    )  # fmt: skip
    return weights, rows, tokens, tuple(starts.tolist())


@jit
def _sum(rows, places, weights, has_addend, addend, out):
    num_tokens, size = out.shape
    total = np.empty(size, np.float32)
    for token in range(num_tokens):
        for i in range(size):
            total[i] = load(addend[token, i]) if has_addend else np.float32(0)
        for choice in range(places.shape[1]):
            row, weight = places[token, choice], weights[token, choice]
            for i in range(size):
                total[i] += weight * load(rows[row, i])
        for i in range(size):
            out[token, i] = store(total[i], out[token, i])


@jit
def _sum_experts(is_half, rows, places, weights, num_tokens, num_chosen, size, addend, out):
    places, weights = longs(places, (num_tokens, num_chosen)), floats(weights, (num_tokens, num_chosen))
    shape, all_rows = (num_tokens, size), (num_tokens * num_chosen, size)
    has_addend = addend != 0
    more = addend if has_addend else out
    if is_half:
        _sum(halves(rows, all_rows), places, weights, has_addend, halves(more, shape), halves(out, shape))
    else:
        _sum(floats(rows, all_rows), places, weights, has_addend, floats(more, shape), floats(out, shape))


def sum_experts(rows: Tensor, places: Tensor, weights: Tensor, addend: Tensor | None) -> Tensor:
    if not is_compiled(rows.dtype):
        return _reference.sum_experts(rows, places, weights, addend)
    num_tokens, num_chosen = places.shape
    out = rows.new_empty(num_tokens, rows.shape[1])
    _sum_experts(
        rows.dtype is torch.bfloat16, rows.data_ptr(), places.data_ptr(), weights.data_ptr(), num_tokens, num_chosen,
        rows.shape[1], 0 if addend is None else addend.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out
