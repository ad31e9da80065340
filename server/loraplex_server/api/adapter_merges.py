"""`AdapterMerges`: several adapters that a request wants as one, and the spec that stands for them."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from loraplex_models.adapters.manifest import module_shapes
from loraplex_models.adapters.merge_recipe import MergePart, MergeRecipe
from loraplex_models.config import ModelConfig
from loraplex_server.adapter_registry import UseCount
from loraplex_server.api.adapter_finder import AdapterFinder, FoundAdapter
from loraplex_server.api.job import AdapterAccess, WantedMerge
from loraplex_server.errors import AdapterRefused
from loraplex_server.messages import AdapterSpec

# Merges that stay known after their requests have ended, so that the same mixture need not be made again.
MAX_KEPT = 32
MERGE = "merge"


class AdapterMerges:
    """Only the event loop's thread may use it."""

    def __init__(self, finder: AdapterFinder):
        self._finder = finder
        self._kept: OrderedDict[str, list[AdapterSpec]] = OrderedDict()

    @asynccontextmanager
    async def held(self, wanted: WantedMerge, access: AdapterAccess) -> AsyncIterator[FoundAdapter]:
        """The merge, known to the engine until the block ends. Raises as `AdapterFinder.held` does for each part."""
        async with AsyncExitStack() as stack:
            parts = [
                await stack.enter_async_context(self._finder.held(adapter_id, access)) for adapter_id in wanted.ids
            ]
            config = await asyncio.to_thread(self._finder.model_config)
            spec = _merged_spec(wanted, [part.spec for part in parts], config)
            self._keep(spec, [part.spec for part in parts])
            with self._finder.contents.holding(spec):
                yield FoundAdapter(spec, _scope([part.scope for part in parts]), UseCount())

    def _keep(self, spec: AdapterSpec, parts: list[AdapterSpec]) -> None:
        contents = self._finder.contents
        if spec.digest in self._kept:
            self._kept.move_to_end(spec.digest)
            return
        # The files of the parts stay as long as the merge may have to be made again.
        self._kept[spec.digest] = [spec, *parts]
        for needed in self._kept[spec.digest]:
            contents.acquire(needed)
        while len(self._kept) > MAX_KEPT:
            _, released = self._kept.popitem(last=False)
            for needed in released:
                contents.release(needed)


def _scope(scopes: list[str | None]) -> str | None:
    """Who may share keys and values with a merge: those who may see every part."""
    private = sorted({scope for scope in scopes if scope is not None})
    return hashlib.sha256("\n".join(private).encode()).hexdigest() if len(private) > 1 else next(iter(private), None)


def _merged_spec(wanted: WantedMerge, specs: list[AdapterSpec], config: ModelConfig) -> AdapterSpec:
    shapes = module_shapes(config)
    for adapter_id, spec in zip(wanted.ids, specs, strict=True):
        if spec.dense_elements or spec.invocation_token_ids:
            raise AdapterRefused(
                f"adapter '{adapter_id}' cannot be merged: it changes more than the layers' linears, or not by a "
                "product alone (DoRA, biases, embeddings, the head, invocation tokens)",
                "adapter_unsupported",
            )
    recipe = MergeRecipe(
        parts=tuple(
            MergePart(path=spec.path, digest=spec.digest, weight=weight)
            for spec, weight in zip(specs, wanted.weights, strict=True)
        ),
        strategy=wanted.strategy,
        density=wanted.density,
        majority_sign=wanted.majority_sign,
    )
    rank_rows = recipe.rank_rows([spec.rank_rows for spec in specs], shapes, config.num_layers)
    num_bytes = sum(spec.num_bytes for spec in specs)
    if not recipe.is_product:
        # Two bytes a number at least; what it takes in the model's own type is known when it is made.
        num_bytes = sum(2 * num_layers * rank * sum(shapes[kind]) for kind, rank, num_layers in rank_rows)
    return AdapterSpec(
        adapter_id=wanted.name,
        digest=recipe.digest,
        path="",
        rank=max((rank for _, rank, _ in rank_rows), default=0),
        num_bytes=num_bytes,
        source=MERGE,
        rank_rows=rank_rows,
        merge=recipe,
    )
