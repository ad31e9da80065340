"""The forms in which `LLM` takes prompts and conversations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

Message = dict[str, Any]


class TextPrompt(TypedDict):
    """A prompt as text, in a dict."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, in a dict."""

    prompt_token_ids: list[int]


PromptType = str | list[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a text to be tokenised, or token ids."""

    text: str | None
    token_ids: list[int] | None = None


def read_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or a list of them, each a text, a dict or token ids. Raises TypeError for anything else."""
    if _is_one(prompts):
        return [_read(prompts)]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a prompt or a list of prompts, not {type(prompts).__name__}")
    return [_read(prompt) for prompt in prompts]


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str | Mapping) or _is_token_ids(prompts)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and isinstance(value[0], int)


def _read(prompt: Any) -> Prompt:
    if isinstance(prompt, Mapping):
        unknown = sorted(str(key) for key in prompt if key not in ("prompt", "prompt_token_ids"))
        if unknown:
            raise TypeError(f"a prompt's dict has 'prompt' or 'prompt_token_ids', and nothing else: {unknown}")
    match prompt:
        case str():
            return Prompt(prompt)
        case {"prompt_token_ids": [*token_ids]}:
            return Prompt(prompt.get("prompt"), token_ids)
        case {"prompt": str(text)}:
            return Prompt(text)
        case []:
            return Prompt(None, [])
    if _is_token_ids(prompt):
        return Prompt(None, list(prompt))
    raise TypeError(
        "a prompt is a text, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}, "
        f"not {str(prompt)[:80]!r} ({type(prompt).__name__})"
    )


def read_conversations(messages: Any) -> list[list[Message]]:
    """One conversation or a list of them, the contents of their messages as text. Raises ValueError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages must be a conversation (a list of messages) or a list of conversations")
    conversations = [messages] if isinstance(messages[0], Mapping) else messages
    return [[_message(message) for message in conversation] for conversation in conversations]


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"a message is a dict with a role and a content, not {str(message)[:80]!r}")
    return {**message, "content": _content(message.get("content"))}


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise ValueError("only text can be a message's content: a string, or parts of type 'text'")
    return "\n".join(str(part["text"]) for part in parts)
