"""Two tenants and a private adapter: who may not read it learns nothing of it, whether or not it is in use."""

import asyncio

import httpx
import pytest
from adapter_world import AdapterWorld, refusal, world
from scripted_engine import TestServer

__all__ = ["world"]

PROMPT = "the same words for everybody"


async def ask(server: TestServer, name: str = "acme/secret", token: str | None = None) -> httpx.Response:
    return await server.generate(PROMPT, adapter_id=name, api_token=token)


def without_name(answer: httpx.Response, name: str) -> tuple[int, str, list[str]]:
    """What an answer says, whatever the name in it; and its headers."""
    headers = sorted(key for key in answer.headers if key not in ("x-request-id", "content-length"))
    return answer.status_code, answer.text.replace(name, "NAME"), headers


def test_the_second_tenant_gets_404_before_and_after_the_first_has_loaded_it(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="alices")

    async def test(server: TestServer) -> None:
        nothing = without_name(await ask(server, "acme/nothing", "bobs"), "acme/nothing")
        nothing_without_token = without_name(await ask(server, "acme/nothing"), "acme/nothing")
        assert nothing[0] == nothing_without_token[0] == 404
        # Not even from the cache of refusals.
        assert without_name(await ask(server, token="bobs"), "acme/secret") == nothing
        assert (await ask(server, token="alices")).status_code == 200
        for _ in range(2):
            assert without_name(await ask(server, token="bobs"), "acme/secret") == nothing
            assert without_name(await ask(server), "acme/secret") == nothing_without_token
        assert (await ask(server, token="alices")).status_code == 200

    world.serve(test)


def test_what_a_private_adapter_is_called_is_told_to_nobody_else(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="alices")

    async def test(server: TestServer) -> None:
        assert (await ask(server, token="alices")).status_code == 200
        for path in ("/v1/models", "/adapters", "/metrics", "/info"):
            assert "secret" not in (await server.http.get(path)).text, path
        for path in ("/v1/models/acme/secret", "/adapters/acme/secret"):
            assert (await server.http.get(path)).status_code == 404
        assert "acme/secret" not in (await ask(server, "acme/secre")).text
        assert all("secret" not in spec.adapter_id for spec in world.engine.adapters.values())
        assert all("secret" not in (request.adapter_id or "") for request in world.engine.requests)

    world.serve(test)


def test_an_operator_sees_private_adapters_in_the_list(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="alices")

    async def test(server: TestServer) -> None:
        await ask(server, token="alices")
        listed = (await server.http.get("/adapters", headers={"authorization": "Bearer boss"})).json()["adapters"]
        assert "acme/secret" in [one["name"] for one in listed]

    world.serve(test, admin_api_key="boss")


def test_a_public_adapter_is_one_for_all_tenants_and_shares_its_prefixes(world: AdapterWorld) -> None:
    world.publish("acme/open")

    async def test(server: TestServer) -> None:
        for token in (None, "alices", "bobs"):
            assert (await ask(server, "acme/open", token)).status_code == 200
        assert len(world.digests()) == 1
        assert {request.cache_salt for request in world.engine.requests} == {None}

    world.serve(test)
    assert sum(line.startswith("GET /acme/open/resolve") for line in world.hub.requests) == 2


def test_the_same_content_fetched_privately_and_publicly_never_shares_prefixes(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="alices")
    world.publish("acme/open")

    async def test(server: TestServer) -> None:
        await ask(server, "acme/open", "bobs")
        await ask(server, token="alices")
        public, private = world.engine.requests
        assert public.adapter_digest == private.adapter_digest  # the weights are held once
        assert public.cache_salt is None and private.cache_salt
        assert "alices" not in private.cache_salt

    world.serve(test)


def test_two_tenants_with_access_are_kept_apart_all_the_same(world: AdapterWorld) -> None:
    repository = world.publish("acme/secret", private=True, token="alices")

    async def test(server: TestServer) -> None:
        await ask(server, token="alices")
        repository.token = "carols"
        assert (await ask(server, token="carols")).status_code == 200
        salts = [request.cache_salt for request in world.engine.requests]
        assert len(set(salts)) == 2 and None not in salts

    world.serve(test)


@pytest.mark.parametrize(("is_shared", "status"), [(False, 404), (True, 200)])
def test_a_token_of_the_server_is_used_for_callers_only_when_the_operator_says_so(
    world: AdapterWorld, is_shared: bool, status: int
) -> None:
    world.publish("acme/secret", private=True, token="operators")

    async def test(server: TestServer) -> None:
        assert (await ask(server)).status_code == status

    world.serve(test, hub_token="operators", share_hub_token=is_shared)


def test_a_hub_token_in_the_authorization_header_is_the_adapters(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="hf_alice")

    async def test(server: TestServer) -> None:
        body = {"model": "acme/secret", "prompt": "hi"}
        for key, status in (("hf_alice", 200), ("EMPTY", 404)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await server.http.post("/v1/completions", json=body, headers=headers)).status_code == status

    world.serve(test)


def test_the_servers_own_key_is_never_sent_to_the_hub(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="hf_key")

    async def test(server: TestServer) -> None:
        server.http.headers["authorization"] = "Bearer hf_key"
        assert refusal(await ask(server)) == (404, "adapter_not_found")

    world.serve(test, api_key=("hf_key",))


def test_a_flood_of_one_tenants_refusals_does_not_hide_the_adapter_from_another(world: AdapterWorld) -> None:
    world.publish("acme/secret", private=True, token="alices")

    async def test(server: TestServer) -> None:
        answers = await asyncio.gather(*(ask(server, token="bobs") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {404}
        asked = len(world.hub.requests)
        await ask(server, token="bobs")
        assert len(world.hub.requests) == asked
        assert (await ask(server, token="alices")).status_code == 200

    world.serve(test)
