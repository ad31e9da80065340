"""`FoundAdapter`: what a request is served with, once what it named was found."""

from dataclasses import dataclass

from loraplex_server.adapter_origin import Origin
from loraplex_server.adapter_registry import UseCount
from loraplex_server.messages import AdapterSpec


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """A content that the engine knows.

    `scope`: who may see it, and share keys and values with it; None is everybody.
    """

    spec: AdapterSpec
    scope: str | None
    uses: UseCount
    origin: Origin | None = None  # None: it was checked at the start
