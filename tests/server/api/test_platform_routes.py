"""/invocations and /vertex: the same answers in hosting platforms' envelopes."""

from typing import Any

import pytest
from scripted_engine import TestServer, with_server

USER = [{"role": "user", "content": "hi"}]
HEADER = "X-Amzn-SageMaker-Adapter-Identifier"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"inputs": "hi", "parameters": {"return_full_text": False}}, "hello world"),
        ({"inputs": "hi", "parameters": {"adapter_id": "pirate", "return_full_text": False}}, "arr"),
        ({"messages": USER, "model": "pirate"}, "arr"),
        ({"prompt": "hi", "model": "pirate"}, "arr"),
    ],
)
def test_the_fields_of_an_invocation_choose_its_route(body: dict[str, Any], text: str) -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.http.post("/invocations", json=body)).json()
        if "inputs" in body:
            assert answer == [{"generated_text": text}]
        else:
            choice = answer["choices"][0]
            assert (choice.get("text") or choice["message"]["content"]) == text

    with_server(test)


@pytest.mark.parametrize("body", [{"inputs": "hi"}, {"messages": USER}, {"prompt": "hi"}])
def test_sagemakers_header_chooses_the_adapter(body: dict[str, Any]) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/invocations", json=body, headers={HEADER: "pirate"})
        assert answer.status_code == 200
        assert server.engine.requests[-1].adapter_id == "pirate"
        assert server.engine.requests[-1].sampling.do_sample
        unknown = await server.http.post("/invocations", json=body, headers={HEADER: "nobody"})
        assert (unknown.status_code, unknown.json()["error_type"]) == (404, "adapter_not_found")

    with_server(test)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "hi", "parameters": {"adapter_id": "json"}},
        {"messages": USER, "adapter_id": "json"},
        {"messages": USER, "model": "json"},
    ],
)
def test_a_header_and_a_body_that_disagree_are_refused(body: dict[str, Any]) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/invocations", json=body, headers={HEADER: "pirate"})
        assert answer.status_code == 422 and not server.engine.requests

    with_server(test)


def test_an_invocation_can_be_a_stream() -> None:
    async def test(server: TestServer) -> None:
        for body in ({"inputs": "hi", "stream": True}, {"messages": USER, "stream": True}):
            answer = await server.http.post("/invocations", json=body)
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.text.endswith("data: [DONE]\n\n") == ("messages" in body)

    with_server(test)


def test_vertex_answers_each_instance_with_a_text() -> None:
    async def test(server: TestServer) -> None:
        instances = [
            {"inputs": "hi", "parameters": {"max_new_tokens": 5, "seed": 3}},
            {"messages": USER, "model": "pirate", "stop": "r"},
            {"inputs": "hi", "parameters": {"adapter_id": "json"}},
        ]
        answer = await server.http.post("/vertex", json={"instances": instances})
        assert answer.json() == {"predictions": ["hello", "a", '{"a": 1}']}

    with_server(test)


@pytest.mark.parametrize(
    ("instances", "status"),
    [
        ([], 422),
        ([{"inputs": "hi"}] * 5, 422),
        ([{"nothing": 1}], 422),
        ([{"inputs": "hi"}, {"inputs": ""}], 422),
        ([{"messages": USER, "n": 2}], 422),
        ([{"messages": USER, "stream": True}], 422),
        ([{"inputs": "hi", "parameters": {"adapter_id": "nobody"}}], 404),
        ([{"messages": USER, "model": "nobody"}], 404),
    ],
)
def test_vertex_refuses(instances: list[Any], status: int) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/vertex", json={"instances": instances})
        assert answer.status_code == status, answer.text
        await server.until_idle()

    with_server(test)
