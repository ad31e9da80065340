"""Where an adapter's files are to be had, and the reading of what a request calls an adapter."""

from dataclasses import dataclass, replace
from typing import Literal

from loraplex_models.sources import HUB_ID, AdapterItem, adapter_id_problem
from loraplex_server.errors import InvalidRequest

Source = Literal["hub", "local", "s3", "pbase"]
SOURCES: tuple[Source, ...] = ("hub", "local", "s3", "pbase")
MAX_ID_CHARACTERS = 512
# LoRAX's own bound, for its sources of prefixes.
MIN_PREFIX_CHARACTERS = 5


@dataclass(frozen=True, slots=True)
class AdapterLocation:
    """A source and an id there. `by_operator`: an operator named it, so neither the roots nor the tokens bind it."""

    source: Source
    place: str
    revision: str | None = None
    by_operator: bool = False

    def __str__(self) -> str:
        return self.place if self.revision is None else f"{self.place}@{self.revision}"


def parse_source(text: str) -> Source:
    """A source by its name, in any case. Raises InvalidRequest."""
    for source in SOURCES:
        if text.lower() == source:
            return source
    raise InvalidRequest(f"`adapter_source` must be one of {', '.join(SOURCES)}. Given: {text[:40]}")


def parse_location(source: Source, adapter_id: str) -> AdapterLocation:
    """What an id means at its source. Raises InvalidRequest for what cannot be one."""
    match source:
        case "hub":
            return _hub_location(adapter_id)
        case "local":
            return _local_location(adapter_id)
        case _:
            _check(adapter_id.removeprefix("s3://"))
            if len(adapter_id) < MIN_PREFIX_CHARACTERS:
                raise InvalidRequest(f"`adapter_id` '{adapter_id}' is too short for prefix filtering")
            return AdapterLocation(source, adapter_id)


def trusted(location: AdapterLocation) -> AdapterLocation:
    """The same place at the hub, named by an operator, who may use the server's token. Folders stay below the roots."""
    return replace(location, by_operator=True) if location.source == "hub" else location


def from_item(item: AdapterItem) -> AdapterLocation:
    """The location of an item of the operator's own list."""
    return AdapterLocation("local" if item.is_local else "hub", item.location, item.revision, by_operator=True)


def _hub_location(adapter_id: str) -> AdapterLocation:
    place, separator, revision = adapter_id.partition("@")
    _check(place)
    if separator:
        _check(revision)
    repo = "/".join(place.split("/")[:2])
    if "/" not in repo or HUB_ID.fullmatch(repo) is None:
        raise InvalidRequest(f"`adapter_id` '{adapter_id}' is neither a known adapter nor a hub id (org/name)")
    return AdapterLocation("hub", place, revision or None)


def _local_location(adapter_id: str) -> AdapterLocation:
    # An absolute path is looked for below the roots like any other; its parts must be plain all the same.
    _check(adapter_id.removeprefix("/").rstrip("/"))
    return AdapterLocation("local", adapter_id)


def _check(text: str) -> None:
    problem = adapter_id_problem(text)
    if problem is not None:
        raise InvalidRequest(f"`adapter_id` {problem}")
