"""The lines of JSON in a list of adapters: names of merges, as in the body of POST /adapters."""

import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

from loraplex_models.sources import SourceFormatError, adapter_id_problem
from loraplex_server.api.schemas.merged_adapters import MergedAdapters
from loraplex_server.errors import InvalidRequest
from loraplex_server.wanted_merge import WantedMerge


class ListedMerge(BaseModel):
    """One line."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    merged_adapters: MergedAdapters


def listed_merges(lines: Iterable[str]) -> list[tuple[str, WantedMerge]]:
    """The names and what each is made of. Raises SourceFormatError, with the line and what is wrong with it."""
    return [_listed_merge(line) for line in lines]


def _listed_merge(line: str) -> tuple[str, WantedMerge]:
    try:
        found = ListedMerge.model_validate(json.loads(line))
        wanted = found.merged_adapters.wanted()
    except json.JSONDecodeError as error:
        raise SourceFormatError(f"{line[:100]}: no valid JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SourceFormatError(f"{line[:100]}: `{place}`: {first['msg']}") from None
    except InvalidRequest as error:
        raise SourceFormatError(f"{line[:100]}: {error}") from None
    problem = adapter_id_problem(found.name)
    if problem is not None or "@" in found.name:
        raise SourceFormatError(f"{line[:100]}: an adapter's name {problem or 'must not contain @'}")
    return found.name, wanted
