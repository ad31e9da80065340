"""`AdapterRegistry`: the adapters that requests may name."""

import difflib
from bisect import bisect

from loraplex_models.sources import adapter_id_problem
from loraplex_server.config import AdapterConfig
from loraplex_server.errors import AdapterNotFound, InvalidRequest
from loraplex_server.messages import AdapterSpec

MAX_NEAR_NAMES = 5
# Names are compared with so many others at most: a comparison takes 30 µs, and requests wait meanwhile.
MAX_COMPARED_NAMES = 200

# The class below has a method of the name `list`.
Specs = list[AdapterSpec]
Names = list[str]


class AdapterRegistry:
    """Adapter ids and what they stand for; an id that is not known is refused, the base never takes its place."""

    def __init__(self, config: AdapterConfig):
        self._specs = {spec.adapter_id: spec for spec in config.sources}
        self._sorted_ids = sorted(self._specs)

    def resolve(self, adapter_id: str) -> AdapterSpec:
        """The adapter of this id. Raises InvalidRequest for what cannot be an id, AdapterNotFound for others."""
        problem = adapter_id_problem(adapter_id)
        if problem is not None:
            raise InvalidRequest(f"`adapter_id` {problem}")
        spec = self._specs.get(adapter_id)
        if spec is None:
            near = self._near_names(adapter_id)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise AdapterNotFound(f"adapter '{adapter_id}' is not known to this server{hint}")
        return spec

    def _near_names(self, adapter_id: str) -> Names:
        # Of many names only those that begin alike are compared.
        start = max(0, bisect(self._sorted_ids, adapter_id) - MAX_COMPARED_NAMES // 2)
        candidates = self._sorted_ids[start : start + MAX_COMPARED_NAMES]
        return difflib.get_close_matches(adapter_id, candidates, n=MAX_NEAR_NAMES)

    def list(self) -> Specs:
        """All adapters, in the order they were given."""
        return [*self._specs.values()]
