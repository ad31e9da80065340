from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_tokenizers import TEXTS, byte_level, sentencepiece

from loraplex_server.text.detokenizer import ByteLevelDetokenizer
from loraplex_server.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
TRICKY = [
    "👨‍👩‍👧‍👦", "👩🏽‍🚀!", "e\u0301e", "漢字 かな", "🇩🇰🇩🇪", "  leading", "trailing  ", "\n\n",
    "a\u200db", "\ufeffx", "",
]  # fmt: skip


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Iterator[Tokenizer]:
    made = Tokenizer({"byte_level": byte_level, "sentencepiece": sentencepiece}[request.param](), num_threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Iterator[Tokenizer]:
    made = Tokenizer(byte_level(), num_threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def words_tokenizer() -> Iterator[Tokenizer]:
    made = Tokenizer(sentencepiece(), num_threads=1)
    yield made
    made.close()


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = tokenizer.new_detokenizer(prompt)
    return [*(detokenizer.add(token_id) for token_id in token_ids), detokenizer.flush()]


# Ids of any kind: valid text, halves of characters, invalid bytes, special tokens, ids beyond the vocabulary.
any_ids = st.lists(st.integers(0, 420), max_size=40)


@settings(deadline=None)
@given(token_ids=any_ids)
@example(token_ids=[])
@example(token_ids=[0, 0, 0])
def test_joined_pieces_are_the_decoded_whole(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(TRICKY + TEXTS)))
def test_valid_text_comes_back_without_a_replacement_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, token_ids)
    assert "".join(parts) == tokenizer.decode(token_ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


@settings(deadline=None)
@given(text=st.one_of(st.text(max_size=40), st.sampled_from(TRICKY + TEXTS)))
def test_byte_level_text_round_trips_and_every_complete_character_is_given_at_once(
    bytes_tokenizer: Tokenizer, text: str
) -> None:
    token_ids = bytes_tokenizer.encode(text, add_special_tokens=False)
    detokenizer = bytes_tokenizer.new_detokenizer([])
    given_text = ""
    for count, token_id in enumerate(token_ids, start=1):
        given_text += detokenizer.add(token_id)
        assert given_text == bytes_tokenizer.decode(token_ids[:count]).rstrip(REPLACEMENT) or REPLACEMENT in text
    assert given_text + detokenizer.flush() == text


@settings(deadline=None)
@given(prompt=any_ids, token_ids=any_ids)
def test_text_after_a_prompt_continues_the_prompts_text(
    words_tokenizer: Tokenizer, prompt: list[int], token_ids: list[int]
) -> None:
    prompt = [*prompt, words_tokenizer.encode("a", add_special_tokens=False)[0]]
    whole = words_tokenizer.decode(prompt + token_ids)
    assert "".join(pieces(words_tokenizer, token_ids, prompt)) == whole[len(words_tokenizer.decode(prompt)) :]


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without_one(words_tokenizer: Tokenizer) -> None:
    prompt, token_ids = ([sentencepiece().token_to_id(word)] for word in ("▁Hello", "▁world"))
    assert "".join(pieces(words_tokenizer, token_ids, prompt)) == " world"
    assert "".join(pieces(words_tokenizer, token_ids)) == "world"


def test_bytes_at_the_end_of_the_prompt_do_not_spoil_what_follows(words_tokenizer: Tokenizer) -> None:
    prompt = words_tokenizer.encode("😀")
    broken = [*words_tokenizer.encode("é漢", add_special_tokens=False)[:2], words_tokenizer.encode("b")[-1]]
    assert "".join(pieces(words_tokenizer, broken, prompt)).endswith("b")
    assert REPLACEMENT in "".join(pieces(words_tokenizer, broken, prompt))


def test_nothing_is_given_inside_a_character(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🜁", add_special_tokens=False)
    assert len(token_ids) > 1
    assert not any(pieces(tokenizer, token_ids)[: len(token_ids) - 1])


def test_an_unfinished_character_is_a_replacement_character_at_the_end(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🜁", add_special_tokens=False)[:-1]
    parts = pieces(tokenizer, token_ids)
    assert not any(parts[:-1])
    assert parts[-1] == tokenizer.decode(token_ids)
    assert set(parts[-1]) == {REPLACEMENT}


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, [1, 1, 1]) == ["", "", "", ""]


def test_an_added_token_that_is_no_byte_string_is_plain_text(bytes_tokenizer: Tokenizer) -> None:
    token_ids = bytes_tokenizer.encode("a<plain ☃>b")
    assert "".join(pieces(bytes_tokenizer, token_ids)) == "a<plain ☃>b"


def test_invalid_bytes_are_given_as_they_come(bytes_tokenizer: Tokenizer) -> None:
    continuation = bytes_tokenizer.encode("🜁", add_special_tokens=False)[-1]
    assert pieces(bytes_tokenizer, [continuation] * 5) == [REPLACEMENT] * 5 + [""]


def test_the_work_of_a_token_does_not_grow_with_the_output(words_tokenizer: Tokenizer) -> None:
    decoded = 0
    decode = words_tokenizer.decode

    def counting(token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return decode(token_ids, skip_special_tokens)

    words_tokenizer.decode = counting  # type: ignore[method-assign]
    try:
        token_ids = words_tokenizer.encode("ab!" * 1000 + "😀" * 500, add_special_tokens=False)
        pieces(words_tokenizer, token_ids)
    finally:
        del words_tokenizer.decode  # type: ignore[method-assign]
    assert decoded < 20 * len(token_ids)


@settings(deadline=None)
@given(data=st.binary(max_size=24), cuts=st.lists(st.integers(1, 5), min_size=24, max_size=24))
def test_bytes_decode_the_same_however_they_are_cut_into_tokens(data: bytes, cuts: list[int]) -> None:
    chunks, rest = [], data
    for size in cuts:
        chunks.append(rest[:size])
        rest = rest[size:]
    chunks.append(rest)
    detokenizer = ByteLevelDetokenizer(lambda token_id: chunks[token_id])
    text = "".join(detokenizer.add(index) for index in range(len(chunks))) + detokenizer.flush()
    assert text == data.decode("utf-8", "replace")
