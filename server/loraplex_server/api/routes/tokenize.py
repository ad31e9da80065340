"""POST /tokenize in TGI's shape and in vLLM's, /detokenize and /chat_tokenize."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.body import read_body, read_one_of
from loraplex_server.api.job import NO_ACCESS
from loraplex_server.api.model_names import adapter_of
from loraplex_server.api.routes.openai_chat import chat_prompt
from loraplex_server.api.schemas.openai import ChatBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from loraplex_server.api.schemas.tgi import GenerateBody
from loraplex_server.api.state import ApiState, Serving
from loraplex_server.errors import InvalidRequest
from loraplex_server.text.tokenizer import TokenSpan


class TokenCount(msgspec.Struct, frozen=True):
    """vLLM's answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizedText(msgspec.Struct, frozen=True):
    """The answer of /detokenize."""

    prompt: str


class ChatTokens(msgspec.Struct, frozen=True):
    """The answer of /chat_tokenize."""

    tokenize_response: list[TokenSpan]
    templated_text: str


async def tokenize(request: Request) -> Response:
    """The tokens of `inputs` with their places in the text; or the token ids of `prompt` or `messages`, as vLLM.

    The adapter changes nothing, but it must exist.
    """
    body = await read_one_of(request, _schema)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    match body:
        case TokenizeBody():
            adapter_of(state, body.model, None)
            answer = await _count(serving, body.prompt, body.add_special_tokens is not False, body.return_token_strs)
        case TokenizeChatBody():
            prompt = await _chat_prompt(state, serving, body)
            answer = await _count(serving, prompt, bool(body.add_special_tokens), body.return_token_strs)
        case GenerateBody():
            if body.parameters is not None and body.parameters.adapter_id:
                state.adapters.check_name(body.parameters.adapter_id, NO_ACCESS)
            return _json(await serving.generator.tokenizer.encode_with_offsets(body.inputs))
    return _json(answer)


async def chat_tokenize(request: Request) -> Response:
    """The prompt that the chat template makes of the messages, and its tokens with their places in it."""
    body = await read_body(request, ChatBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    prompt = await _chat_prompt(state, serving, body)
    spans = await serving.generator.tokenizer.encode_with_offsets(prompt, bool(body.add_special_tokens))
    return _json(ChatTokens(spans, prompt))


async def detokenize(request: Request) -> Response:
    """The text of token ids, special tokens as they are spelt."""
    body = await read_body(request, DetokenizeBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    adapter_of(state, body.model, None)
    vocab_size = serving.limits.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"`tokens` has the id {token_id}; the model's are from 0 to {vocab_size - 1}")
    return _json(DetokenizedText(serving.generator.tokenizer.decode(body.tokens, skip_special_tokens=False)))


def _schema(fields: dict[str, Any]) -> type[GenerateBody | TokenizeBody | TokenizeChatBody]:
    if "inputs" in fields:
        return GenerateBody
    if "messages" in fields:
        return TokenizeChatBody
    return TokenizeBody if "prompt" in fields else GenerateBody


async def _chat_prompt(state: ApiState, serving: Serving, body: ChatBody) -> str:
    body.check(state.config.api.max_concurrent_requests)
    adapter_id = adapter_of(state, body.model, body.adapter_name, body.adapter_access)
    return await chat_prompt(state, serving, body, adapter_id)


async def _count(serving: Serving, text: str, add_special_tokens: bool, spells: bool | None) -> TokenCount:
    tokenizer = serving.generator.tokenizer
    token_ids = await tokenizer.encode_async(text, add_special_tokens)
    spellings = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in token_ids] if spells else None
    return TokenCount(len(token_ids), serving.limits.max_total_tokens, token_ids, spellings)


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
