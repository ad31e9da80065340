"""Bad and odd requests against the real tokenizer, model and engine."""

import random
import re
import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from demo_server import GAUGES, LaunchedServer, wait_until

PAYLOAD_LIMIT = 2_000_000
FAMILY = "👨‍👩‍👧‍👦 naïve 東京 e\u0301 🏴‍☠️"

pytestmark = pytest.mark.slow


def post(server: LaunchedServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=300)


@pytest.mark.parametrize(
    "text",
    [
        "a" * (PAYLOAD_LIMIT - 100),
        " " * (PAYLOAD_LIMIT - 100),
        "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=PAYLOAD_LIMIT - 100)),
    ],
    ids=["one character", "spaces", "no white space"],
)
def test_a_prompt_just_below_the_payload_limit_holds_nobody_up(demo_server: LaunchedServer, text: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        large = [pool.submit(post, demo_server, "/generate", {"inputs": text}) for _ in range(2)]
        is_over = False
        while not is_over:
            is_over = all(one.done() for one in large)
            assert httpx.get(f"{demo_server.url}/health", timeout=300).status_code == 200
    for one in large:
        assert (one.result().status_code, one.result().json()["error_type"]) == (422, "validation")


def test_echoed_log_probabilities_are_the_same_when_the_prompt_is_cached(demo_server: LaunchedServer) -> None:
    prompt = "A rare sentence about lighthouses and the sea, told twice to see what is remembered of it. " * 3
    body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
    first, second = (post(demo_server, "/v1/completions", body).json() for _ in range(2))
    values = [one["choices"][0]["logprobs"]["token_logprobs"] for one in (first, second)]
    assert values[0][0] is None and len(values[0]) > 32
    assert values[1][1:] == pytest.approx(values[0][1:], abs=0.05)
    plain = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    cached = post(demo_server, "/v1/completions", plain).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0


@pytest.mark.parametrize("text", [FAMILY, "日本語のテキスト", "Ωmega — “quotes”"])
def test_characters_of_several_bytes_survive_a_stream(demo_server: LaunchedServer, text: str) -> None:
    body = {"prompt": text * 6, "max_tokens": 24, "temperature": 0}
    whole = post(demo_server, "/v1/completions", body).json()["choices"][0]["text"]
    native = post(demo_server, "/generate", {"inputs": text * 6, "parameters": {"max_new_tokens": 24}}).json()
    pieces = []
    with httpx.stream("POST", f"{demo_server.url}/v1/completions", json=body | {"stream": True}, timeout=300) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces.append(httpx.Response(200, content=line.removeprefix("data: ")).json()["choices"][0]["text"])
    assert "".join(pieces) == whole == native["generated_text"]
    token_ids = post(demo_server, "/v1/completions", body | {"return_token_ids": True}).json()["choices"][0][
        "token_ids"
    ]
    decoded = post(demo_server, "/detokenize", {"tokens": token_ids}).json()["prompt"]
    assert whole == decoded.removesuffix("<|im_end|>")


def test_a_chat_that_is_too_long_only_behind_its_template_is_refused_with_its_length(
    demo_server: LaunchedServer,
) -> None:
    limit = httpx.get(f"{demo_server.url}/info", timeout=300).json()["max_input_tokens"]
    content = "sea " * (limit - 10)
    answer = post(demo_server, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 422
    (given,) = re.findall(r"Given: (\d+)", answer.json()["error"]["message"])
    assert int(given) > limit


def test_nothing_is_held_after_all_this(demo_server: LaunchedServer) -> None:
    wait_until(lambda: not any(demo_server.gauges().values()), f"{GAUGES} at 0")
