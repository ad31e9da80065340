"""What a client may ask an answer to look like, in no dialect: a guide, which becomes a grammar before it runs."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from loraplex_server.errors import InvalidRequest

MAX_GUIDE_CHARACTERS = 64 * 1024
# At each place where JSON allows white space: a blank, or a new line with its indentation. With more freedom a small
# model that likes blanks writes nothing else.
JSON_WHITESPACE = r"(?: |\n {0,32}|\n\t{0,8})"


class Guide(msgspec.Struct, frozen=True):
    """One demand on the text: a JSON schema, a regular expression, or a grammar.

    `text` is the schema as JSON, the regular expression, or the grammar: Lark's or GBNF's notation, whichever it is, or
    surely Lark's. For schemas,
    `whitespace` is a regular expression for each place where JSON allows white space; null for none but a blank
    behind each comma and colon.
    """

    kind: Literal["json_schema", "regex", "grammar", "lark"]
    text: str
    whitespace: str | None = JSON_WHITESPACE


def schema_guide(field: str, schema: Any, whitespace: str | None = JSON_WHITESPACE) -> Guide:
    """A guide for JSON that a schema describes: an object, true, or the text of either. Raises InvalidRequest."""
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidRequest(f"`{field}` is a text, but no JSON schema: {error}") from None
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"`{field}` must be a JSON schema: an object, or the text of one")
    try:
        text = msgspec.json.encode(schema).decode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(f"`{field}` cannot be written as JSON: {error}") from None
    return checked_guide(field, Guide("json_schema", text, whitespace))


def object_guide() -> Guide:
    """A guide for any JSON object."""
    return Guide("json_schema", '{"type":"object"}')


def regex_guide(field: str, pattern: Any) -> Guide:
    """A guide for a text that a regular expression matches as a whole. Raises InvalidRequest."""
    return checked_guide(field, Guide("regex", _text(field, pattern)))


def grammar_guide(field: str, grammar: Any) -> Guide:
    """A guide for a text that a context-free grammar describes, in Lark's or GBNF's notation. Raises InvalidRequest."""
    return checked_guide(field, Guide("grammar", _text(field, grammar)))


def choice_guide(field: str, choices: Any) -> Guide:
    """A guide for one of several texts. Raises InvalidRequest."""
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        raise InvalidRequest(f"`{field}` must be a list of at least one text")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidRequest(f"`{field}` must hold texts that are not empty")
    return checked_guide(field, Guide("lark", f"start: {' | '.join(map(lark_text, choices))}"))


def lark_text(text: str) -> str:
    """A text as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"`{field}` must be a text that is not empty")
    return value


def checked_guide(field: str, guide: Guide) -> Guide:
    """The guide, if it is of a size that is compiled and can be sent. Raises InvalidRequest."""
    if len(guide.text) > MAX_GUIDE_CHARACTERS:
        raise InvalidRequest(f"`{field}` must have at most {MAX_GUIDE_CHARACTERS} characters. Given: {len(guide.text)}")
    try:
        guide.text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"`{field}` is not Unicode: it has a lone surrogate") from None
    return guide
