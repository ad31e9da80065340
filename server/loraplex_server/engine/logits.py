"""What a request's parameters do to its scores on a CPU: penalties, watermark and cuts, on rows of a batch.

Scores are float32, [rows, vocab], and changed in place; a parameter has one value a row. The order is TGI's:
watermark, repetition, frequency, presence, temperature, top_k, top_p, min_p, typical_p. Of OpenAI's, logit_bias comes
before all of them and its frequency penalty, here `count`, behind presence. A grammar's mask comes first of all: what
it sets to minus infinity nothing brings back.
Sorting and argmax go through numpy, whose AVX kernels are 10 to 25 times faster than torch's here.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WATERMARK_KEY = 15485863  # the millionth prime; as TGI and transformers, so that their detectors find the watermark


def copy_as_float(logits: Tensor, out: Tensor) -> None:
    """Write `logits` to `out`, float32 of the same shape."""
    if logits.dtype is torch.bfloat16:
        # A bfloat16 is the upper half of a float32. One numpy pass takes 6 µs a row of 49,152; the conversion of
        # torch wakes its thread pool, 100 µs when that has gone to sleep.
        bits = logits.view(torch.int16).numpy().view(np.uint16)
        np.left_shift(bits, 16, out=out.numpy().view(np.uint32), dtype=np.uint32)
    else:
        out.copy_(logits)


def keep_allowed(scores: Tensor, lines: list[int], masks: NDArray[np.int32]) -> None:
    """Cut each of `lines` to the tokens whose bit is set, in any type of scores.

    masks: [lines, at least vocab / 32] int32; bit i of a line stands for token i, the lowest bit of a word first.
    """
    vocab_size = scores.shape[1]
    # Bit by bit in numpy: 5 µs a row of 49,152.
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    blocked = torch.from_numpy(bits == 0)
    for place, line in enumerate(lines):
        scores[line].masked_fill_(blocked[place], -torch.inf)


def argmax(scores: Tensor) -> Tensor:
    """The index of each row's maximum, the lowest on ties, that of a NaN before all. Returns [rows] int64."""
    return torch.from_numpy(scores.numpy().argmax(axis=1))


def add_watermark(scores: Tensor, previous_token_ids: list[int], gamma: float, delta: float) -> None:
    """Add `delta` to the green list that each row's previous token seeds (Kirchenbauer et al. 2023, algorithm 2)."""
    for row, token_id in enumerate(previous_token_ids):
        scores[row, torch.from_numpy(green_list(token_id, scores.shape[1], gamma))] += delta


def green_list(token_id: int, vocab_size: int, gamma: float) -> NDArray[np.int64]:
    """The tokens that a watermark favours behind `token_id`: the first gamma · vocab of a random permutation.

    It is always drawn by the CPU's generator: the same list on any device, and the one that transformers' "lefthash"
    detector expects.
    """
    generator = torch.Generator()
    generator.manual_seed(WATERMARK_KEY * token_id)
    return torch.randperm(vocab_size, generator=generator)[: int(vocab_size * gamma)].numpy()


