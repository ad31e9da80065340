"""`AdapterOrigin` and `MergeOrigin`: where a content that a name has can be had again, and what it must be then."""

import msgspec

from loraplex_server.adapter_location import AdapterLocation
from loraplex_server.wanted_merge import WantedMerge

# The sources of what was uploaded, and of what was made of others.
UPLOAD, MERGE = "upload", "merge"


class AdapterOrigin(msgspec.Struct, frozen=True, kw_only=True, tag="adapter"):
    """One adapter. It holds no token: what needed one is asked for again with the server's own."""

    location: AdapterLocation | None  # None: it was uploaded, and its files lie in the store alone
    digest: str | None = None  # None: nobody has looked at it yet, and whatever is there will do
    revision: str | None = None  # the hub's commit
    store_key: str | None = None  # its folder in the store; None where others must ask the source again

    @property
    def source(self) -> str:
        """The source's name."""
        return UPLOAD if self.location is None else self.location.source


class MergeOrigin(msgspec.Struct, frozen=True, kw_only=True, tag="merge"):
    """Several adapters as one, with each one's content at the time; no parts yet where nobody has asked for it."""

    wanted: WantedMerge
    parts: tuple[AdapterOrigin, ...]

    @property
    def source(self) -> str:
        """The source's name."""
        return MERGE


Origin = AdapterOrigin | MergeOrigin


def uploads_of(origin: Origin | None) -> list[str]:
    """The folders of the store that cannot be had again from anywhere else."""
    adapters = origin.parts if isinstance(origin, MergeOrigin) else [origin] if origin is not None else []
    return [one.store_key for one in adapters if one.location is None and one.store_key is not None]
