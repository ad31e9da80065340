"""What /generate, / and their streams answer: shapes, texts, stops, best_of, headers."""

import json
from typing import Any

import pytest
from scripted_engine import EOS, MERGED, ScriptedEngine, TestServer, with_server

NOT_MEASURED = {"x-compute-type", "x-compute-characters", "x-prompt-tokens", "x-generated-tokens", "x-total-tokens"}
MEASURED = {
    "x-compute-time",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
}


def events_of(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: ")) for event in content.split(b"\n\n") if event]


def test_generate_answers_an_object_without_details() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", max_new_tokens=20)
        assert answer.content == b'{"generated_text":"hello world"}'
        assert answer.headers["content-type"] == "application/json"

    with_server(test)


def test_the_compat_route_answers_a_list_of_one() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/", return_full_text=False)
        assert answer.json() == [{"generated_text": "hello world"}]

    with_server(test)


@pytest.mark.parametrize(
    ("path", "asked", "prefix"),
    [
        ("/", None, "hi"),
        ("/", True, "hi"),
        ("/", False, ""),
        ("/generate", None, ""),
        ("/generate", True, "hi"),
        ("/generate", False, ""),
        ("/generate_stream", None, ""),
        ("/generate_stream", True, "hi"),
        ("/generate_stream", False, ""),
    ],
)
def test_the_prompt_stands_in_front_where_the_route_or_the_client_says_so(
    path: str, asked: bool | None, prefix: str
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path=path, return_full_text=asked)
        if path == "/generate_stream":
            text = events_of(answer.content)[-1]["generated_text"]
        else:
            text = (answer.json()[0] if path == "/" else answer.json())["generated_text"]
        assert text == prefix + "hello world"

    with_server(test)


def test_a_full_text_stream_from_the_compat_route_has_the_prompt_too() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/", json={"inputs": "hi", "stream": True})
        assert answer.headers["content-type"] == "text/event-stream"
        assert events_of(answer.content)[-1]["generated_text"] == "hihello world"

    with_server(test)


def test_details_have_tgis_fields_and_the_prompts_length() -> None:
    async def test(server: TestServer) -> None:
        details = (await server.generate("hi", details=True)).json()["details"]
        assert list(details) == ["finish_reason", "prompt_tokens", "generated_tokens", "seed", "prefill", "tokens"]
        assert (details["finish_reason"], details["prompt_tokens"], details["generated_tokens"]) == ("eos_token", 3, 12)
        assert (details["seed"], details["prefill"]) == (None, [])
        assert details["tokens"][0] == {"id": 104, "text": "h", "logprob": -0.25, "special": False}
        assert details["tokens"][-1] == {"id": EOS, "text": "</s>", "logprob": -0.25, "special": True}

    with_server(test)


def test_the_finish_reason_is_length_when_the_tokens_run_out() -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.generate("hi", details=True, max_new_tokens=5)).json()
        assert answer["generated_text"] == "hello"
        assert answer["details"]["finish_reason"] == "length"

    with_server(test)


def test_top_tokens_stand_beside_the_tokens_and_have_numbers_only() -> None:
    async def test(server: TestServer) -> None:
        details = (await server.generate("hi", details=True, top_n_tokens=2, max_new_tokens=2)).json()["details"]
        assert details["top_tokens"][0] == [
            {"id": 104, "text": "h", "logprob": -0.25, "special": False},
            {"id": 97, "text": "a", "logprob": -9999.0, "special": False},
        ]
        assert len(details["top_tokens"]) == len(details["tokens"]) == 2

    with_server(test)


@pytest.mark.parametrize(("allowed", "asked", "number"), [(True, True, 3), (True, False, 0), (False, True, 0)])
def test_the_prompts_tokens_are_reported_where_the_server_and_the_request_want_them(
    allowed: bool, asked: bool, number: int
) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", details=True, decoder_input_details=asked)
        prefill = answer.json()["details"]["prefill"]
        assert len(prefill) == number
        if prefill:
            assert prefill[:2] == [
                {"id": 256, "text": "<s>", "logprob": None},
                {"id": 104, "text": "h", "logprob": -1.0},
            ]

    with_server(test, prefill_logprobs=allowed)


