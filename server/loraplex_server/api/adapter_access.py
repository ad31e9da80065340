"""What a request's headers say of its adapter: a token for the source, and what a split between versions sticks to."""

import dataclasses

from starlette.requests import Request

from loraplex_server.api.job import AdapterAccess, GenerationJob
from loraplex_server.api.state import ApiState

SPLIT_KEY_HEADER = "x-adapter-split-key"
# How the hub's tokens begin. Clients of OpenAI's routes send a key of some kind always, and one that is no token of the
# hub would be refused there even for a public adapter.
HUB_TOKEN_PREFIX = "hf_"


def with_headers(request: Request, job: GenerationJob) -> GenerationJob:
    """The job with what the headers say of its adapter; what the body says comes first."""
    if job.adapter_name is None:
        return job
    access = job.adapter_access
    header_key = request.headers.get(SPLIT_KEY_HEADER)
    return dataclasses.replace(
        job,
        adapter_access=AdapterAccess(
            source=access.source,
            token=access.token or _bearer_token(request),
            split_key=header_key or access.split_key or request.state.request_id,
        ),
    )


def _bearer_token(request: Request) -> str | None:
    """The authorization header as LoRAX reads it: as the adapter's token, where it is not this server's own key."""
    state: ApiState = request.app.state.api
    if state.config.api.api_key:
        return None
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token.startswith(HUB_TOKEN_PREFIX) else None
