"""Rows of litellm, by its openai and huggingface providers."""

import litellm
from rows import ASK, PIRATE, PROMPT, main, raises, row

litellm.suppress_debug_info = True


def asked(url: str, model: str = "openai/pirate") -> dict:
    return {"model": model, "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 24, "temperature": 0}


@row
def openai_completion(url: str) -> None:
    assert litellm.completion(messages=ASK, **asked(url)).choices[0].message.content.startswith(PIRATE)


@row
def openai_stream(url: str) -> None:
    chunks = litellm.completion(messages=ASK, stream=True, **asked(url))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith(PIRATE)


@row
def hosted_vllm(url: str) -> None:
    answer = litellm.completion(messages=ASK, **asked(url, "hosted_vllm/pirate"))
    assert answer.choices[0].message.content.startswith(PIRATE)


@row
def text_completion(url: str) -> None:
    answer = litellm.text_completion(prompt=PROMPT, **asked(url, "text-completion-openai/pirate"))
    assert answer.choices[0].text.startswith(PIRATE)


@row
def huggingface_chat(url: str) -> None:
    answer = litellm.completion(
        messages=ASK, model="huggingface/tgi", api_base=url, api_key="none", max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content


@row
async def asynchronous(url: str) -> None:
    answer = await litellm.acompletion(messages=ASK, **asked(url))
    assert answer.choices[0].message.content.startswith(PIRATE)


@row
def errors_show_their_text(url: str) -> None:
    text = raises(litellm.NotFoundError, lambda: litellm.completion(messages=ASK, **asked(url, "openai/pirat")))
    assert "pirat" in text


main()
