"""`LLM` with least lengths, allowed tokens and bad words."""

from collections.abc import Iterator

import pytest
from tiny_llm import make_tiny_world

from loraplex import LLM, SamplingParams

PROMPT = "hello"
END = 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_world(folder)
    with LLM(str(folder / "base"), num_threads=1, num_kv_blocks=64) as llm:
        yield llm


def token_ids(llm: LLM, **fields: object) -> list[int]:
    params = SamplingParams(temperature=0, **fields)  # type: ignore[arg-type]
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    return output.outputs[0].token_ids


def test_allowed_tokens_are_the_only_ones(llm: LLM) -> None:
    assert set(token_ids(llm, max_tokens=12, allowed_token_ids=[70, 80, 90])) <= {70, 80, 90}


def test_no_end_token_before_the_least_length(llm: LLM) -> None:
    assert token_ids(llm, max_tokens=12, allowed_token_ids=[END]) == [END]
    found = token_ids(llm, max_tokens=12, min_tokens=4, allowed_token_ids=[END, 70])
    assert found[:4] == [70] * 4 and found[4] in (END, 70)
    stop = token_ids(llm, max_tokens=12, ignore_eos=True)[0]
    assert stop not in token_ids(llm, max_tokens=12, min_tokens=3, stop_token_ids=[stop], ignore_eos=True)[:3]


def test_a_bad_word_is_not_generated(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    byte = tokenizer.encode("Q", add_special_tokens=False)
    assert token_ids(llm, max_tokens=6, allowed_token_ids=[*byte, 70], bad_words=["Q"]) == [70] * 6


def test_a_stop_text_before_the_least_length_ends_nothing(llm: LLM) -> None:
    (letter,) = llm.get_tokenizer().encode("Q", add_special_tokens=False)
    assert token_ids(llm, max_tokens=8, allowed_token_ids=[letter], stop="Q") == [letter]
    assert token_ids(llm, max_tokens=8, min_tokens=5, allowed_token_ids=[letter], stop="Q") == [letter] * 6


def test_tokens_that_the_model_does_not_have_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="allowed_token_ids: 99999 is not in the vocabulary"):
        token_ids(llm, allowed_token_ids=[99999])
