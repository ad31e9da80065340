"""Small routes of vLLM's and LoRAX's, and clear refusals of what a model that generates text cannot do."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.own_version import own_version
from loraplex_server.api.state import ApiState
from loraplex_server.errors import NotServed

# Routes of other kinds of models, which clients try: refused with the reason.
OTHER_MODELS_PATHS = (
    *("/v1/embeddings", "/embed", "/classify", "/classify_batch", "/pooling"),
    *("/score", "/v1/score", "/rerank", "/v1/rerank"),
)


async def live(request: Request) -> Response:
    """GET /health/live: the process answers, whether it is ready or not."""
    return Response()


async def version(request: Request) -> Response:
    """GET /version, as vLLM: our own version."""
    return _json({"version": own_version()})


async def load(request: Request) -> Response:
    """GET /load, as vLLM: the sequences in flight."""
    state: ApiState = request.app.state.api
    return _json({"server_load": (await state.serving()).generator.admission.num_permits_taken})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info, as vLLM: the special tokens and the chat template, for clients that render prompts."""
    state: ApiState = request.app.state.api
    serving = await state.serving()
    tokenizer, template = serving.generator.tokenizer, serving.chat_template
    found: dict[str, Any] = {} if template is None else dict(template.special_tokens)
    if serving.limits.end_token_ids:
        found.setdefault("eos_token", tokenizer.token_text(serving.limits.end_token_ids[0]))
    found["chat_template"] = None if template is None else template.source
    found["model_max_length"] = serving.limits.max_total_tokens
    found["vocab_size"] = serving.limits.vocab_size
    return _json(found)


async def not_served(request: Request) -> Response:
    """Embeddings, classes and scores need a model that was trained for them."""
    state: ApiState = request.app.state.api
    raise NotServed(
        f"{request.url.path} needs an embedding or classification model; {state.config.api.model_id} generates text: "
        "use /v1/chat/completions, /v1/completions or /generate"
    )


def _json(content: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
