"""The model's own chat template: messages → prompt, as transformers renders it, in a sandbox with limits."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraplex_server.errors import TemplateFailed
from loraplex_server.text.tool_prompt import (
    Message,
    with_calls_as_objects,
    with_calls_written_out,
    with_tool_prompt,
    with_tools_written_out,
)
from loraplex_server.text.tools import Tool

# A template of a well-known model takes milliseconds for a thousand messages.
RENDER_TIMEOUT_S = 5.0
MAX_PROMPT_CHARACTERS = 8_000_000
MAX_REPEATED = 1_000_000
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplateError(Exception):
    """The template's file cannot be read or compiled; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a template renders: messages with their contents as text, and how the prompt is to end."""

    messages: list[Message]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any]
    tools: Sequence[Tool] = ()
    tool_prompt: str | None = None  # a client's own words about the tools


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's, without names that lead into Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=…)` is a template's right
        named = dict(*args[1:], **kwargs)
        for name in named:
            _check_name(name)
        Namespace.__init__(args[0], named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template cannot store {name!r} in a namespace")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline that every call and lookup of a template looks at."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], cache_size=0
        )
        self._local = threading.local()
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = _Namespace

    def start_clock(self) -> None:
        """Give this thread's rendering its time."""
        self._local.deadline = time.monotonic() + RENDER_TIMEOUT_S

    def check_clock(self) -> None:
        """Raise when this thread's rendering has used up its time."""
        if time.monotonic() > getattr(self._local, "deadline", float("inf")):
            raise jinja2.TemplateError(f"the chat template took longer than {RENDER_TIMEOUT_S:g} s")

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Jinja's own, and the clock."""
        self.check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Jinja's own, and the clock."""
        self.check_clock()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_clock()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Jinja's own, except for products and powers that would fill the memory."""
        if operator == "**" and not (abs(left) <= MAX_REPEATED and abs(right) <= 64):
            raise jinja2.TemplateError("the chat template computes too large a power")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, str | list | tuple) and len(repeated) * times > MAX_REPEATED:
                raise jinja2.TemplateError("the chat template repeats a text too often")
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own would escape HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class ChatTemplate:
    """One model's template; `render` is safe to call from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self._environment = _Environment()
        self._special_tokens = dict(special_tokens)
        self.source = source
        try:
            self._template = self._environment.from_string(source)
            self._reads_tools = "tools" in jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from None

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that templates know by name, such as eos_token."""
        return self._special_tokens

    @classmethod
    def load(
        cls, folder: str, tokenizer_config_path: str | None = None, template_path: str | None = None
    ) -> "ChatTemplate | None":
        """The template of a model's folder, or None where there is none. Raises ChatTemplateError.

        The first of: the file at `template_path`, the one at `tokenizer_config_path`, chat_template.jinja,
        chat_template.json, tokenizer_config.json. Of several named templates it is the one named "default".
        """
        base = Path(folder)
        config = _read_json(Path(tokenizer_config_path) if tokenizer_config_path else base / "tokenizer_config.json")
        source = None if template_path is None else _read(Path(template_path))
        if source is None and tokenizer_config_path:
            source = _default_of(config.get("chat_template"))
        if source is None and (base / "chat_template.jinja").is_file():
            source = _read(base / "chat_template.jinja")
        if source is None:
            source = _default_of(_read_json(base / "chat_template.json").get("chat_template"))
        if source is None:
            source = _default_of(config.get("chat_template"))
        if source is None:
            return None
        # Older models name their special tokens in a file of their own.
        named = _read_json(base / "special_tokens_map.json") | {k: v for k, v in config.items() if v is not None}
        tokens = {name: _token_text(named[name]) for name in SPECIAL_TOKENS if named.get(name)}
        return cls(source, tokens)

    def render(self, conversation: Conversation) -> str:
        """The prompt. Raises TemplateFailed with the template's own words."""
        messages = self._prepared(conversation)
        if conversation.continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CONTINUE_MARK}]
        tools = [tool.as_function() for tool in conversation.tools] if self._reads_tools else []
        variables = {
            **self._special_tokens,
            "tools": tools or None,
            "documents": None,
            **conversation.variables,
            "messages": messages,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        prompt = self._guarded(lambda: self._rendered(variables))
        if conversation.continue_final_message:
            return _cut_at_mark(prompt)
        return prompt

    async def render_async(self, conversation: Conversation) -> str:
        """`render` in a thread."""
        return await asyncio.to_thread(self.render, conversation)

    def _prepared(self, conversation: Conversation) -> list[Message]:
        """The messages with tools and calls in the form that this template can show."""
        messages = conversation.messages
        if any(message.get("tool_calls") for message in messages):
            shows_calls = "tool_calls" in self.source
            messages = with_calls_as_objects(messages) if shows_calls else with_calls_written_out(messages)
        if conversation.tools and not self._reads_tools:
            return with_tools_written_out(messages, conversation.tools, conversation.tool_prompt)
        if conversation.tools and conversation.tool_prompt:
            return with_tool_prompt(messages, conversation.tool_prompt)
        return messages

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        self._environment.start_clock()
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate(**variables):
            self._environment.check_clock()
            length += len(piece)
            if length > MAX_PROMPT_CHARACTERS:
                raise jinja2.TemplateError(f"the chat template writes more than {MAX_PROMPT_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)

    @staticmethod
    def _guarded(render: Callable[[], str]) -> str:
        try:
            return render()
        except jinja2.TemplateError as error:
            raise TemplateFailed(str(error.message or error)) from error
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
            MemoryError,
        ) as error:
            # What an expression of the template can raise on messages that it does not expect.
            raise TemplateFailed(f"the chat template cannot render these messages: {error!r}") from error


def _cut_at_mark(prompt: str) -> str:
    """Everything up to the end of the final message's own text."""
    at = prompt.rfind(_CONTINUE_MARK.strip())
    if at < 0:
        raise TemplateFailed("`continue_final_message`: the chat template does not show the final message")
    if prompt[at : at + len(_CONTINUE_MARK)] == _CONTINUE_MARK:
        return prompt[:at]  # the template kept the spaces at the end of the content
    return prompt[:at].rstrip()


def _default_of(template: Any) -> str | None:
    if isinstance(template, str):
        return template
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        return _default_of(named.get("default"))
    return None


def _token_text(value: Any) -> str:
    # A special token is a string, or an object with its properties.
    return str(value.get("content") if isinstance(value, dict) else value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"'{path}' cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ChatTemplateError(f"'{path}' cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}
