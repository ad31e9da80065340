"""API keys and CORS."""

import pytest
from scripted_engine import TestServer, with_server

from loraplex_server.api.app import ROUTES

KEYS = ("first-key", "Second-Key")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("Bearer Second-Key", 200),
        ("bearer first-key", 200),
        ("Bearer  first-key ", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer second-key", 401),
        ("Bearer first-key2", 401),
        ("Bearer first", 401),
        ("Basic first-key", 401),
        ("first-key", 401),
        ("Bearer " + "x" * 10_000, 401),
        ("Bearer kéy", 401),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/tokenize"])
def test_a_key_opens_the_routes(path: str, header: str | None, status: int) -> None:
    async def test(server: TestServer) -> None:
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        answer = await server.http.post(path, json={"inputs": "hi"}, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error_type"] == "unauthorized"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "first-key" not in answer.text
            assert not server.engine.requests

    with_server(test, api_key=KEYS)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "first-key"}, 200),
        ({"x-api-key": " Second-Key "}, 200),
        ({"x-api-key": "second-key"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "wrong", "authorization": "Bearer first-key"}, 200),
        ({"x-api-key": "first-key", "authorization": "Basic abc"}, 200),
        ({"x-api-key": "wrong", "authorization": "Bearer wrong"}, 401),
    ],
)
def test_a_key_may_come_as_x_api_key(headers: dict[str, str], status: int) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", json={"inputs": "hi"}, headers=headers)
        assert answer.status_code == status

    with_server(test, api_key=KEYS)


def test_every_route_but_health_and_metrics_needs_the_key() -> None:
    async def test(server: TestServer) -> None:
        for route in ROUTES:
            for method in route.methods or ():
                answer = await server.http.request(method, route.path.replace("{", "").replace("}", ""))
                is_open = method in ("GET", "HEAD") and route.path in (
                    *("/", "/health", "/health/live", "/health/ready", "/startup", "/ping", "/metrics"),
                )
                assert (answer.status_code != 401) is is_open, (method, route.path)

    with_server(test, api_key=KEYS)


def test_the_prober_and_the_scraper_need_no_key_and_the_rest_does() -> None:
    async def test(server: TestServer) -> None:
        for path in ("/health", "/ping", "/", "/metrics"):
            assert (await server.http.get(path)).status_code == 200
        for path in ("/info", "/v1/models", "/v1/models/x", "/docs", "/openapi.json", "/nowhere"):
            assert (await server.http.get(path)).status_code == 401
        assert (await server.http.get("/v1/models")).json()["error"]["type"] == "unauthorized"

    with_server(test, api_key=KEYS)


def test_without_keys_everything_is_open() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", json={"inputs": "hi"}, headers={"authorization": "Bearer x"})
        assert answer.status_code == 200

    with_server(test)


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        ((), "http://a.example", "*"),
        (("http://a.example", "http://b.example"), "http://b.example", "http://b.example"),
        (("http://a.example",), "http://c.example", None),
    ],
)
def test_a_browser_may_ask_from_the_allowed_origins(
    allowed: tuple[str, ...], origin: str, answered: str | None
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/generate", json={"inputs": "hi"}, headers={"origin": origin})
        assert answer.headers.get("access-control-allow-origin") == answered
        preflight = await server.http.options(
            "/generate",
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "content-type,authorization",
            },
        )
        assert preflight.status_code == (400 if answered is None else 200)

    with_server(test, cors_allow_origin=allowed)


def test_a_preflight_needs_no_key() -> None:
    async def test(server: TestServer) -> None:
        headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
        assert (await server.http.options("/generate", headers=headers)).status_code == 200

    with_server(test, api_key=KEYS)
