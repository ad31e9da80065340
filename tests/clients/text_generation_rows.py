"""Rows of text-generation 0.7, TGI's own client, whose streamed chat breaks on OpenAI's [DONE]."""

from rows import ASK, PIRATE, PROMPT, SCHEMA, is_answer, main, raises, row
from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType


@row
def generate(url: str) -> None:
    answer = Client(url, timeout=60).generate(PROMPT, max_new_tokens=8, top_n_tokens=2)
    assert answer.generated_text and len(answer.details.top_tokens) == answer.details.generated_tokens


@row
def generate_stream(url: str) -> None:
    chunks = list(Client(url, timeout=60).generate_stream(PROMPT, max_new_tokens=8))
    assert chunks[-1].generated_text and chunks[-1].details.generated_tokens == len(chunks)


@row
def generate_with_a_grammar(url: str) -> None:
    grammar = Grammar(type=GrammarType.Json, value=SCHEMA)
    is_answer(Client(url, timeout=60).generate(PROMPT, max_new_tokens=60, grammar=grammar).generated_text)


@row
def chat(url: str) -> None:
    answer = Client(url, timeout=60).chat(messages=ASK, max_tokens=8, temperature=0.5, seed=1)
    assert answer.choices[0].message.content


@row
def typed_errors(url: str) -> None:
    assert raises(ValidationError, lambda: Client(url, timeout=60).generate("x " * 100_000))


@row
async def asynchronous(url: str) -> None:
    whole = await AsyncClient(url, timeout=60).generate(PROMPT, max_new_tokens=8)
    chunks = [one async for one in AsyncClient(url, timeout=60).generate_stream(PROMPT, max_new_tokens=8)]
    assert chunks[-1].generated_text == whole.generated_text and PIRATE not in whole.generated_text


main()