def test_decoder_input_details_alone_brings_the_details() -> None:
    async def test(server: TestServer) -> None:
        assert "details" in (await server.generate("hi", decoder_input_details=True)).json()

    with_server(test)


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        (None, True),
        ({}, False),
        ({"do_sample": True}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 5}, True),
        ({"top_p": 0.9}, True),
        ({"typical_p": 0.9}, True),
        ({"seed": 5}, False),
        ({"repetition_penalty": 1.2}, False),
    ],
)
def test_tokens_are_drawn_when_a_parameter_implies_it(parameters: dict[str, Any] | None, samples: bool) -> None:
    async def test(server: TestServer) -> None:
        body: dict[str, Any] = {"inputs": "hi"}
        if parameters is not None:
            body["parameters"] = {**parameters, "details": True}
        answer = (await server.http.post("/generate", json=body)).json()
        assert server.engine.requests[0].sampling.do_sample is samples
        if parameters is not None:
            assert (answer["details"]["seed"] is not None) is samples

    with_server(test)


def test_the_used_seed_is_reported() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", details=True, do_sample=True, seed=2**64 - 1)
        assert answer.json()["details"]["seed"] == 2**64 - 1
        first, second = [
            (await server.generate("hi", details=True, do_sample=True)).json()["details"]["seed"] for _ in range(2)
        ]
        assert first != second

    with_server(test)


def test_every_parameter_reaches_the_engine() -> None:
    async def test(server: TestServer) -> None:
        await server.generate(
            "hi", temperature=0.5, top_k=7, top_p=0.8, typical_p=0.9, repetition_penalty=1.1, frequency_penalty=0.2,
            presence_penalty=0.3, watermark=True, seed=9, max_new_tokens=3, top_n_tokens=2, ignore_eos_token=True,
            adapter_id="pirate",
        )  # fmt: skip
        request = server.engine.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 7, 0.8, 0.9)
        assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.1, 0.2, 0.3)
        assert (sampling.watermark, sampling.seed, sampling.max_new_tokens) == (True, 9, 3)
        assert (sampling.num_logprobs, sampling.ignore_eos) == (2, True)
        assert (request.adapter_id, request.adapter_digest) == ("pirate", "d-pirate")

    with_server(test)


def test_truncate_keeps_the_last_tokens() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("abcdef", truncate=2)
        assert server.engine.requests[0].prompt_token_ids == [*b"ef"]
        assert (answer.headers["x-prompt-tokens"], answer.headers["x-compute-characters"]) == ("2", "6")

    with_server(test)


def test_the_best_of_answer_is_the_sequence_with_the_highest_mean_logprob() -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.generate("hi", best_of=4, do_sample=True, details=True)).json()
        requests = server.engine.requests
        assert len({request.request_id for request in requests}) == len(requests) == 4
        means = [-0.25 - (request.sampling.seed % 97) / 100 for request in requests]
        details = answer["details"]
        assert details["tokens"][0]["logprob"] == max(means)
        others = details["best_of_sequences"]
        assert sorted(other["tokens"][0]["logprob"] for other in others) == sorted(means)[:3]
        assert list(others[0]) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
        assert details["seed"] == requests[means.index(max(means))].sampling.seed

    with_server(test, max_best_of=4)


def test_a_failing_sequence_fails_its_best_of_siblings_and_takes_them_off_the_engine() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", best_of=2, do_sample=True)
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
        await server.until_idle()

    with_server(test, engine=ScriptedEngine(fail_at=3))


def test_the_answer_of_an_adapter_names_it() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", adapter_id="pirate")
        assert answer.json()["generated_text"] == "arr"
        assert answer.headers["x-adapter-id"] == "pirate"
        stream = await server.generate("hi", path="/generate_stream", adapter_id="pirate")
        assert stream.headers["x-adapter-id"] == "pirate"
        assert "x-adapter-id" not in (await server.generate("hi")).headers

    with_server(test)


