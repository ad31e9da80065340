"""Chat templates that adapters bring: used where the operator allows it, and only for chats with that adapter."""

from pathlib import Path

import pytest
import scripted_engine
from scripted_engine import TestServer, with_server

from loraplex_server.messages import AdapterSpec

USER = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Adapters whose files lie in folders of this test."""

    def source(adapter_id: str) -> AdapterSpec:
        (tmp_path / adapter_id).mkdir(exist_ok=True)
        return AdapterSpec(
            adapter_id=adapter_id, path=str(tmp_path / adapter_id), digest=f"d-{adapter_id}", rank=8, num_bytes=1
        )

    monkeypatch.setattr(scripted_engine, "adapter_source", source)
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate" / "chat_template.jinja").write_text("P:{{ messages[0].content }}{{ eos_token }}")
    return tmp_path


async def prompt_of(server: TestServer, model: str) -> str:
    answer = await server.http.post("/v1/chat/completions", json=USER | {"model": model})
    assert answer.status_code == 200, answer.text
    return bytes(server.engine.requests.pop().prompt_token_ids).decode()


@pytest.mark.parametrize("is_allowed", [False, True])
def test_an_adapters_template_is_used_where_it_is_allowed(folders: Path, is_allowed: bool) -> None:
    async def test(server: TestServer) -> None:
        assert await prompt_of(server, "pirate") == ("P:hi;" if is_allowed else "u:hi;a:")
        assert await prompt_of(server, "json") == "u:hi;a:"  # it brings none
        assert await prompt_of(server, "tgi") == "u:hi;a:"
        tokens = await server.http.post("/chat_tokenize", json=USER | {"model": "pirate"})
        assert tokens.json()["templated_text"] == ("P:hi;" if is_allowed else "u:hi;a:")

    with_server(test, adapter_chat_templates=is_allowed)


@pytest.mark.parametrize("template", ["{% if", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_is_422_for_its_own_chats(folders: Path, template: str) -> None:
    (folders / "pirate" / "chat_template.jinja").write_text(template)

    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/chat/completions", json=USER | {"model": "pirate"})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "template_error")
        assert str(folders) not in answer.text
        assert await prompt_of(server, "json") == "u:hi;a:"

    with_server(test, adapter_chat_templates=True)
