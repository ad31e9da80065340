"""POST /invocations (SageMaker) and /vertex (Vertex AI): hosting platforms' envelopes around the routes above."""

from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.adapter_access import with_headers
from loraplex_server.api.body import read_body, read_one_of
from loraplex_server.api.choices import complete_all
from loraplex_server.api.disconnect import while_connected
from loraplex_server.api.job import FinishedJob, GenerationJob
from loraplex_server.api.model_names import adapter_of
from loraplex_server.api.openai_stream import answer_headers, note_for_log
from loraplex_server.api.routes.openai_chat import answer_chat, chat_job, chat_text
from loraplex_server.api.routes.openai_completions import answer_completion
from loraplex_server.api.routes.tgi import answer_compat
from loraplex_server.api.schemas.openai import ChatBody, CompletionBody
from loraplex_server.api.schemas.tgi import CompatGenerateBody, GenerateBody, GenerateParameters
from loraplex_server.api.state import ApiState, Serving
from loraplex_server.errors import InvalidRequest

OpenAIBody = TypeVar("OpenAIBody", ChatBody, CompletionBody)

# By this header SageMaker names the adapter of a request.
ADAPTER_HEADER = "x-amzn-sagemaker-adapter-identifier"


class VertexBody(BaseModel):
    """The body of /vertex."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    instances: list[GenerateBody | ChatBody] = Field(description="bodies of /generate or of /v1/chat/completions")


class Predictions(msgspec.Struct, frozen=True):
    """The answer of /vertex: a text for each instance."""

    predictions: list[str]


async def invocations(request: Request) -> Response:
    """A body of POST /, of chat or of completions, told apart by its fields, and that route's answer."""
    body = await read_one_of(request, _schema)
    adapter_id = request.headers.get(ADAPTER_HEADER)
    match body:
        case ChatBody():
            return await answer_chat(request, _with_adapter(body, adapter_id))
        case CompletionBody():
            return await answer_completion(request, _with_adapter(body, adapter_id))
        case CompatGenerateBody():
            if adapter_id:
                # A body without parameters is sampled.
                parameters = body.parameters or GenerateParameters.model_validate({"do_sample": True})
                if parameters.adapter_id not in (None, "", adapter_id):
                    raise InvalidRequest(f"the header {ADAPTER_HEADER} and `adapter_id` name different adapters")
                body = body.model_copy(update={"parameters": parameters.model_copy(update={"adapter_id": adapter_id})})
            return await answer_compat(request, body)


def _schema(fields: dict[str, Any]) -> type[CompatGenerateBody | ChatBody | CompletionBody]:
    if "inputs" in fields:
        return CompatGenerateBody
    if "messages" in fields:
        return ChatBody
    return CompletionBody if "prompt" in fields else CompatGenerateBody


def _with_adapter(body: OpenAIBody, adapter_id: str | None) -> OpenAIBody:
    if not adapter_id:
        return body
    if body.adapter_id not in (None, "", adapter_id):
        raise InvalidRequest(f"the header {ADAPTER_HEADER} and `adapter_id` name different adapters")
    return body.model_copy(update={"adapter_id": adapter_id})


async def vertex(request: Request) -> Response:
    """Generate a text for each instance; the first that fails fails them all."""
    body = await read_body(request, VertexBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    api = state.config.api
    if not 1 <= len(body.instances) <= api.max_client_batch_size:
        raise InvalidRequest(
            f"`instances` must be from 1 to {api.max_client_batch_size} (--max-client-batch-size). "
            f"Given: {len(body.instances)}"
        )
    jobs = [with_headers(request, await _job(state, serving, instance)) for instance in body.instances]
    finished = await while_connected(request, complete_all(serving.generator, jobs, request.state.request_id))
    note_for_log(request, jobs[0].adapter_id, sum(job.best.completion.num_generated_tokens for job in finished))
    texts = [_text(instance, job) for instance, job in zip(body.instances, finished, strict=True)]
    return Response(
        msgspec.json.encode(Predictions(texts)), headers=answer_headers(state, None), media_type="application/json"
    )


async def _job(state: ApiState, serving: Serving, instance: GenerateBody | ChatBody) -> GenerationJob:
    if isinstance(instance, GenerateBody):
        return instance.job(stream=False)
    if instance.stream or instance.num_choices != 1:
        raise InvalidRequest("`instances` can neither be streamed nor have several answers")
    instance.check(1)
    adapter_id = adapter_of(state, instance.model, instance.adapter_name, instance.adapter_access)
    return await chat_job(state, serving, instance, adapter_id)


def _text(instance: GenerateBody | ChatBody, job: FinishedJob) -> str:
    return job.best.completion.text if isinstance(instance, GenerateBody) else chat_text(instance, job)[0]