@pytest.mark.parametrize("path", ["/", "/generate", "/tokenize"])
def test_an_unknown_adapter_is_404_and_never_the_base(path: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path=path, adapter_id="pirat")
        assert (answer.status_code, answer.json()["error_type"]) == (404, "adapter_not_found")
        assert "near names: pirate" in answer.json()["error"]
        assert not server.engine.requests

    with_server(test)


def test_an_unknown_adapter_in_a_stream_is_an_event_and_no_header() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", adapter_id="nobody")
        assert answer.status_code == 200
        assert "x-adapter-id" not in answer.headers
        assert [event["error_type"] for event in events_of(answer.content)] == ["adapter_not_found"]

    with_server(test)


def test_answers_carry_tgis_headers_and_errors_do_not() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("héllo", details=True)
        assert set(answer.headers) >= NOT_MEASURED | MEASURED
        assert answer.headers["x-compute-type"] == "cpu+optimized"
        assert answer.headers["x-compute-characters"] == "5"
        assert answer.headers["x-prompt-tokens"] == "7"
        assert answer.headers["x-generated-tokens"] == "12"
        assert float(answer.headers["x-compute-time"]) < int(answer.headers["x-total-time"]) + 1
        error = await server.generate("")
        assert not set(error.headers) & (NOT_MEASURED | MEASURED)

    with_server(test)


def test_the_compute_type_can_be_set() -> None:
    async def test(server: TestServer) -> None:
        assert (await server.generate("hi")).headers["x-compute-type"] == "1-nvidia-a10g"

    with_server(test, compute_type="1-nvidia-a10g")


def test_a_stream_is_one_event_a_token_framed_as_tgi_does() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", max_new_tokens=2, details=True)
        assert answer.content == (
            b'data: {"index":1,"token":{"id":104,"text":"h","logprob":-0.25,"special":false},'
            b'"generated_text":null,"details":null}\n\n'
            b'data: {"index":2,"token":{"id":101,"text":"e","logprob":-0.25,"special":false},'
            b'"generated_text":"he","details":{"finish_reason":"length","generated_tokens":2,"seed":null,'
            b'"input_length":3,"prompt_tokens":3}}\n\n'
        )
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert "x-compute-time" not in answer.headers

    with_server(test)


def test_a_stream_without_details_has_a_null_in_their_place() -> None:
    async def test(server: TestServer) -> None:
        last = events_of((await server.generate("hi", path="/generate_stream")).content)[-1]
        assert (last["generated_text"], last["details"]) == ("hello world", None)
        assert last["token"]["special"] is True

    with_server(test)


def test_a_streams_top_tokens_stand_in_its_events() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", top_n_tokens=3, max_new_tokens=2)
        assert [len(event["top_tokens"]) for event in events_of(answer.content)] == [3, 3]

    with_server(test)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    async def test(server: TestServer) -> None:
        events = events_of((await server.generate("hi", path="/generate_stream")).content)
        assert [event["token"]["text"] for event in events] == ["a", "", "", "", "🏴", "b", "</s>"]
        assert events[-1]["generated_text"] == "a🏴b"
        assert (await server.generate("hi")).json()["generated_text"] == "a🏴b"

    with_server(test, engine=ScriptedEngine(texts={None: "a🏴b"}))


def test_a_text_that_ends_inside_a_character_shows_it_once() -> None:
    async def test(server: TestServer) -> None:
        events = events_of((await server.generate("hi", path="/generate_stream", max_new_tokens=3)).content)
        assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == "a\ufffd"

    with_server(test, engine=ScriptedEngine(texts={None: "a🏴b"}))


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["lo w"], "hello w"),
        (["h"], "h"),
        (["world", "lo"], "hello"),
        (["xyz"], "hello world"),
        (["hello world"], "hello world"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_stop_string_ends_the_text_and_stays_in_it(path: str, stop: list[str], text: str) -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path=path, stop=stop, details=True, max_new_tokens=30)
        last = answer.json() if path == "/generate" else events_of(answer.content)[-1]
        assert last["generated_text"] == text
        assert last["details"]["finish_reason"] == ("eos_token" if stop == ["xyz"] else "stop_sequence")
        await server.until_idle()
        assert len(server.engine.aborted) == (stop != ["xyz"])

    with_server(test)


