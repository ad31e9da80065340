"""The Starlette app: routes, middleware, exception handlers."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from loraplex_server.api.http_errors import handle_http_exception, handle_loraplex_error
from loraplex_server.api.http_protocol import HeaderLimits
from loraplex_server.api.middleware import ApiKeys, BodyLimit, RequestLog
from loraplex_server.api.routes import (
    adapters,
    lora_adapter,
    models,
    openai_chat,
    openai_completions,
    platforms,
    probes,
    responses,
    service,
    tgi,
    tokenize,
)
from loraplex_server.api.state import ApiState
from loraplex_server.api.tenants import Tenants
from loraplex_server.errors import LoraplexError

ROUTES = [
    Route("/", tgi.compat_generate, methods=["POST"]),
    Route("/", service.health, methods=["GET"]),
    Route("/generate", tgi.generate, methods=["POST"]),
    Route("/generate_stream", tgi.generate_stream, methods=["POST"]),
    Route("/tokenize", tokenize.tokenize, methods=["POST"]),
    Route("/detokenize", tokenize.detokenize, methods=["POST"]),
    Route("/chat_tokenize", tokenize.chat_tokenize, methods=["POST"]),
    Route("/invocations", platforms.invocations, methods=["POST"]),
    Route("/vertex", platforms.vertex, methods=["POST"]),
    Route("/v1/chat/completions", openai_chat.chat_completions, methods=["POST"]),
    Route("/v1/completions", openai_completions.completions, methods=["POST"]),
    Route("/v1/responses", responses.responses, methods=["POST"]),
    Route("/v1/load_lora_adapter", lora_adapter.load, methods=["POST"]),
    Route("/v1/unload_lora_adapter", lora_adapter.unload, methods=["POST"]),
    Route("/load_lora_adapter", lora_adapter.load_as_sglang, methods=["POST"]),
    Route("/unload_lora_adapter", lora_adapter.unload_as_sglang, methods=["POST"]),
    Route("/adapters", adapters.list_adapters, methods=["GET"]),
    Route("/adapters", adapters.register, methods=["POST"]),
    Route("/adapters/{name:path}", adapters.get_adapter, methods=["GET"]),
    Route("/adapters/{name:path}", adapters.change, methods=["PUT"]),
    Route("/adapters/{name:path}", adapters.delete, methods=["DELETE"]),
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{model_id:path}", models.get_model, methods=["GET"]),
    Route("/health", service.health, methods=["GET"]),
    Route("/ping", service.health, methods=["GET"]),
    Route("/health/live", probes.live, methods=["GET"]),
    Route("/health/ready", service.health, methods=["GET"]),
    Route("/startup", service.health, methods=["GET"]),
    Route("/version", probes.version, methods=["GET"]),
    Route("/load", probes.load, methods=["GET"]),
    Route("/tokenizer_info", probes.tokenizer_info, methods=["GET"]),
    Route("/info", service.info, methods=["GET"]),
    Route("/metrics", service.metrics, methods=["GET"]),
    Route("/docs", service.docs, methods=["GET"]),
    Route("/openapi.json", service.openapi, methods=["GET"]),
    Route("/api-doc/openapi.json", service.openapi, methods=["GET"]),
]
ROUTES += [Route(path, probes.not_served, methods=["POST"]) for path in probes.OTHER_MODELS_PATHS]


def build_app(state: ApiState) -> Starlette:
    """The app of one API process."""
    config = state.config.api
    admin_key = state.config.adapter_sources.admin_api_key
    admin_keys = () if admin_key is None else (admin_key,)
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(RequestLog),
            Middleware(HeaderLimits),
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_allow_origin) or ["*"],
                allow_methods=["GET", "POST"],
                allow_headers=["content-type", "authorization", "x-api-key", "x-request-id"],
                expose_headers=["x-request-id"],
            ),
            Middleware(ApiKeys, keys=config.api_key and (*config.api_key, *admin_keys)),
            Middleware(BodyLimit, limit=config.payload_limit),
            Middleware(Tenants, fairness_key=config.fairness_key),
        ],
        exception_handlers={
            LoraplexError: handle_loraplex_error,
            HTTPException: handle_http_exception,
        },
    )
    # A redirect to the other spelling of a path would lose a POST's body.
    app.router.redirect_slashes = False
    app.state.api = state
    return app
