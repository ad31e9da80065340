"""Several adapters merged into one, on their true deltas: task arithmetic, TIES (arXiv:2306.01708), DARE (2311.03099).

A delta is weight * B A with the adapter's own scaling, so that adapters of any ranks and alphas merge. A sum of deltas
is kept as products side by side, exactly. The other strategies cut entries of each delta, which leaves a matrix of full
rank: it is kept whole, beside an identity.
"""

import hashlib

import torch
from torch import Tensor

from loraplex_models.adapters.merge_recipe import MergePart, MergeRecipe
from loraplex_models.adapters.refusal import ManifestError
from loraplex_models.adapters.weights import AdapterWeights

Pair = tuple[Tensor, Tensor]


def merge_adapters(parts: list[AdapterWeights], recipe: MergeRecipe) -> AdapterWeights:
    """Return the adapter that `recipe` makes of its parts, in their order and dtype.

    What DARE draws follows from the recipe's digest and the module's name, so that every rank and every load draws the
    same. A module that some parts leave alone is merged from the others. Raises ManifestError for a part whose files
    are not those of the recipe, or that is more than products.
    """
    for part, asked in zip(parts, recipe.parts, strict=True):
        if part.digest != asked.digest:
            raise ManifestError("the files of an adapter to be merged have changed since they were checked")
        if part.parts or part.ends:
            module = next(iter(part.parts or part.ends))
            raise ManifestError(
                f"an adapter to be merged changes {module} by more than a product of A and B", "adapter_unsupported"
            )
    names = dict.fromkeys(name for part in parts for name in part.modules)
    modules = {name: _merge_module(name, parts, recipe) for name in names}
    rank = max((len(a) for a, _ in modules.values()), default=0)
    return AdapterWeights(recipe.digest, rank, modules)


def _merge_module(name: str, parts: list[AdapterWeights], recipe: MergeRecipe) -> Pair:
    pairs = zip((part.modules.get(name) for part in parts), recipe.parts, strict=True)
    found = [(pair, asked) for pair, asked in pairs if pair is not None]
    if recipe.is_product:
        return _side_by_side(found)
    deltas = [b.float() @ a.float() for (a, b), _ in found]
    weights = torch.tensor([asked.weight for _, asked in found])
    return _as_pair(merge_deltas(deltas, weights, recipe, seed_of(recipe, name)), found[0][0][0].dtype)


def _side_by_side(found: list[tuple[Pair, MergePart]]) -> Pair:
    a = torch.cat([a for (a, _), _ in found])
    b = torch.cat([(b.float() * asked.weight).to(b.dtype).t() for (_, b), asked in found])
    return a, b.t()


def _as_pair(delta: Tensor, dtype: torch.dtype) -> Pair:
    """A and B whose product is the matrix [out, in], one of them an identity; B as `AdapterWeights` wants it."""
    num_out, num_in = delta.shape
    if num_out <= num_in:
        return delta.to(dtype), torch.eye(num_out, dtype=dtype)
    return torch.eye(num_in, dtype=dtype), delta.t().to(dtype).contiguous().t()


def seed_of(recipe: MergeRecipe, module: str) -> int:
    """What the draws for a module begin with."""
    return int.from_bytes(hashlib.sha256(f"{recipe.digest} {module}".encode()).digest()[:7])


def merge_deltas(deltas: list[Tensor], weights: Tensor, recipe: MergeRecipe, seed: int) -> Tensor:
    """Merge deltas [out, in] float32 with one weight each: cut each one, elect signs (TIES), sum or average."""
    generator = torch.Generator().manual_seed(seed)
    is_drawn = recipe.strategy in ("dare_linear", "dare_ties")
    cut = torch.stack([_cut(delta, recipe.density, generator if is_drawn else None) for delta in deltas])
    weighted = cut * weights.view(-1, 1, 1)
    if recipe.strategy == "dare_linear":
        return weighted.sum(0)
    # The sign that an entry has in most of the parts; what has another one, or was cut, does not count.
    votes = cut if recipe.majority_sign == "total" else cut.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agrees = cut.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _cut(delta: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Keep that share of the entries: the largest, or with a generator drawn ones, made larger by what others lose."""
    if density >= 1:
        return delta
    if generator is not None:
        return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density
    kept = delta.abs().view(-1).topk(int(density * delta.numel())).indices
    mask = torch.zeros(delta.numel()).index_fill_(0, kept, 1.0)
    return delta * mask.view_as(delta)
