"""Whom a request shares its turn with, as the engine is told."""

from typing import Any

import pytest
from scripted_engine import TestServer, with_server

ALICE, BOB = {"authorization": "Bearer alice"}, {"authorization": "Bearer bob"}


def tenants_of(fairness_key: str, *heads: dict[str, str], path: str = "/generate") -> list[str | None]:
    found: list[str | None] = []

    async def test(server: TestServer) -> None:
        for headers in heads:
            body: dict[str, Any] = {"inputs": "hi"}
            answer = await server.http.post(path, json=body, headers=headers)
            assert answer.status_code == 200
        found.extend(request.tenant for request in server.engine.requests)

    with_server(test, fairness_key=fairness_key)
    return found


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_each_key_is_a_tenant_and_its_name_gives_the_key_not_away(path: str):
    alice, bob, nobody, again = tenants_of("api-key", ALICE, BOB, {}, ALICE, path=path)
    assert alice == again and len({alice, bob, nobody}) == 3
    assert nobody == "" and "alice" not in str(alice)


def test_a_header_names_the_tenant():
    one, other, none = tenants_of("header:X-Tenant", {"x-tenant": "1"}, {"x-tenant": "2" * 5000}, ALICE)
    assert len({one, other, none}) == 3 and len(str(other)) == 32


def test_without_a_key_the_adapter_decides_and_none_makes_all_one():
    assert tenants_of("adapter", ALICE, BOB) == [None, None]
    assert tenants_of("none", ALICE, BOB) == ["", ""]
