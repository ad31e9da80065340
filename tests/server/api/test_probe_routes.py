"""vLLM's and LoRAX's small routes, and refusals of what the model cannot do."""

import pytest
from scripted_engine import TestServer, with_server

NOT_SERVED = ("/v1/embeddings", "/embed", "/classify", "/classify_batch", "/pooling", "/score", "/v1/score", "/rerank",
              "/v1/rerank")  # fmt: skip


def test_the_version_and_the_load() -> None:
    async def test(server: TestServer) -> None:
        assert set((await server.http.get("/version")).json()) == {"version"}
        assert (await server.http.get("/load")).json() == {"server_load": 0}

    with_server(test)


def test_the_process_is_live_before_it_is_ready() -> None:
    async def test(server: TestServer) -> None:
        assert (await server.http.get("/health/live")).status_code == 200
        for path in ("/health", "/health/ready", "/startup", "/ping"):
            assert (await server.http.get(path)).status_code == 503

    with_server(test, is_ready=False)


def test_the_tokenizer_tells_its_special_tokens_and_the_template() -> None:
    async def test(server: TestServer) -> None:
        found = (await server.http.get("/tokenizer_info")).json()
        assert found["eos_token"] == ";"  # the template's own word for it
        assert "add_generation_prompt" in found["chat_template"]

    async def without_template(server: TestServer) -> None:
        found = (await server.http.get("/tokenizer_info")).json()
        assert (found["eos_token"], found["chat_template"]) == ("</s>", None)

    with_server(test)
    with_server(without_template, chat_template=None)


@pytest.mark.parametrize("path", NOT_SERVED)
def test_what_needs_another_kind_of_model_is_404_with_the_reason(path: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post(path, json={"inputs": "x", "input": "x", "parameters": None, "stream": False})
        error = answer.json()["error"]
        text = error["message"] if path.startswith("/v1/") else error
        assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found")
        assert "tiny-base generates text" in text and path in text

    with_server(test)
