import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_tokenizers import TEXTS, byte_level, save, sentencepiece
from tokenizers import processors
from transformers import AutoTokenizer

from loraplex_server.errors import InvalidRequest
from loraplex_server.text.tokenizer import Tokenizer, TokenizerError, TokenSpan


@pytest.fixture
def tokenizer(tmp_path: Path) -> Iterator[Tokenizer]:
    made = Tokenizer.load(save(byte_level(), tmp_path), num_threads=2)
    yield made
    made.close()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_ids_and_texts_are_those_of_transformers(make, tmp_path: Path) -> None:
    folder = save(make(), tmp_path)
    ours, theirs = Tokenizer.load(folder, num_threads=1), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "", " ", "<|end|>mid<|start|>"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        token_ids = ours.encode(text)
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
        assert ours.decode(token_ids, skip_special_tokens=False) == theirs.decode(token_ids)
    ours.close()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_the_tokens_to_add_are_those_of_tokenizer_config(bos: bool, eos: bool, tmp_path: Path) -> None:
    folder = save(sentencepiece(), tmp_path)
    config = {"add_bos_token": bos, "add_eos_token": eos, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder, num_threads=1)
    plain = tokenizer.encode("ab", add_special_tokens=False)
    assert tokenizer.encode("ab") == [1] * bos + plain + [2] * eos
    tokenizer.close()


def test_another_tokenizer_config_may_be_given(tmp_path: Path) -> None:
    folder = save(sentencepiece(), tmp_path)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"add_bos_token": False, "bos_token": "<s>"}))
    tokenizer = Tokenizer.load(folder, num_threads=1, tokenizer_config_path=str(other))
    assert 1 not in tokenizer.encode("ab")
    tokenizer.close()


def test_async_encoding_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    async def encode_all() -> list[list[int]]:
        return await asyncio.gather(*(tokenizer.encode_async(text) for text in TEXTS))

    assert asyncio.run(encode_all()) == [tokenizer.encode(text) for text in TEXTS]


def test_a_long_text_is_encoded_without_holding_the_interpreter(tokenizer: Tokenizer) -> None:
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    tokenizer.encode("lorem ipsum dolor sit amet " * 50_000)
    done.set()
    thread.join()
    assert ticks > 5  # a call that holds the interpreter lets one or two through, around its ends


def test_spans_are_slices_of_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 😀 fox"
    spans = asyncio.run(tokenizer.encode_with_offsets(text))
    assert [span.id for span in spans] == tokenizer.encode(text)
    assert all(span.text == text[span.start : span.stop] for span in spans)
    assert {"".join(sorted({span.text for span in spans if "😀" in span.text}))} <= {"😀", " 😀", " 😀😀"}


def test_added_special_tokens_have_an_empty_span(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(save(sentencepiece(), tmp_path), num_threads=1)
    spans = asyncio.run(tokenizer.encode_with_offsets("ab"))
    assert spans == [TokenSpan(1, "", 0, 0), TokenSpan(spans[1].id, "a", 0, 1), TokenSpan(spans[2].id, "b", 1, 2)]
    tokenizer.close()


def test_a_special_token_has_a_text_of_its_own_but_none_in_the_output(tokenizer: Tokenizer) -> None:
    assert tokenizer.is_special(0)
    assert not tokenizer.is_special(5)
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.decode([0]) == ""


def test_the_vocabulary_counts_added_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(tokenizer.vocab_size - 1) == "<plain ☃>"
    assert tokenizer.token_text(tokenizer.vocab_size) == ""


def test_truncation_and_padding_of_a_saved_tokenizer_are_not_applied(tmp_path: Path) -> None:
    saved = byte_level()
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    tokenizer = Tokenizer.load(save(saved, tmp_path), num_threads=1)
    assert len(tokenizer.encode("abcdefgh ijklmnop")) > 4
    assert len(tokenizer.encode("a")) == 1
    tokenizer.close()


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", "ok \ud83d\ude00"])
def test_a_lone_surrogate_is_an_invalid_request(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="surrogates not allowed"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", ["a\x00b", "\ufeffa", "\u202eabc", "\u200b", "\r\n\t"])
def test_odd_characters_are_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_folder_without_a_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json .*save_pretrained"):
        Tokenizer.load(str(tmp_path), num_threads=1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_a_broken_tokenizer_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json' cannot be read"):
        Tokenizer.load(str(tmp_path), num_threads=1)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_broken_tokenizer_config_is_named(content: str, tmp_path: Path) -> None:
    folder = save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.load(folder, num_threads=1)


def test_a_missing_tokenizer_config_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    folder = save(byte_level(), tmp_path)
    with pytest.raises(TokenizerError, match=r"nowhere\.json"):
        Tokenizer.load(folder, num_threads=1, tokenizer_config_path=str(tmp_path / "nowhere.json"))


def test_the_text_layer_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, loraplex_server.text.tokenizer, loraplex_server.adapter_registry, loraplex_models.sources,"
        " loraplex_models.adapters.manifest; print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.stdout.strip() == "set()"


def test_a_template_of_the_tokenizer_file_is_kept_without_settings(tmp_path: Path) -> None:
    saved = byte_level()
    saved.post_processor = processors.TemplateProcessing(single=["<|start|>", "$A"], special_tokens=[("<|start|>", 1)])
    tokenizer = Tokenizer.load(save(saved, tmp_path), num_threads=1)
    assert tokenizer.encode("a")[0] == 1
    tokenizer.close()


def test_the_bytes_of_tokens_joined_are_the_text(tmp_path: Path) -> None:
    byte_tokenizer = Tokenizer.load(save(byte_level(), tmp_path), 1)
    for text in TEXTS:
        token_ids = byte_tokenizer.encode(text)
        assert b"".join(map(byte_tokenizer.token_bytes, token_ids)).decode() == text
    assert byte_tokenizer.token_bytes(1) == b"<|start|>"
    sentences = Tokenizer.load(save(sentencepiece(), tmp_path), 1)
    token_ids = [sentences._tokenizer.token_to_id(token) for token in ("<s>", "\u2581Hello", "<0xC3>", "<0xA9>")]
    assert b"".join(map(sentences.token_bytes, token_ids)).decode() == "<s> Helloé"
