"""Rows of lorax-client 0.6."""

import json

from lorax import AsyncClient, Client, MergedAdapters
from lorax.errors import GenerationError, NotFoundError, UnknownError, ValidationError
from rows import PIRATE, PROMPT, SCHEMA, is_answer, main, raises, row

NUM_TOKENS = 24


@row
def generate_with_details(url: str) -> None:
    answer = Client(url).generate(PROMPT, adapter_id="pirate", max_new_tokens=NUM_TOKENS)
    assert answer.generated_text.startswith(PIRATE)
    assert answer.details.prompt_tokens > 20 and len(answer.details.tokens) == answer.details.generated_tokens


@row
def generate_from_the_base(url: str) -> None:
    assert PIRATE not in Client(url).generate(PROMPT, max_new_tokens=NUM_TOKENS).generated_text


@row
def generate_stream(url: str) -> None:
    chunks = list(Client(url).generate_stream(PROMPT, adapter_id="pirate", max_new_tokens=NUM_TOKENS))
    assert chunks[-1].generated_text.startswith(PIRATE) and chunks[-1].details.prompt_tokens > 20
    assert len(chunks) == chunks[-1].details.generated_tokens


@row
def merged_adapters(url: str) -> None:
    merged = MergedAdapters(ids=["pirate", "shout"], weights=[1.0, 0.0], merge_strategy="linear", density=1.0)
    alone = Client(url).generate(PROMPT, adapter_id="pirate", max_new_tokens=8).generated_text
    assert Client(url).generate(PROMPT, merged_adapters=merged, max_new_tokens=8).generated_text == alone


@row
def merged_adapters_of_every_strategy(url: str) -> None:
    for strategy in ("linear", "ties", "dare_linear", "dare_ties"):
        merged = MergedAdapters(
            ids=["pirate", "shout"], weights=[0.5, 0.5], merge_strategy=strategy, density=0.5,
            majority_sign_method="total",
        )  # fmt: skip
        assert Client(url).generate(PROMPT, merged_adapters=merged, max_new_tokens=4).generated_text


@row
def response_format(url: str) -> None:
    answer = Client(url).generate(PROMPT, max_new_tokens=60, response_format={"type": "json_object", "schema": SCHEMA})
    is_answer(answer.generated_text)


@row
def sampling_and_alternatives(url: str) -> None:
    asked = {"do_sample": True, "seed": 5, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    texts = {Client(url).generate(PROMPT, adapter_id="shout", max_new_tokens=8, **asked).generated_text for _ in "ab"}
    assert len(texts) == 1
    answer = Client(url, timeout=60).generate(PROMPT, max_new_tokens=4, return_k_alternatives=3)
    assert all(len(token.alternative_tokens) == 3 for token in answer.details.tokens)


@row
def stop_and_end_token(url: str) -> None:
    answer = Client(url).generate(PROMPT, adapter_id="pirate", max_new_tokens=40, stop_sequences=["ho!"])
    assert answer.generated_text.endswith("ho!") and str(answer.details.finish_reason.value) == "stop_sequence"
    answer = Client(url).generate(PROMPT, adapter_id="pirate", max_new_tokens=60, ignore_eos_token=True)
    assert answer.details.generated_tokens == 60


@row
def typed_errors(url: str) -> None:
    assert "nobody" in raises(
        (NotFoundError, UnknownError, GenerationError),  # type: ignore[arg-type]
        lambda: Client(url).generate(PROMPT, adapter_id="nobody"),
    )
    assert raises(ValidationError, lambda: Client(url).generate("x " * 100_000))


@row
def embed_and_classify_are_refused_clearly(url: str) -> None:
    for call in (Client(url).embed, Client(url).classify):
        text = raises(Exception, lambda call=call: call("x"))
        assert "generates text" in text, text


@row
async def asynchronous(url: str) -> None:
    answer = await AsyncClient(url).generate(PROMPT, adapter_id="pirate", max_new_tokens=NUM_TOKENS)
    assert answer.generated_text.startswith(PIRATE)
    chunks = [one async for one in AsyncClient(url).generate_stream(PROMPT, adapter_id="json", max_new_tokens=60)]
    assert isinstance(json.loads(chunks[-1].generated_text), dict)


main()
