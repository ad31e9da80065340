"""vLLM's additions to OpenAI's bodies: what reaches the engine, and what they add to answers."""

import json
from typing import Any

import httpx
import pytest
from scripted_engine import EOS, TestServer, with_server

USER = [{"role": "user", "content": "hi"}]
PROMPT_IDS = [256, *b"hi"]


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    events = [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_bans_reach_the_engine_in_tokens() -> None:
    async def test(server: TestServer) -> None:
        fields = {"min_tokens": 2, "stop_token_ids": [98], "allowed_token_ids": [97, EOS], "bad_words": ["x", " yz"]}
        await server.http.post("/v1/completions", json={"prompt": "hi", **fields})
        sampling = server.engine.requests[0].sampling
        assert (sampling.min_new_tokens, sampling.held_back_token_ids) == (2, (EOS, 98))
        assert sampling.allowed_token_ids == (97, EOS)
        assert sampling.bad_words == ((*b"x",), (*b" x",), (*b"yz",), (*b" yz",))
        await server.http.post("/v1/completions", json={"prompt": "hi", "stop_token_ids": [98]})
        assert server.engine.requests[1].sampling.held_back_token_ids == ()

    with_server(test)


def test_a_stop_text_before_the_least_length_ends_nothing() -> None:
    async def test(server: TestServer) -> None:
        for least, text in ((0, "hell"), (5, "hello w")):
            body = {"prompt": "hi", "stop": "o", "min_tokens": least}
            answer = await server.http.post("/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == text

    with_server(test)


def test_token_ids_of_prompt_and_answer() -> None:
    async def test(server: TestServer) -> None:
        body = {"prompt": ["hi", "yo"], "max_tokens": 3, "return_token_ids": True}
        found = (await server.http.post("/v1/completions", json=body)).json()["choices"]
        assert [choice["token_ids"] for choice in found] == [[*b"hel"], [*b"hel"]]
        assert [choice["prompt_token_ids"] for choice in found] == [PROMPT_IDS, [256, *b"yo"]]
        chunks = chunks_of(await server.http.post("/v1/completions", json=body | {"prompt": "hi", "stream": True}))
        assert [c["choices"][0]["prompt_token_ids"] for c in chunks if "prompt_token_ids" in c["choices"][0]] == [
            PROMPT_IDS
        ]
        assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == [*b"hel"]

        chat = {"messages": USER, "return_token_ids": True}
        answer = (await server.http.post("/v1/chat/completions", json=chat)).json()
        assert answer["choices"][0]["token_ids"] == [*b"hello world", EOS]
        assert answer["prompt_token_ids"] == [*b"u:hi;a:"]
        chunks = chunks_of(await server.http.post("/v1/chat/completions", json=chat | {"stream": True}))
        assert chunks[0]["prompt_token_ids"] == [*b"u:hi;a:"]
        assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == [*b"hello world", EOS]
        plain = (await server.http.post("/v1/chat/completions", json={"messages": USER})).json()
        assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]

    with_server(test)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("with_last", [False, True])
def test_running_counts_are_in_every_chunk(path: str, with_last: bool) -> None:
    async def test(server: TestServer) -> None:
        options = {"continuous_usage_stats": True, "include_usage": with_last}
        body = {"prompt": "hi", "messages": USER, "max_tokens": 4, "stream": True, "stream_options": options}
        chunks = chunks_of(await server.http.post(path, json=body))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 4
        assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
        assert (chunks[-1]["choices"] == []) is with_last

    with_server(test)


def test_log_probabilities_by_token_id_and_of_the_prompt() -> None:
    async def test(server: TestServer) -> None:
        body = {"prompt": "hi", "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
        choice = (await server.http.post("/v1/completions", json=body | {"prompt_logprobs": 1})).json()["choices"][0]
        assert choice["logprobs"]["tokens"] == [f"token_id:{ord('h')}"]
        assert choice["logprobs"]["top_logprobs"] == [{f"token_id:{ord('h')}": -0.25}]
        assert choice["text"] == "h"
        likely = {str(ord("t")): {"logprob": -0.5, "rank": 1, "decoded_token": "t"}}
        assert choice["prompt_logprobs"] == [
            None,
            *(
                {str(one): {"logprob": -1.0, "rank": None, "decoded_token": chr(one)}} | likely
                for one in PROMPT_IDS[1:]
            ),
        ]
        chat = {"messages": USER, "prompt_logprobs": 0, "max_tokens": 1}
        answer = (await server.http.post("/v1/chat/completions", json=chat)).json()
        assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == 7
        chat = {"messages": USER, "logprobs": True, "return_tokens_as_token_ids": True, "max_tokens": 1}
        answer = (await server.http.post("/v1/chat/completions", json=chat)).json()
        assert answer["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{ord('h')}"

    with_server(test)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"stop": ["lo", "wo"]}, "lo"), ({"stop_token_ids": [ord("o")]}, ord("o")), ({}, None), ({"max_tokens": 1}, None)],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_stopped_an_answer_is_told(path: str, fields: dict[str, Any], reason: str | int | None) -> None:
    async def test(server: TestServer) -> None:
        body = {"prompt": "hi", "messages": USER, **fields}
        choice = (await server.http.post(path, json=body)).json()["choices"][0]
        assert choice.get("stop_reason") == reason
        last = chunks_of(await server.http.post(path, json=body | {"stream": True}))[-1]["choices"][0]
        assert last.get("stop_reason") == reason

    with_server(test)


def test_minus_one_keeps_as_much_of_the_prompt_as_fits() -> None:
    async def test(server: TestServer) -> None:
        body = {"prompt": "x" * 100 + "end", "truncate_prompt_tokens": -1, "max_tokens": 2}
        assert (await server.http.post("/v1/completions", json=body)).status_code == 200
        assert server.engine.requests[0].prompt_token_ids == [*b"x" * 37, *b"end"]

    with_server(test)


def test_sglangs_name_of_the_adapter_works_and_must_not_contradict() -> None:
    async def test(server: TestServer) -> None:
        for path in ("/v1/completions", "/v1/chat/completions"):
            body = {"prompt": "hi", "messages": USER, "lora_path": "pirate"}
            assert (await server.http.post(path, json=body)).json()["model"] == "pirate"
            answer = await server.http.post(path, json=body | {"adapter_id": "json"})
            assert answer.status_code == 422 and "different adapters" in answer.text

    with_server(test)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_tokens": 17}, "`min_tokens` must be at most"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [999]}, "999"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x" * 300]}, "bad_words"),
        ({"bad_words": ["x"] * 300}, "bad_words"),
        ({"bad_words": [1]}, "bad_words"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncation_side": "right"}, "truncation_side"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"cache_salt": "mine"}, "cache_salt"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], words: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/completions", json={"prompt": "hi", **fields})
        assert answer.status_code == 422 and words in answer.json()["error"]["message"]
        assert not server.engine.requests

    with_server(test)
