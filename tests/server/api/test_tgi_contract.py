"""The table of TGI's generate request: each field, each bound, both sides, with TGI's words.

The server of these tests takes prompts up to 40 tokens and 60 tokens in all; a prompt of n letters has n + 1 tokens.
"""

import asyncio
from typing import Any

import msgspec
import pytest
from scripted_engine import READY, TestServer, api_server, with_server

from loraplex_server.api.schemas.tgi import GenerateParameters

ACCEPTED = None
SAMPLES = {"do_sample": True}

# field, parameters, the message behind "Input validation error: " or ACCEPTED
PARAMETER_ROWS: list[tuple[dict[str, Any], str | None]] = [
    ({"best_of": None}, ACCEPTED),
    ({"best_of": 1}, ACCEPTED),
    ({"best_of": 2, **SAMPLES}, ACCEPTED),
    ({"best_of": 3, **SAMPLES}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 0, **SAMPLES}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 1.0}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "temperature": 0.5}, ACCEPTED),
    ({"best_of": 2, "top_k": 5}, ACCEPTED),
    ({"best_of": 2, "top_p": 0.5}, ACCEPTED),
    ({"best_of": 2, "typical_p": 0.5}, ACCEPTED),
    ({"best_of": 2, **SAMPLES, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"best_of": 1, **SAMPLES, "seed": 1}, ACCEPTED),
    ({"temperature": None}, ACCEPTED),
    ({"temperature": 0.0}, ACCEPTED),
    ({"temperature": -0.1}, "`temperature` must be strictly positive, or 0 for the most likely tokens"),
    ({"temperature": 1e-6}, ACCEPTED),
    ({"temperature": 1}, ACCEPTED),
    ({"temperature": 100.0}, ACCEPTED),
    ({"repetition_penalty": None}, ACCEPTED),
    ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": -1.0}, "`repetition_penalty` must be strictly positive"),
    ({"repetition_penalty": 0.01}, ACCEPTED),
    ({"repetition_penalty": 1.03}, ACCEPTED),
    ({"frequency_penalty": None}, ACCEPTED),
    ({"frequency_penalty": -2.0}, ACCEPTED),
    ({"frequency_penalty": 2.0}, ACCEPTED),
    ({"frequency_penalty": -2.01}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": 2.01}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": 2.0}, ACCEPTED),
    ({"presence_penalty": -2.0}, ACCEPTED),
    ({"presence_penalty": 2.01}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.01}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": None}, ACCEPTED),
    ({"top_k": 1}, ACCEPTED),
    ({"top_k": 2**31 - 1}, ACCEPTED),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -1}, "`top_k` must be strictly positive"),
    ({"top_p": None}, ACCEPTED),
    ({"top_p": 0.01}, ACCEPTED),
    ({"top_p": 0.99}, ACCEPTED),
    ({"top_p": 0.0}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"top_p": 1.0}, ACCEPTED),
    ({"top_p": 1.01}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"top_p": -0.1}, "`top_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": None}, ACCEPTED),
    ({"typical_p": 0.01}, ACCEPTED),
    ({"typical_p": 0.99}, ACCEPTED),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"typical_p": 1.0}, ACCEPTED),
    ({"typical_p": 1.01}, "`typical_p` must be > 0.0 and <= 1.0"),
    ({"do_sample": True}, ACCEPTED),
    ({"do_sample": False}, ACCEPTED),
    ({"max_new_tokens": None}, ACCEPTED),
    ({"max_new_tokens": 1}, ACCEPTED),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"max_new_tokens": 57}, ACCEPTED),  # and a prompt of 3 tokens
    (
        {"max_new_tokens": 58},
        "`inputs` tokens + `max_new_tokens` must be <= 60. Given: 3 `inputs` tokens and 58 `max_new_tokens`",
    ),
    (
        {"max_new_tokens": 2**32 - 1},
        "`inputs` tokens + `max_new_tokens` must be <= 60. Given: 3 `inputs` tokens and 4294967295 `max_new_tokens`",
    ),
    ({"return_full_text": True}, ACCEPTED),
    ({"return_full_text": False}, ACCEPTED),
    ({"return_full_text": None}, ACCEPTED),
    ({"stop": []}, ACCEPTED),
    ({"stop": ["a", "b", "c", "d"]}, ACCEPTED),
    ({"stop": ["a", "b", "c", "d", "e"]}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"stop": ["x" * 1024]}, ACCEPTED),
    ({"stop": ["x" * 1025]}, "a `stop` sequence must have at most 1024 characters. Given: 1025"),
    ({"stop": [""]}, "`stop` must not contain an empty string"),
    ({"truncate": None}, ACCEPTED),
    ({"truncate": 1}, ACCEPTED),
    ({"truncate": 40}, ACCEPTED),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 40. Given: 0"),
    ({"truncate": 41}, "`truncate` must be strictly positive and less than 40. Given: 41"),
    ({"watermark": True}, ACCEPTED),
    ({"watermark": False}, ACCEPTED),
    ({"details": True}, ACCEPTED),
    ({"details": False}, ACCEPTED),
    ({"decoder_input_details": True}, ACCEPTED),
    ({"decoder_input_details": False}, ACCEPTED),
    ({"seed": None}, ACCEPTED),
    ({"seed": 0, **SAMPLES}, ACCEPTED),
    ({"seed": 2**64 - 1, **SAMPLES}, ACCEPTED),
    ({"top_n_tokens": None}, ACCEPTED),
    ({"top_n_tokens": 0}, ACCEPTED),
    ({"top_n_tokens": 5}, ACCEPTED),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"grammar": None}, ACCEPTED),
    ({"grammar": {"type": "json", "value": {"properties": {}}}}, "grammar is not supported"),
    ({"response_format": {"type": "json_object"}}, "grammar is not supported"),
    ({"adapter_id": None}, ACCEPTED),
    ({"adapter_id": ""}, ACCEPTED),
    ({"adapter_id": "pirate"}, ACCEPTED),
    ({"adapter_id": "x" * 513}, "`adapter_id` must have at most 512 characters. Given: 513"),
    ({"adapter_source": "local"}, ACCEPTED),
    ({"adapter_source": "Hub"}, ACCEPTED),
    ({"adapter_source": "S3"}, ACCEPTED),
    ({"adapter_source": "ftp"}, "`adapter_source` must be one of hub, local, s3, pbase. Given: ftp"),
    (
        {"merged_adapters": {"ids": ["a"], "weights": [1]}, "adapter_id": "pirate"},
        "at most one of `adapter_id` or `merged_adapters` may be provided",
    ),
    ({"return_k_alternatives": 20}, ACCEPTED),
    ({"return_k_alternatives": 0}, "`return_k_alternatives` must be from 1 to 20. Given: 0"),
    ({"return_k_alternatives": 21}, "`return_k_alternatives` must be from 1 to 20. Given: 21"),
    (
        {"return_k_alternatives": 2, "top_n_tokens": 2},
        "`return_k_alternatives` and `top_n_tokens` must not both be set",
    ),
    ({"api_token": "secret"}, ACCEPTED),
    ({"some_other_field": {"deep": [1]}}, ACCEPTED),
]