def penalise(
    scores: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    count: Tensor | None = None,
) -> None:
    """Make tokens that were there before less likely, by three penalties one after the other.

    token_ids: [rows, longest] int64, prompt and output, of which `lengths` [rows] count, at least 1, and the first
    `prompt_lengths` are the prompt; what stands behind is not read. Repetition divides positive scores of all
    ids seen and multiplies negative ones; frequency subtracts penalty · count / length, as TGI; presence
    subtracts the penalty once for each id in the output, as OpenAI; count, OpenAI's frequency penalty, subtracts
    the penalty once for each time the id is in the output, and is absent where no row has one.
    """
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_token = columns < lengths[:, None]
    # Cells without a token repeat the last one: writing the same score to the same place twice changes nothing.
    last = token_ids.gather(1, lengths[:, None] - 1)
    ids = torch.where(is_token, token_ids, last)

    seen = scores.gather(1, ids)
    penalty = repetition[:, None]
    scores.scatter_(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    share = (frequency / lengths)[:, None] * is_token
    scores.scatter_add_(1, ids, -share)

    has_output = lengths > prompt_lengths
    output_ids = torch.where(columns >= prompt_lengths[:, None], ids, last)
    scores.scatter_(1, output_ids, scores.gather(1, output_ids) - (presence * has_output)[:, None])

    if count is not None:
        is_output = is_token & (columns >= prompt_lengths[:, None])
        scores.scatter_add_(1, ids, -count[:, None] * is_output)


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> None:
    """Cut each row to its `top_k` best tokens, then to the fewest of these that together reach `top_p`.

    top_k: [rows] int64, vocab for off; top_p: [rows], 1 for off. The token that crosses the border stays, and so
    does every token that ties with the last one kept: what is kept does not depend on how ties were sorted.
    """
    ascending = _sort(scores)
    border = ascending.gather(1, scores.shape[1] - top_k[:, None])
    probs = (ascending - ascending[:, -1:]).exp_().masked_fill_(ascending < border, 0)
    reached = probs.cumsum(dim=1)
    to_cut = torch.where(top_p < 1, (1 - top_p) * reached[:, -1], -1)[:, None]
    first_kept = (reached[:, :-1] <= to_cut).sum(dim=1, keepdim=True)
    border = torch.maximum(border, ascending.gather(1, first_kept))
    scores.masked_fill_(scores < border, -torch.inf)


def keep_min_p(scores: Tensor, min_p: Tensor) -> None:
    """Cut tokens less likely than `min_p` times the likeliest one. min_p: [rows]."""
    border = scores.amax(dim=1) + min_p.log()
    scores.masked_fill_(scores < border[:, None], -torch.inf)


def keep_typical(scores: Tensor, typical_p: Tensor) -> None:
    """Keep the tokens whose information is closest to the row's entropy, until they reach `typical_p` together.

    typical_p: [rows]. The token that crosses the border stays, and so do its ties (Meister et al. 2022).
    """
    logprobs = scores.log_softmax(dim=1)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum(dim=1, keepdim=True)
    distance = (logprobs + entropy).abs_()
    order = _argsort(distance)
    reached = probs.gather(1, order).cumsum(dim=1)
    last_kept = (reached[:, :-1] < typical_p[:, None]).sum(dim=1, keepdim=True)
    border = distance.gather(1, order.gather(1, last_kept))
    scores.masked_fill_(distance > border, -torch.inf)


def top_tokens(logprobs: Tensor, counts: list[int]) -> list[list[tuple[int, float]]]:
    """Each row's `counts` likeliest tokens with their log-probabilities, best first, the lower id first on ties.

    Never more than the count, and fewer where the cuts left fewer.
    """
    most = min(max(counts), logprobs.shape[1])
    best = logprobs.topk(most, dim=1).values
    nth = torch.tensor([min(count, most) - 1 for count in counts], device=logprobs.device)
    border = best.gather(1, nth[:, None])
    # topk leaves open which of several equal tokens it takes, so take all down to the border and cut by id.
    rows, token_ids = ((logprobs >= border) & (logprobs > -torch.inf)).nonzero(as_tuple=True)
    found: list[list[tuple[int, float]]] = [[] for _ in counts]
    for row, token_id, logprob in zip(
        rows.tolist(), token_ids.tolist(), logprobs[rows, token_ids].tolist(), strict=True
    ):
        found[row].append((token_id, logprob))
    return [sorted(tokens, key=lambda token: -token[1])[:count] for tokens, count in zip(found, counts, strict=True)]


def _sort(scores: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(scores.numpy(), axis=1))


def _argsort(values: Tensor) -> Tensor:
    return torch.from_numpy(np.argsort(values.numpy(), axis=1))