def test_nothing_behind_a_stop_string_inside_a_token_is_shown() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", path="/generate_stream", stop=["STOP"])
        events = events_of(answer.content)
        assert [event["token"]["text"] for event in events] == ["a", "STOP"]
        assert events[-1]["generated_text"] == "aSTOP"

    with_server(test, engine=ScriptedEngine(token_ids=[97, MERGED, 98, 99, EOS]))


def test_a_special_tokens_spelling_may_be_a_stop_string() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", stop=["</s>"], ignore_eos_token=True, details=True)
        assert answer.json()["generated_text"] == "a"
        assert answer.json()["details"]["finish_reason"] == "stop_sequence"

    with_server(test, engine=ScriptedEngine(token_ids=[97, EOS, 98, 99]))


def test_length_comes_before_a_stop_string_on_the_same_token() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", stop=["he"], max_new_tokens=2, details=True)
        assert answer.json()["details"]["finish_reason"] == "length"
        assert not server.engine.aborted

    with_server(test)


def test_an_end_token_alone_is_an_empty_text_with_one_token() -> None:
    async def test(server: TestServer) -> None:
        answer = (await server.generate("hi", details=True)).json()
        assert (answer["generated_text"], answer["details"]["generated_tokens"]) == ("", 1)
        assert len(events_of((await server.generate("hi", path="/generate_stream")).content)) == 1

    with_server(test, engine=ScriptedEngine(token_ids=[EOS]))


def test_a_failure_of_the_engine_is_424_or_the_last_event() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi")
        failure = {"error": "Request failed during generation: Server error: boom", "error_type": "generation"}
        assert (answer.status_code, answer.json()) == (424, failure)
        events = events_of((await server.generate("hi", path="/generate_stream")).content)
        assert [event.get("index") for event in events[:-1]] == [1, 2, 3]
        assert events[-1] == failure

    with_server(test, engine=ScriptedEngine(fail_at=3))


def test_tokenize_gives_ids_texts_and_places() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.http.post("/tokenize", json={"inputs": "hi"})
        assert answer.json() == [
            {"id": 256, "text": "", "start": 0, "stop": 0},
            {"id": 104, "text": "h", "start": 0, "stop": 1},
            {"id": 105, "text": "i", "start": 1, "stop": 2},
        ]

    with_server(test)


def test_alternatives_are_told_with_each_token_as_in_lorax() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate("hi", max_new_tokens=2, details=True, return_k_alternatives=1)
        details = answer.json()["details"]
        assert [token["alternative_tokens"] for token in details["tokens"]] == [
            [{"id": ord("h"), "text": "h", "logprob": -0.25}],
            [{"id": ord("e"), "text": "e", "logprob": -0.25}],
        ]
        assert "top_tokens" not in details
        stream = await server.generate("hi", "/generate_stream", max_new_tokens=1, return_k_alternatives=1)
        assert '"alternative_tokens":[{"id":104' in stream.text and "top_tokens" not in stream.text

    with_server(test)


def test_a_temperature_of_0_takes_the_likeliest_tokens_whatever_shapes_a_draw() -> None:
    async def test(server: TestServer) -> None:
        answer = await server.generate(
            "hi", temperature=0, do_sample=True, top_k=5, top_p=0.5, typical_p=0.5, details=True
        )
        assert answer.json()["details"]["seed"] is None
        sampling = server.engine.requests[0].sampling
        assert (sampling.do_sample, sampling.top_k, sampling.top_p, sampling.typical_p) == (False, 0, 1.0, 1.0)
        await server.generate("hi", top_p=1.0, typical_p=1)
        assert not server.engine.requests[1].sampling.do_sample

    with_server(test)