# A field of the wrong type: the name that the message must have.
TYPE_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"inputs": None}, "inputs"),
    ({"inputs": 5}, "inputs"),
    ({"inputs": ["a", "b"]}, "inputs"),
    ({}, "inputs"),
    ({"inputs": "hi", "parameters": []}, "parameters"),
    ({"inputs": "hi", "parameters": {"best_of": -1}}, "parameters.best_of"),
    ({"inputs": "hi", "parameters": {"best_of": 1.5}}, "parameters.best_of"),
    ({"inputs": "hi", "parameters": {"temperature": "1"}}, "parameters.temperature"),
    ({"inputs": "hi", "parameters": {"temperature": True}}, "parameters.temperature"),
    ({"inputs": "hi", "parameters": {"temperature": 1e39}}, "parameters.temperature"),
    ({"inputs": "hi", "parameters": {"repetition_penalty": []}}, "parameters.repetition_penalty"),
    ({"inputs": "hi", "parameters": {"frequency_penalty": "a"}}, "parameters.frequency_penalty"),
    ({"inputs": "hi", "parameters": {"top_k": 1.5}}, "parameters.top_k"),
    ({"inputs": "hi", "parameters": {"top_k": 2**31}}, "parameters.top_k"),
    ({"inputs": "hi", "parameters": {"top_k": True}}, "parameters.top_k"),
    ({"inputs": "hi", "parameters": {"top_p": "0.5"}}, "parameters.top_p"),
    ({"inputs": "hi", "parameters": {"typical_p": {}}}, "parameters.typical_p"),
    ({"inputs": "hi", "parameters": {"do_sample": 1}}, "parameters.do_sample"),
    ({"inputs": "hi", "parameters": {"max_new_tokens": -1}}, "parameters.max_new_tokens"),
    ({"inputs": "hi", "parameters": {"max_new_tokens": 2**32}}, "parameters.max_new_tokens"),
    ({"inputs": "hi", "parameters": {"max_new_tokens": 2**63}}, "parameters.max_new_tokens"),
    ({"inputs": "hi", "parameters": {"return_full_text": "yes"}}, "parameters.return_full_text"),
    ({"inputs": "hi", "parameters": {"stop": "a"}}, "parameters.stop"),
    ({"inputs": "hi", "parameters": {"stop": [1]}}, "parameters.stop.0"),
    ({"inputs": "hi", "parameters": {"truncate": -1}}, "parameters.truncate"),
    ({"inputs": "hi", "parameters": {"watermark": "x"}}, "parameters.watermark"),
    ({"inputs": "hi", "parameters": {"details": 0}}, "parameters.details"),
    ({"inputs": "hi", "parameters": {"decoder_input_details": "x"}}, "parameters.decoder_input_details"),
    ({"inputs": "hi", "parameters": {"seed": -1}}, "parameters.seed"),
    ({"inputs": "hi", "parameters": {"seed": 2**64}}, "parameters.seed"),
    ({"inputs": "hi", "parameters": {"seed": 10**30}}, "parameters.seed"),
    ({"inputs": "hi", "parameters": {"top_n_tokens": -1}}, "parameters.top_n_tokens"),
    ({"inputs": "hi", "parameters": {"top_n_tokens": 10**9 * 5}}, "parameters.top_n_tokens"),
    ({"inputs": "hi", "parameters": {"grammar": "json"}}, "parameters.grammar"),
    ({"inputs": "hi", "parameters": {"adapter_id": 7}}, "parameters.adapter_id"),
    ({"inputs": "hi", "parameters": {"adapter_id": ["a"]}}, "parameters.adapter_id"),
]


