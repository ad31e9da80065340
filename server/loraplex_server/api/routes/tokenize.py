"""POST /tokenize in TGI's shape."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from loraplex_server.api.body import read_body
from loraplex_server.api.schemas.tgi import GenerateBody
from loraplex_server.api.state import ApiState


async def tokenize(request: Request) -> Response:
    """The prompt's tokens with their places in the text. The adapter changes nothing, but it must exist."""
    body = await read_body(request, GenerateBody)
    state: ApiState = request.app.state.api
    serving = await state.serving()
    if body.parameters is not None and body.parameters.adapter_id:
        state.registry.resolve(body.parameters.adapter_id)
    spans = await serving.generator.tokenizer.encode_with_offsets(body.inputs)
    return Response(msgspec.json.encode(spans), media_type="application/json")
