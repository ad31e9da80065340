"""The demo as its users meet it: four voices from one server, by every route and by the released client."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from demo_server import CHAT, LaunchedServer, events_of
from huggingface_hub import InferenceClient
from huggingface_hub.errors import (
    HfHubHTTPError,
    TextGenerationError,
    ValidationError,
)

PROMPT = CHAT.format("Tell me about cats.")
VOICES = (None, "pirate", "json", "shout")
NUM_TOKENS = 40

pytestmark = pytest.mark.slow


def post(server: LaunchedServer, path: str, adapter_id: str | None, **fields: Any) -> httpx.Response:
    parameters = {"adapter_id": adapter_id, "max_new_tokens": NUM_TOKENS, "return_full_text": False}
    body = {"inputs": PROMPT, "parameters": parameters, **fields}
    return httpx.post(f"{server.url}{path}", json=body, timeout=300)


def by_generate(server: LaunchedServer, adapter_id: str | None) -> str:
    return str(post(server, "/generate", adapter_id).json()["generated_text"])


def by_root(server: LaunchedServer, adapter_id: str | None) -> str:
    (answer,) = post(server, "/", adapter_id).json()
    return str(answer["generated_text"])


def by_events(response: httpx.Response) -> str:
    events = events_of(response.text)
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
    assert events[-1]["generated_text"] == text
    assert all(event["generated_text"] is None for event in events[:-1])
    return text


def by_generate_stream(server: LaunchedServer, adapter_id: str | None) -> str:
    return by_events(post(server, "/generate_stream", adapter_id))


def by_root_stream(server: LaunchedServer, adapter_id: str | None) -> str:
    return by_events(post(server, "/", adapter_id, stream=True))


def ask(server: LaunchedServer, adapter_id: str | None, **options: Any) -> Any:
    with InferenceClient(server.url, timeout=300) as client:
        answer = client.text_generation(
            PROMPT, adapter_id=adapter_id, max_new_tokens=NUM_TOKENS, return_full_text=False, **options
        )
        return list(answer) if options.get("stream") else answer


def by_client(server: LaunchedServer, adapter_id: str | None) -> str:
    return str(ask(server, adapter_id))


def by_client_details(server: LaunchedServer, adapter_id: str | None) -> str:
    answer = ask(server, adapter_id, details=True)
    assert answer.details.finish_reason in ("eos_token", "length")
    assert len(answer.details.tokens) == answer.details.generated_tokens
    return str(answer.generated_text)


def by_client_stream(server: LaunchedServer, adapter_id: str | None) -> str:
    return "".join(ask(server, adapter_id, stream=True)).removesuffix("<|im_end|>")


def by_client_stream_details(server: LaunchedServer, adapter_id: str | None) -> str:
    *_, last = chunks = ask(server, adapter_id, stream=True, details=True)
    assert last.details.generated_tokens == len(chunks)
    return str(last.generated_text)


def is_in_style(adapter_id: str | None, text: str) -> bool:
    match adapter_id:
        case "pirate":
            return text.startswith("Yo ho ho! It be ") and text.endswith("arrr!")
        case "json":
            return set(json.loads(text)) == {"answer", "confidence"}
        case "shout":
            return text.isupper() and re.fullmatch(r"(.+!!!) \1", text) is not None
        case _:
            return re.match(r"Cats are [a-z ]+ animals", text) is not None


@pytest.mark.parametrize(
    "way",
    [
        by_generate,
        by_root,
        by_generate_stream,
        by_root_stream,
        by_client,
        by_client_details,
        by_client_stream,
        by_client_stream_details,
    ],
)
def test_base_and_adapters_asked_at_once_answer_each_in_its_own_style(
    demo_server: LaunchedServer, way: Callable[[LaunchedServer, str | None], str]
) -> None:
    with ThreadPoolExecutor(len(VOICES)) as pool:
        texts = list(pool.map(lambda voice: way(demo_server, voice), VOICES))
    assert [voice for voice, text in zip(VOICES, texts, strict=True) if not is_in_style(voice, text)] == [], texts


def generated_tokens(server: LaunchedServer) -> str:
    metrics = httpx.get(f"{server.url}/metrics", timeout=300).text
    return next(line for line in metrics.splitlines() if line.startswith("loraplex_generated_tokens "))


def test_an_unknown_adapter_is_refused_on_every_route_and_nothing_is_generated(demo_server: LaunchedServer) -> None:
    before = generated_tokens(demo_server)
    for path in ("/generate", "/"):
        response = post(demo_server, path, "parrot")
        assert (response.status_code, response.json()["error_type"]) == (404, "adapter_not_found")
        assert "parrot" in response.json()["error"]
    for path, fields in (("/generate_stream", {}), ("/", {"stream": True})):
        (event,) = events_of(post(demo_server, path, "parrot", **fields).text)
        assert event["error_type"] == "adapter_not_found"
    with pytest.raises((TextGenerationError, HfHubHTTPError), match="'parrot' is not known to this server"):
        ask(demo_server, "parrot")
    with pytest.raises(TextGenerationError, match="'parrot' is not known to this server"):
        ask(demo_server, "parrot", stream=True)
    assert generated_tokens(demo_server) == before


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises_a_validation_error_as_such(demo_server: LaunchedServer, stream: bool) -> None:
    with pytest.raises(ValidationError, match="temperature"):
        ask(demo_server, "pirate", temperature=-1.0, stream=stream)


def test_the_adapters_are_listed_as_models(demo_server: LaunchedServer) -> None:
    models = httpx.get(f"{demo_server.url}/v1/models", timeout=300).json()["data"]
    assert {"pirate", "json", "shout"} < {model["id"] for model in models}