def row_id(value: object) -> str | None:
    return str(value)[:60] if isinstance(value, dict) else None


@pytest.mark.parametrize(("parameters", "message"), PARAMETER_ROWS, ids=row_id)
def test_generate_keeps_each_bound(parameters: dict[str, Any], message: str | None) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", **parameters)
        if message is ACCEPTED:
            assert (answer.status_code, next(iter(answer.json()))) == (200, "generated_text")
        else:
            expected = {"error": f"Input validation error: {message}", "error_type": "validation"}
            assert (answer.status_code, answer.json()) == (422, expected)

    with_server(test)


@pytest.mark.parametrize(
    ("parameters", "message"), [row for row in PARAMETER_ROWS if row[1] and "best_of" not in row[0]], ids=row_id
)
def test_generate_stream_says_the_same_in_an_event_behind_200(parameters: dict[str, Any], message: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", **parameters)
        error = b'{"error":"Input validation error: %s","error_type":"validation"}' % message.encode()
        assert (answer.status_code, answer.content) == (200, b"data: " + error + b"\n\n")

    with_server(test)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 2, "do_sample": True}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_a_stream_has_bounds_of_its_own(parameters: dict[str, Any], message: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", **parameters)
        assert msgspec.json.decode(answer.content.removeprefix(b"data: "))["error"].endswith(message)

    with_server(test)


@pytest.mark.parametrize("best_of", [0, 2])
def test_a_server_without_best_of_says_so(best_of: int) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", best_of=best_of, do_sample=True)
        assert answer.json()["error"] == "Input validation error: `best_of` != 1 is not allowed for this endpoint"
        assert (await server.generate("hi", best_of=1)).status_code == 200

    with_server(test, max_best_of=1)


@pytest.mark.parametrize(("body", "field"), TYPE_ROWS, ids=row_id)
@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
def test_a_wrong_type_is_422_with_the_fields_name(path: str, body: dict[str, Any], field: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post(path, json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        start = f"Failed to deserialize the JSON body into the target type: {field}: "
        assert answer.json()["error"].startswith(start)
        assert not server.engine.requests

    with_server(test)


def test_every_optional_field_may_be_null() -> None:
    async def test(server: TestServer) -> None:
        nulls = dict.fromkeys(GenerateParameters.model_fields)
        for body in (
            {"inputs": "hi", "parameters": nulls, "stream": None},
            {"inputs": "hi", "parameters": None, "stream": None},
        ):
            answer = await server.http.post("/", json=body)
            assert (answer.status_code, answer.json()) == (200, [{"generated_text": "hihello world"}])

    with_server(test)


@pytest.mark.parametrize(
    ("letters", "parameters", "message"),
    [
        (0, {}, "`inputs` cannot be empty"),
        (39, {}, ACCEPTED),
        (40, {}, "`inputs` must have less than 40 tokens. Given: 41"),
        (39, {"max_new_tokens": 20}, ACCEPTED),
        (
            39,
            {"max_new_tokens": 21},
            "`inputs` tokens + `max_new_tokens` must be <= 60. Given: 40 `inputs` tokens and 21 `max_new_tokens`",
        ),
        (
            70,
            {},
            "`inputs` tokens + `max_new_tokens` must be <= 60. Given: 71 `inputs` tokens and 0 `max_new_tokens`",
        ),
        (70, {"truncate": 40}, ACCEPTED),
        (70, {"truncate": 40, "max_new_tokens": 20}, ACCEPTED),
    ],
)
def test_the_prompts_length_is_bounded(letters: int, parameters: dict[str, Any], message: str | None) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("x" * letters, **parameters)
        assert answer.status_code == (200 if message is ACCEPTED else 422)
        if message is not ACCEPTED:
            assert answer.json()["error"] == f"Input validation error: {message}"

    with_server(test)


def test_asking_for_more_than_fits_is_granted_what_fits_when_the_first_1024_do() -> None:
    limits = msgspec.structs.replace(READY, max_total_tokens=1100)

    async def test(server: TestServer) -> None:
        assert (await server.generate("hi", max_new_tokens=50_000)).status_code == 200
        assert (await server.generate("hi")).status_code == 200
        assert [request.sampling.max_new_tokens for request in server.engine.requests] == [1097, 1097]

    with_server(test, limits=limits)


# Each row breaks two rules that are neighbours in TGI's order: the first one's message must come.
ORDER_ROWS = [
    ({"best_of": 3, "temperature": -1.0}, "`best_of` must be"),
    ({"best_of": 2, "repetition_penalty": 0.0}, "you must use sampling"),
    ({"temperature": -1.0, "repetition_penalty": 0.0}, "`temperature`"),
    ({"repetition_penalty": 0.0, "frequency_penalty": 3.0}, "`repetition_penalty`"),
    ({"frequency_penalty": 3.0, "top_p": 1.5}, "`frequency_penalty`"),
    ({"top_p": 1.5, "typical_p": 1.5}, "`top_p`"),
    ({"typical_p": 1.5, "top_k": 0}, "`typical_p`"),
    ({"top_k": 0, "max_new_tokens": 0}, "`top_k`"),
    ({"max_new_tokens": 0, "stop": list("abcde")}, "`max_new_tokens`"),
    ({"stop": list("abcde"), "best_of": 2, "do_sample": True, "seed": 1}, "`stop`"),
    ({"best_of": 2, "do_sample": True, "seed": 1, "top_n_tokens": 6}, "`seed`"),
    ({"top_n_tokens": 6, "inputs": ""}, "`top_n_tokens`"),
    ({"inputs": "", "truncate": 0}, "`inputs` cannot be empty"),
    ({"truncate": 0, "max_new_tokens": 1000}, "`truncate`"),
    ({"inputs": "x" * 50, "max_new_tokens": 30}, "`inputs` tokens + `max_new_tokens`"),
    ({"inputs": "x" * 50, "grammar": {"type": "regex", "value": "("}}, "`inputs` must have less than"),
]


@pytest.mark.parametrize(("parameters", "message"), ORDER_ROWS, ids=row_id)
def test_the_first_broken_rule_in_tgis_order_is_reported(parameters: dict[str, Any], message: str) -> None:
    async def test(server: TestServer) -> None:
        rest = dict(parameters)
        answer = await server.generate(rest.pop("inputs", "hi"), **rest)
        assert answer.json()["error"].startswith(f"Input validation error: {message}")

    with_server(test)


def test_no_refused_request_reaches_the_engine_or_keeps_a_permit() -> None:
    async def run() -> None:
        async with api_server() as server:
            for parameters, message in PARAMETER_ROWS:
                if message is not ACCEPTED:
                    await server.generate("hi", **parameters)
            assert not server.engine.requests
            assert server.admission.num_permits_taken == 0

    asyncio.run(run())
