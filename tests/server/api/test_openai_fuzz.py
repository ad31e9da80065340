"""Fields of the wrong type or with odd values are refused or served; none of them is the server's mistake."""

import json
import random
from typing import Any

import pytest
from scripted_engine import TestServer, with_server

from loraplex_server.api.schemas.openai import ChatBody, CompletionBody

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": "hi"}),
    ("/tokenize", {"prompt": "hi"}),
    ("/chat_tokenize", CHAT),
    ("/detokenize", {"tokens": [1]}),
    ("/invocations", CHAT),
    ("/vertex", {"instances": [{"inputs": "hi"}]}),
]
FIELDS = [*sorted({*ChatBody.model_fields, *CompletionBody.model_fields}), "tokens", "instances", "inputs"]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3.5, 1e308, 2**63, 2**64, 10**30, "", "x", "\ud800", "a" * 3000),
    *([], [1], ["a"], [[1]], [None], {}, {"a": 1}, {"type": "text"}, {"\ud800": 1}, {"1": 5}),
    *([{"type": "text", "text": "x"}], [{"role": "tool", "content": "hi"}], [{"role": "user", "content": [{}]}]),
    *({"self": 1, "messages": 2, "range": 3, "include_usage": True}, [{"inputs": "x"}, CHAT]),
]


@pytest.mark.parametrize("seed", range(4))
def test_no_body_makes_a_5xx(seed: int) -> None:
    async def test(server: TestServer) -> None:
        choose = random.Random(seed)
        for _ in range(250):
            path, body = choose.choice(ROUTES)
            body = body | {choose.choice(FIELDS): choose.choice(VALUES) for _ in range(choose.randint(1, 3))}
            answer = await server.http.post(
                path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500 and '"internal"' not in answer.text, (path, body, answer.text)
        await server.until_idle()

    with_server(test)
