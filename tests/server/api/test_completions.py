"""POST /v1/completions: prompts in every form, several answers, echo with log-probabilities, streams."""

import json
from typing import Any

import httpx
import pytest
from scripted_engine import BOS, TestServer, with_server


async def complete(server: TestServer, prompt: Any = "hi", **fields: Any) -> httpx.Response:
    return await server.http.post("/v1/completions", json={"prompt": prompt, **fields})


async def choices(server: TestServer, prompt: Any = "hi", **fields: Any) -> list[Any]:
    answer = await complete(server, prompt, **fields)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def events(answer: httpx.Response) -> list[Any]:
    *data, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in data]


def test_a_whole_answer() -> None:
    async def test(server: TestServer) -> None:
        body = (await complete(server, model="pirate")).json()
        assert body.pop("id").startswith("cmpl-")
        assert body.pop("created") > 1_700_000_000
        assert body == {
            "object": "text_completion",
            "model": "pirate",
            "system_fingerprint": "loraplex",
            "choices": [{"index": 0, "text": "arr", "logprobs": None, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        }

    with_server(test)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["hi"], [[BOS, 104, 105]]),
        (["hi", "yo"], [[BOS, 104, 105], [BOS, 121, 111]]),
        ([104, 105], [[104, 105]]),
        ([[104], [105, 105]], [[104], [105, 105]]),
    ],
)
def test_a_prompt_is_a_text_token_ids_or_a_list_of_either(prompt: Any, expected: list[list[int]]) -> None:
    async def test(server: TestServer) -> None:
        found = await choices(server, prompt)
        assert [request.prompt_token_ids for request in server.engine.requests] == expected
        assert [choice["index"] for choice in found] == list(range(len(expected)))

    with_server(test)


def test_sixteen_tokens_are_the_default() -> None:
    async def test(server: TestServer) -> None:
        await complete(server)
        assert server.engine.requests[-1].sampling.max_new_tokens == 16
        await complete(server, max_tokens=3)
        assert server.engine.requests[-1].sampling.max_new_tokens == 3

    with_server(test)


def test_each_prompt_has_n_answers_with_a_running_index() -> None:
    async def test(server: TestServer) -> None:
        body = (await complete(server, ["hi", "yo!"], n=2, seed=5, echo=True)).json()
        assert [(choice["index"], choice["text"][:3]) for choice in body["choices"]] == [
            (0, "hih"),
            (1, "hih"),
            (2, "yo!"),
            (3, "yo!"),
        ]
        assert [request.sampling.seed for request in server.engine.requests] == [5, 6, 5, 6]
        assert body["usage"]["prompt_tokens"] == 3 + 4
        assert body["usage"]["completion_tokens"] == 4 * 12

    with_server(test)


def test_the_stop_text_is_not_part_of_the_text() -> None:
    async def test(server: TestServer) -> None:
        for stop in ("o w", ["zz", "o w"]):
            assert (await choices(server, stop=stop))[0]["text"] == "hell"

    with_server(test)


def test_the_echo_of_token_ids_is_their_text() -> None:
    async def test(server: TestServer) -> None:
        assert (await choices(server, [104, 105], echo=True, max_tokens=1))[0]["text"] == "hih"

    with_server(test)


def test_echo_with_logprobs_has_those_of_the_prompt_in_front() -> None:
    async def test(server: TestServer) -> None:
        choice = (await choices(server, [104, 105], echo=True, max_tokens=1, logprobs=1, temperature=0))[0]
        assert choice["logprobs"] == {
            "tokens": ["h", "i", "h"],
            "token_logprobs": [None, -1.0, -0.25],
            "top_logprobs": [None, {"t": -0.5, "i": -1.0}, {"h": -0.25}],
            "text_offset": [0, 1, 2],
        }
        sampling = server.engine.requests[-1].sampling
        assert (sampling.prompt_logprobs, sampling.num_prompt_logprobs, sampling.num_logprobs) == (True, 1, 1)

    with_server(test)


def test_an_echo_alone_has_no_output() -> None:
    async def test(server: TestServer) -> None:
        body = (await complete(server, "hi", echo=True, max_tokens=0, logprobs=0)).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
        assert choice["logprobs"]["tokens"] == ["<s>", "h", "i"]
        assert choice["logprobs"]["top_logprobs"] == [None, {"h": -1.0}, {"i": -1.0}]
        assert body["usage"] == {
            "prompt_tokens": 3,
            "completion_tokens": 0,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    with_server(test)


def test_logprobs_without_echo_are_those_of_the_output() -> None:
    async def test(server: TestServer) -> None:
        found = (await choices(server, logprobs=2, temperature=0, max_tokens=2))[0]["logprobs"]
        assert found["tokens"] == ["h", "e"] and found["text_offset"] == [0, 1]
        assert found["top_logprobs"] == [{"h": -0.25, "a": -9999.0}, {"e": -0.25, "a": -9999.0}]
        assert not server.engine.requests[-1].sampling.prompt_logprobs

    with_server(test)


def test_a_stream_of_several_prompts() -> None:
    async def test(server: TestServer) -> None:
        answer = await complete(
            server, ["hi", "yo"], n=2, stream=True, echo=True, stream_options={"include_usage": True}
        )
        *chunks, last = events(answer)
        for index, prompt in enumerate(("hi", "hi", "yo", "yo")):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == prompt + "hello world"
            assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        assert (last["choices"], last["object"]) == ([], "text_completion")
        assert last["usage"] == {
            "prompt_tokens": 6,
            "completion_tokens": 48,
            "total_tokens": 54,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    with_server(test)


def test_a_stream_has_a_logprob_for_each_token() -> None:
    async def test(server: TestServer) -> None:
        chunks = events(await complete(server, stream=True, logprobs=1, temperature=0, stop="wor"))
        parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        assert [token for part in parts for token in part["tokens"]] == list("hello wor")
        assert [offset for part in parts for offset in part["text_offset"]] == list(range(9))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello "

    with_server(test)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "must not be empty"),
        ({"prompt": ""}, "cannot be empty"),
        ({"prompt": [""]}, "cannot be empty"),
        ({"prompt": [[]]}, "cannot be empty"),
        ({"prompt": [259]}, "259"),
        ({"prompt": [[1], [-1]]}, "-1"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 5}, "batch size exceeded"),
        ({"prompt": ["a"] * 4, "n": 40}, "more than the limit"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1, "stream": True}, "in a stream"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/v1/completions", json={"prompt": "hi", **fields})
        assert answer.status_code == 422, answer.text
        assert words in answer.json()["error"]["message"]
        await server.until_idle()

    with_server(test)


def test_an_unknown_model_is_404() -> None:
    async def test(server: TestServer) -> None:
        answer = await complete(server, model="nobody", stream=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")

    with_server(test)
