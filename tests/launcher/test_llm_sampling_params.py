from typing import Any

import pytest

from loraplex import LoRARequest, SamplingParams


def test_the_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.stop, params.seed, params.logprobs) == (16, [], None, None)
    assert not params.is_greedy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 2, "best_of": 1}, "best_of must be n"),
        ({"n": 2, "temperature": 0}, "must be 1 when tokens are not drawn"),
        ({"temperature": -0.5}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -2}, "top_k must be"),
        ({"min_p": 1.5}, "min_p must be 0 to 1"),
        ({"presence_penalty": 2.1}, "presence_penalty must be -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"logprobs": -2}, "logprobs must be"),
        ({"prompt_logprobs": -2}, "prompt_logprobs must be"),
        ({"stop": ["a", ""]}, "stop must not contain an empty string"),
        ({"stop": "a", "detokenize": False}, "need detokenize=True"),
        ({"min_tokens": 17}, "min_tokens must be 0 to max_tokens"),
        ({"allowed_token_ids": []}, "allowed_token_ids must name"),
        ({"bad_words": [" "]}, "bad_words must be words"),
        ({"structured_outputs": {}}, "must have exactly one of json, regex, choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one of"),
        ({"structured_outputs": "a"}, "must be StructuredOutputsParams"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag` is not supported"),
        ({"structured_outputs": {"regex": "a"}, "guided_decoding": {"regex": "a"}}, "are the same"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos cannot be used with"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_off_values_of_what_is_not_served_are_taken() -> None:
    SamplingParams(min_tokens=0, bad_words=[], allowed_token_ids=None, top_k=-1, frequency_penalty=0.0)


def test_a_tiny_temperature_is_raised_with_a_warning_and_less_is_greedy() -> None:
    with pytest.warns(UserWarning, match=r"raised to 0\.01"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert SamplingParams(temperature=1e-6).is_greedy


def test_forms_of_one_meaning_become_one() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[5, 5, 6], seed=-1)
    assert (params.stop, params.stop_token_ids, params.seed) == (["END"], [5, 6], None)


def test_the_engine_gets_its_own_words() -> None:
    params = SamplingParams(temperature=0.5, top_k=-1, frequency_penalty=1.0, logprobs=2, prompt_logprobs=-1)
    sampling = params.for_engine(max_new_tokens=4, vocab_size=99, seed=9)
    assert (sampling.do_sample, sampling.temperature, sampling.top_k, sampling.seed) == (True, 0.5, 0, 9)
    assert (sampling.count_penalty, sampling.frequency_penalty, sampling.prompt_logprobs) == (1.0, 0.0, True)
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs) == (2, 99)
    greedy = SamplingParams(temperature=0).for_engine(max_new_tokens=4, vocab_size=99, seed=9)
    assert (greedy.do_sample, greedy.prompt_logprobs) == (False, False)


def test_an_adapter_request_has_a_name_a_number_and_files() -> None:
    request = LoRARequest("sql", 1, "/adapters/sql")
    assert (request.name, request.adapter_id, request.path) == ("sql", 1, "/adapters/sql")
    for wrong, message in ((("", 1, "p"), "lora_name"), (("a", 0, "p"), "lora_int_id"), (("a", 1, ""), "lora_path")):
        with pytest.raises(ValueError, match=message):
            LoRARequest(*wrong)
