"""The Starlette app: routes, middleware, exception handlers."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from loraplex_server.api.http_errors import handle_http_exception, handle_loraplex_error
from loraplex_server.api.middleware import ApiKeys, BodyLimit, RequestLog
from loraplex_server.api.routes import (
    models,
    openai_chat,
    openai_completions,
    platforms,
    responses,
    service,
    tgi,
    tokenize,
)
from loraplex_server.api.state import ApiState
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
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{model_id:path}", models.get_model, methods=["GET"]),
    Route("/health", service.health, methods=["GET"]),
    Route("/ping", service.health, methods=["GET"]),
    Route("/info", service.info, methods=["GET"]),
    Route("/metrics", service.metrics, methods=["GET"]),
    Route("/docs", service.docs, methods=["GET"]),
    Route("/openapi.json", service.openapi, methods=["GET"]),
    Route("/api-doc/openapi.json", service.openapi, methods=["GET"]),
]


def build_app(state: ApiState) -> Starlette:
    """The app of one API process."""
    config = state.config.api
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(RequestLog),
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_allow_origin) or ["*"],
                allow_methods=["GET", "POST"],
                allow_headers=["content-type", "authorization", "x-request-id"],
                expose_headers=["x-request-id"],
            ),
            Middleware(ApiKeys, keys=config.api_key),
            Middleware(BodyLimit, limit=config.payload_limit),
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
