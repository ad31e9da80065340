"""`StructuredOutputsParams`: what the text must look like, with vLLM's names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from loraplex_server.api.schemas.structure import structured_guide
from loraplex_server.errors import InvalidRequest
from loraplex_server.text.guides import Guide


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """One demand on the text: exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`.

    `json` is a schema, its text, or a pydantic model; `grammar` is in Lark's notation or GBNF. Raises ValueError.
    """

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False  # they are, wherever the schema does not speak of them
    whitespace_pattern: str | None = None
    structural_tag: str | None = None
    backend: str | None = None  # accepted: there is one

    def __post_init__(self) -> None:
        if hasattr(self.json, "model_json_schema"):
            self.json = self.json.model_json_schema()
        self.guide()

    def guide(self) -> Guide:
        """The same as a guide. Raises ValueError."""
        return read_guide(asdict(self))


GuidedDecodingParams = StructuredOutputsParams
"""The name that it had in vLLM before."""


def read_guide(given: "StructuredOutputsParams | Mapping[str, Any]") -> Guide:
    """The guide of an object or dict of this shape. Raises ValueError."""
    if isinstance(given, StructuredOutputsParams):
        return given.guide()
    if not isinstance(given, Mapping):
        raise ValueError(f"structured_outputs must be StructuredOutputsParams. Given: {type(given).__name__}")
    try:
        guide = structured_guide("structured_outputs", given)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None
    assert guide is not None, "something was given"
    return guide
