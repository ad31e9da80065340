"""/tokenize in vLLM's form, /detokenize and /chat_tokenize; TGI's form is in test_generate_answers.py."""

from typing import Any

import httpx
import pytest
from scripted_engine import BOS, EOS, TestServer, with_server

USER = [{"role": "user", "content": "hi"}]


async def post(server: TestServer, path: str, **body: Any) -> httpx.Response:
    return await server.http.post(path, json=body)


def test_the_tokens_of_a_prompt_in_vllms_form() -> None:
    async def test(server: TestServer) -> None:
        answer = await post(server, "/tokenize", prompt="hi", model="pirate")
        expected = {"count": 3, "max_model_len": 60, "tokens": [BOS, 104, 105], "token_strs": None}
        assert answer.json() == expected
        answer = await post(server, "/tokenize", prompt="hi", add_special_tokens=False, return_token_strs=True)
        assert (answer.json()["tokens"], answer.json()["token_strs"]) == ([104, 105], ["h", "i"])

    with_server(test)


def test_the_tokens_of_a_conversation_in_vllms_form() -> None:
    async def test(server: TestServer) -> None:
        answer = await post(server, "/tokenize", messages=USER, add_generation_prompt=False)
        assert bytes(answer.json()["tokens"]).decode() == "u:hi;"

    with_server(test)


def test_inputs_are_answered_as_by_tgi_whatever_stands_beside_them() -> None:
    async def test(server: TestServer) -> None:
        answer = await post(server, "/tokenize", inputs="h", prompt="ignored")
        assert [token["id"] for token in answer.json()] == [BOS, 104]
        missing = await post(server, "/tokenize", text="h")
        assert missing.status_code == 422 and "missing field `inputs`" in missing.json()["error"]

    with_server(test)


def test_a_conversation_with_its_tokens() -> None:
    async def test(server: TestServer) -> None:
        body = (await post(server, "/chat_tokenize", messages=USER)).json()
        assert body["templated_text"] == "u:hi;a:"
        assert body["tokenize_response"][2] == {"id": 104, "text": "h", "start": 2, "stop": 3}
        assert len(body["tokenize_response"]) == 7

    with_server(test)


def test_token_ids_become_text_with_special_tokens_spelt() -> None:
    async def test(server: TestServer) -> None:
        answer = await post(server, "/detokenize", tokens=[BOS, 104, 105, EOS])
        assert answer.json() == {"prompt": "<s>hi</s>"}

    with_server(test)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/detokenize", {"tokens": [259]}, 422),
        ("/detokenize", {"tokens": [-1]}, 422),
        ("/detokenize", {"tokens": "hi"}, 422),
        ("/detokenize", {}, 422),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404),
        ("/tokenize", {"prompt": "hi", "model": "nobody"}, 404),
        ("/tokenize", {"messages": USER, "model": "nobody"}, 404),
        ("/tokenize", {"messages": []}, 422),
        ("/chat_tokenize", {"messages": USER, "model": "nobody"}, 404),
        ("/chat_tokenize", {"inputs": "hi"}, 422),
        ("/chat_tokenize", {"messages": [{"role": "bad", "content": "x"}]}, 422),
    ],
)
def test_refusals(path: str, body: dict[str, Any], status: int) -> None:
    async def test(server: TestServer) -> None:
        answer = await post(server, path, **body)
        assert answer.status_code == status
        assert isinstance(answer.json()["error"], str)

    with_server(test)
