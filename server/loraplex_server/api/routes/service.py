"""Health, information and metrics: /health, /ping, GET /, /info, /metrics, /docs and the OpenAPI document."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from loraplex_server.api.docs_page import docs_page
from loraplex_server.api.openapi import openapi_document
from loraplex_server.api.own_version import own_version
from loraplex_server.api.state import ApiState
from loraplex_server.errors import NotReady
from loraplex_server.metrics import CONTENT_TYPE

# The release of TGI that the routes are true to; clients choose their way of speaking by it.
TGI_VERSION = "3.3.7"


async def health(request: Request) -> Response:
    """GET /health, /ping and /: 200 and nothing when requests can be served."""
    state: ApiState = request.app.state.api
    if not state.is_healthy:
        raise NotReady("unhealthy")
    return Response()


async def info(request: Request) -> Response:
    """GET /info: the model and the limits, with the fields of every TGI release."""
    state: ApiState = request.app.state.api
    limits = (await state.serving()).limits
    api = state.config.api
    content: dict[str, Any] = {
        "model_id": api.model_id,
        "model_sha": api.model_sha,
        "model_pipeline_tag": "text-generation",
        "model_dtype": limits.dtype,
        "model_device_type": limits.device,
        "max_concurrent_requests": api.max_concurrent_requests,
        "max_best_of": api.max_best_of,
        "max_stop_sequences": api.max_stop_sequences,
        "max_top_n_tokens": api.max_top_n_tokens,
        "max_input_tokens": limits.max_input_tokens,
        "max_input_length": limits.max_input_tokens,
        "max_total_tokens": limits.max_total_tokens,
        "waiting_served_ratio": 0.3,
        "max_batch_prefill_tokens": limits.max_batch_prefill_tokens,
        "max_batch_total_tokens": limits.max_batch_total_tokens,
        "max_waiting_tokens": 20,
        "max_batch_size": limits.max_batch_size,
        "validation_workers": api.validation_workers,
        "max_client_batch_size": api.max_client_batch_size,
        "router": "text-generation-router",
        "version": TGI_VERSION,
        "loraplex_version": own_version(),
        "sha": None,
        "docker_label": None,
    }
    return Response(msgspec.json.encode(content), media_type="application/json")


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus' text format."""
    state: ApiState = request.app.state.api
    return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def openapi(request: Request) -> Response:
    """GET /openapi.json and /api-doc/openapi.json."""
    return Response(msgspec.json.encode(openapi_document()), media_type="application/json")


async def docs(request: Request) -> Response:
    """GET /docs: the same as a page to read; it loads nothing from elsewhere."""
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return HTMLResponse(docs_page(openapi_document()), headers=policy)
