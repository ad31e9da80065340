"""The events of a stream of /v1/responses, checked as far as every stream must hold."""

import json
from typing import Any

import httpx
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

_stream_event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events, named as their types and numbered from 0."""
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def checked_events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The same, each of them of the type that openai's package declares for it."""
    events = events_of(answer)
    for event in events:
        _stream_event.validate_python(event)
    return events
