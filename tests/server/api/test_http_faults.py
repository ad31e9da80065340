"""Bad requests at the HTTP and JSON level: the right status, a JSON body, and nothing reaches the engine."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from scripted_engine import TestServer, api_server, with_server

JSON = {"content-type": "application/json"}


def assert_error(answer: httpx.Response, status: int, error_type: str) -> None:
    assert (answer.status_code, answer.json()["error_type"]) == (status, error_type)
    assert isinstance(answer.json()["error"], str)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'a': 1}", b'{"inputs": "hi"} x', b'{"inputs": NaN}', b'{"inputs": Infinity}', b"\xff\xfe",
     b'{"inputs": "\xff"}', b'{"inputs": "\\ud800 alone"}', b"[" * 100_000, b'\xef\xbb\xbf{"inputs": "hi"}'],
)  # fmt: skip
def test_what_is_not_json_is_400(content: bytes) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", content=content, headers=JSON)
        assert_error(answer, 400, "invalid_json")
        assert not server.engine.requests

    with_server(test)


def test_a_syntax_error_is_reported_with_its_line_and_column() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", content=b'{\n "inputs": x\n}', headers=JSON)
        assert answer.json()["error"].endswith("at line 2 column 12")

    with_server(test)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"[]", "a list"), (b"5", "a number"), (b"null", "null"), (b'"hi"', "a string"), (b"true", "a boolean")],
)
def test_json_that_is_no_object_is_422(content: bytes, found: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", content=content, headers=JSON)
        assert_error(answer, 422, "validation")
        assert answer.json()["error"].endswith(f"expected a JSON object, got {found}")

    with_server(test)


def test_a_number_out_of_range_is_422() -> None:
    async def test(server: TestServer) -> None:
        content = b'{"inputs": "hi", "parameters": {"temperature": 1e400}}'
        assert_error(await server.http.post("/generate", content=content, headers=JSON), 422, "validation")

    with_server(test)


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_is_not_announced_as_json_is_415(media_type: str | None) -> None:
    async def test(server: TestServer) -> None:
        headers = {"content-type": media_type} if media_type else {}
        answer = await server.http.post("/generate", content=b'{"inputs": "hi"}', headers=headers)
        assert_error(answer, 415, "unsupported_media_type")
        assert "application/json" in answer.json()["error"]

    with_server(test)


@pytest.mark.parametrize(
    "media_type", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_the_spellings_of_json_are_understood(media_type: str) -> None:
    async def test(server: TestServer) -> None:
        headers = {"content-type": media_type}
        answer = await server.http.post("/generate", content=b'{"inputs": "hi"}', headers=headers)
        assert answer.status_code == 200

    with_server(test)


@pytest.mark.parametrize(("size", "status"), [(1000, 200), (1001, 413)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_body_limit_holds_for_announced_and_chunked_bodies(size: int, status: int, is_chunked: bool) -> None:
    body = b'{"inputs": "hi"}'
    body += b" " * (size - len(body))

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async def run() -> None:
        async with api_server(live=True, payload_limit=1000) as server:
            content = chunks() if is_chunked else body
            answer = await server.http.post("/generate", content=content, headers=JSON)
            assert answer.status_code == status
            if status == 413:
                assert_error(answer, 413, "payload_too_large")
                assert "1000 bytes" in answer.json()["error"]
                assert answer.headers["connection"] == "close"

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/nowhere", "/generate/", "//generate", "/v2", "/health/"])
def test_an_unknown_path_is_404_and_never_a_redirect(path: str) -> None:
    async def test(server: TestServer) -> None:
        assert_error(await server.http.post(f"http://api{path}", json={"inputs": "hi"}), 404, "not_found")

    with_server(test)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/generate", "POST"), ("PUT", "/generate", "POST"), ("POST", "/health", "GET"), ("DELETE", "/", "POST")],
)
def test_a_wrong_method_is_405_with_allow(method: str, path: str, allowed: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.request(method, path)
        assert_error(answer, 405, "method_not_allowed")
        assert allowed in answer.headers["allow"]

    with_server(test)


def test_head_on_health_is_get_without_a_body_and_starts_nothing_elsewhere() -> None:
    async def test(server: TestServer) -> None:
        assert (await server.http.head("/health")).status_code == 200
        assert (await server.http.head("/generate")).status_code == 405
        assert (await server.http.options("/generate")).status_code == 405
        assert not server.engine.requests

    with_server(test)


def test_a_v1_error_has_openais_shape() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.get("/v1/models/org/none")
        assert answer.status_code == 404
        assert answer.json() == {
            "error": {
                "message": "adapter 'org/none' is not known to this server",
                "type": "adapter_not_found",
                "param": None,
                "code": "model_not_found",
            },
            "error_type": "adapter_not_found",
        }

    with_server(test)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1._X", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False), ("a\x7fb", False)],
)
def test_a_request_id_is_kept_when_it_is_safe_and_made_when_not(given: str, is_kept: bool) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", json={"inputs": "hi"}, headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) is is_kept
        assert answer.headers["x-request-id"]
        assert server.engine.requests[0].request_id.startswith(answer.headers["x-request-id"] + "#")

    with_server(test)


def test_errors_too_carry_the_request_id() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.get("/nowhere", headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"

    with_server(test)


def test_our_own_mistake_is_500_without_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: TestServer) -> None:
        server.state.adapters = None  # type: ignore[assignment]
        answer = await server.generate("hi", adapter_id="pirate")
        assert_error(answer, 500, "internal")
        assert answer.headers["x-should-retry"] == "false"
        assert "NoneType" not in answer.text
        assert answer.headers["x-request-id"]

    with_server(test)
    assert "NoneType" in caplog.text


def test_the_access_log_has_a_line_a_request_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test(server: TestServer) -> None:
        await server.generate("SECRET-PROMPT", adapter_id="pirate", path="/generate_stream")
        await server.generate("SECRET-PROMPT", adapter_id="evil\nname", api_token="SECRET-TOKEN")
        await server.generate("SECRET-PROMPT" * 10, stop=["SECRET"])
        await server.http.get("/a%0Ab%1B[31m")
        await server.http.get("/health")

    with_server(test)
    lines = [record.getMessage() for record in caplog.records if record.name == "loraplex.access"]
    assert len(lines) == 4
    assert lines[0].startswith("POST /generate_stream 200 ")
    assert lines[0].endswith("adapter='pirate' tokens=4")
    assert " 422 " in lines[2] and lines[2].endswith("error=validation")
    assert not any("\n" in line or "\x1b" in line for line in lines)
    assert "SECRET" not in caplog.text


def test_the_pieces_of_a_large_body_are_parsed_elsewhere_to_the_same_end() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", json={"inputs": "hi", "ignored": "x" * 400_000})
        assert answer.status_code == 200
        content = json.dumps({"inputs": 1, "ignored": "x" * 400_000}).encode()
        assert_error(await server.http.post("/generate", content=content, headers=JSON), 422, "validation")

    with_server(test)


def test_500_unknown_fields_change_nothing() -> None:
    async def test(server: TestServer) -> None:
        unknown = {f"field{i}": i for i in range(500)}
        body = {"inputs": "hi", "parameters": {"max_new_tokens": 5, **unknown}, **unknown}
        assert (await server.http.post("/generate", json=body)).json() == {"generated_text": "hello"}

    with_server(test)
