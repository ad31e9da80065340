"""`AdapterMerges`: several adapters that a request or an operator wants as one, and the spec that stands for them."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from loraplex_models.adapters.manifest import module_shapes
from loraplex_models.adapters.merge_recipe import MergePart, MergeRecipe
from loraplex_models.config import ModelConfig
from loraplex_server.adapter_contents import AdapterContents
from loraplex_server.adapter_origin import MERGE
from loraplex_server.adapter_registry import UseCount
from loraplex_server.api.found_adapter import FoundAdapter
from loraplex_server.api.job import AdapterAccess
from loraplex_server.errors import AdapterRefused
from loraplex_server.messages import AdapterSpec
from loraplex_server.wanted_merge import WantedMerge

# Merges that stay known after their requests have ended, so that the same mixture need not be made again.
MAX_KEPT = 32


@dataclass(frozen=True, slots=True)
class MadeMerge:
    """The spec of a merge, and its parts in their order."""

    spec: AdapterSpec
    parts: tuple[FoundAdapter, ...]


class AdapterMerges:
    """Only the event loop's thread may use it. `find` holds one adapter, as `AdapterFinder.held` does."""

    def __init__(
        self,
        find: Callable[[str, AdapterAccess], AbstractAsyncContextManager[FoundAdapter]],
        contents: AdapterContents,
        model_config: Callable[[], ModelConfig],
    ):
        self._find = find
        self._contents = contents
        self._model_config = model_config
        self._kept: OrderedDict[str, list[AdapterSpec]] = OrderedDict()

    @asynccontextmanager
    async def held(self, wanted: WantedMerge, access: AdapterAccess) -> AsyncIterator[FoundAdapter]:
        """The merge, known to the engine until the block ends. Raises as `find` does for each part."""
        async with self.made(wanted, access, wanted.name) as made:
            self._keep(made)
            with self._contents.holding(made.spec):
                yield FoundAdapter(made.spec, _scope([part.scope for part in made.parts]), UseCount())

    @asynccontextmanager
    async def made(self, wanted: WantedMerge, access: AdapterAccess, name: str) -> AsyncIterator[MadeMerge]:
        """The merge under a name, its parts known to the engine until the block ends. Raises as `find` does."""
        async with AsyncExitStack() as stack:
            parts = [await stack.enter_async_context(self._find(adapter_id, access)) for adapter_id in wanted.ids]
            yield MadeMerge(await self.spec(wanted, [part.spec for part in parts], name), tuple(parts))

    async def spec(self, wanted: WantedMerge, parts: list[AdapterSpec], name: str) -> AdapterSpec:
        """What stands for the merge of these contents. Raises AdapterRefused for a part that cannot be merged."""
        return _merged_spec(wanted, parts, await asyncio.to_thread(self._model_config), name)

    def _keep(self, made: MadeMerge) -> None:
        spec = made.spec
        if spec.digest in self._kept:
            self._kept.move_to_end(spec.digest)
            return
        # The files of the parts stay as long as the merge may have to be made again.
        self._kept[spec.digest] = [spec, *(part.spec for part in made.parts)]
        for needed in self._kept[spec.digest]:
            self._contents.acquire(needed)
        while len(self._kept) > MAX_KEPT:
            _, released = self._kept.popitem(last=False)
            for needed in released:
                self._contents.release(needed)


def merge_of_merges(adapter_id: str) -> AdapterRefused:
    """The refusal of a part that is a merge."""
    return AdapterRefused(
        f"adapter '{adapter_id}' cannot be merged: it is a merge itself; name the adapters that it is made of",
        "adapter_unsupported",
    )


def _scope(scopes: list[str | None]) -> str | None:
    """Who may share keys and values with a merge: those who may see every part."""
    private = sorted({scope for scope in scopes if scope is not None})
    return hashlib.sha256("\n".join(private).encode()).hexdigest() if len(private) > 1 else next(iter(private), None)


def _merged_spec(wanted: WantedMerge, specs: list[AdapterSpec], config: ModelConfig, name: str) -> AdapterSpec:
    shapes = module_shapes(config)
    for adapter_id, spec in zip(wanted.ids, specs, strict=True):
        if spec.merge is not None:
            raise merge_of_merges(adapter_id)
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
        adapter_id=name,
        digest=recipe.digest,
        path="",
        rank=max((rank for _, rank, _ in rank_rows), default=0),
        num_bytes=num_bytes,
        source=MERGE,
        rank_rows=rank_rows,
        merge=recipe,
    )
