"""The released clients of chat and completions against the demo as `make serve` starts it."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import huggingface_hub
import openai
import pytest
import torch
from demo_server import CHAT, LaunchedServer, environment
from documented import ADDRESS, blocks_of
from huggingface_hub import AsyncInferenceClient, InferenceClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex.flags import GROUPS, setting_fields

QUESTION = "What is the capital of France?"
ASK = [{"role": "user", "content": QUESTION}]
VOICES = ("pirate", "json", "shout")

pytestmark = pytest.mark.slow


@pytest.fixture
def client(demo_server: LaunchedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def native(server: LaunchedServer, adapter_id: str | None, **parameters: object) -> str:
    """What /generate says to the same question."""
    asked = {"adapter_id": adapter_id, "max_new_tokens": 24, **parameters}
    answer = httpx.post(
        f"{server.url}/generate", json={"inputs": CHAT.format(QUESTION), "parameters": asked}, timeout=300
    )
    return str(answer.json()["generated_text"])


def test_openai_chat_names_the_adapter_as_the_model_and_says_what_generate_says(
    client: openai.OpenAI, demo_server: LaunchedServer
) -> None:
    for voice in (None, *VOICES):
        answer = client.chat.completions.create(model=voice or "tgi", messages=ASK, max_tokens=24, temperature=0)
        assert answer.choices[0].message.content == native(demo_server, voice)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.model == voice or voice is None
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_streams_the_same_with_the_usage_at_the_end(client: openai.OpenAI) -> None:
    asked = {"model": "pirate", "messages": ASK, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices].count("assistant") == 1
    assert chunks[-1].usage == whole.usage


def test_openai_chat_with_everything_at_once(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="shout", messages=[{"role": "system", "content": "Answer briefly."}, *ASK], max_tokens=12, n=2, seed=3,
        temperature=0.7, top_p=0.9, stop=["!"], logprobs=True, top_logprobs=3, frequency_penalty=0.5,
        presence_penalty=0.2, logit_bias={"1000": -5}, user="someone",
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.05, "ignore_eos": False},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.content is not None and "!" not in choice.message.content
        assert choice.logprobs is not None and choice.logprobs.content
        # The cuts may leave fewer than three.
        assert all(1 <= len(token.top_logprobs) <= 3 for token in choice.logprobs.content)


def test_openai_errors_show_their_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"pirat.*does not exist.*pirate") as refused:
        client.chat.completions.create(model="pirat", messages=ASK)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="top_p"):
        client.chat.completions.create(model="tgi", messages=ASK, top_p=3)
    with pytest.raises(openai.NotFoundError):
        list(client.completions.create(model="nobody", prompt="x", stream=True))


def test_openai_completions_of_several_prompts(client: openai.OpenAI, demo_server: LaunchedServer) -> None:
    prompts = [CHAT.format(QUESTION), CHAT.format("What do bees make?")]
    answer = client.completions.create(model="pirate", prompt=prompts, max_tokens=24, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == native(demo_server, "pirate")
    pieces = ["", ""]
    for chunk in client.completions.create(model="pirate", prompt=prompts, max_tokens=24, temperature=0, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [choice.text for choice in answer.choices]


def test_openai_lists_and_retrieves_the_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert set(names[1:]) == set(VOICES)
    for name in names:
        assert client.models.retrieve(name).id == name
    base = client.chat.completions.create(model=f"{names[0]}:pirate", messages=ASK, max_tokens=1)
    assert base.model == "pirate"


def test_echoed_log_probabilities_are_those_of_transformers(exact_server: LaunchedServer, demo_model: Path) -> None:
    client = openai.OpenAI(base_url=f"{exact_server.url}/v1", api_key="none")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    token_ids = tokenizer("The capital of France is Paris, and that of Portugal is Lisbon.")["input_ids"]
    answer = client.completions.create(
        model="tgi", prompt=token_ids, max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.top_logprobs is not None
    assert found.token_logprobs is not None and found.token_logprobs[0] is None
    assert len(found.tokens) == len(found.token_logprobs) == len(token_ids) + 1
    assert "".join(found.tokens[:-1]) == tokenizer.decode(token_ids)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([token_ids])).logits[0].float().log_softmax(1)
    for place, token_id in enumerate(token_ids[1:], start=1):
        row = logprobs[place - 1]
        assert found.token_logprobs[place] == pytest.approx(row[token_id].item(), abs=1e-3)
        top = found.top_logprobs[place]
        assert top[found.tokens[place]] == found.token_logprobs[place]
        assert max(top, key=top.__getitem__) == tokenizer.decode([int(row.argmax())])
    client.close()


def test_huggingface_hub_chats_whole_and_in_a_stream(demo_server: LaunchedServer) -> None:
    whole_texts = {}
    for voice in VOICES:
        client = InferenceClient(base_url=demo_server.url)
        asked = {"model": voice, "messages": ASK, "max_tokens": 24, "temperature": 0.0}
        whole = client.chat_completion(**asked)
        stream = client.chat_completion(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content == native(demo_server, voice)
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        whole_texts[voice] = text
    assert len(set(whole_texts.values())) == len(VOICES)


def test_huggingface_hub_given_only_an_address_gets_the_base_or_the_adapter_it_names(
    demo_server: LaunchedServer,
) -> None:
    client = InferenceClient(demo_server.url)
    base = client.chat_completion(ASK, max_tokens=24, temperature=0.0, logprobs=True, top_logprobs=2)
    assert base.choices[0].message.content == native(demo_server, None)
    assert len(base.choices[0].logprobs.content[0].top_logprobs) == 2
    named = client.chat_completion(ASK, max_tokens=24, temperature=0.0, extra_body={"adapter_id": "json"})
    assert named.choices[0].message.content == native(demo_server, "json")


def test_the_async_clients(demo_server: LaunchedServer) -> None:
    async def run() -> tuple[str | None, str | None]:
        asked = {"messages": ASK, "max_tokens": 24, "temperature": 0.0, "model": "json"}
        async with (
            AsyncInferenceClient(base_url=demo_server.url) as hub,
            openai.AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none") as ours,
        ):
            first, second = await asyncio.gather(hub.chat_completion(**asked), ours.chat.completions.create(**asked))
            return first.choices[0].message.content, second.choices[0].message.content

    first, second = asyncio.run(run())
    assert first == second == native(demo_server, "json")
    assert first is not None
    json.loads(first[: first.index("}") + 1])


def test_a_conversation_becomes_the_prompt_and_the_tokens_that_transformers_makes_of_it(
    demo_server: LaunchedServer, demo_model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Où est <b>l'or</b>? 😀"},
        {"role": "assistant", "content": "Under "},
    ]
    for messages, options in (
        (turns[:2], {"add_generation_prompt": True}),
        (turns[1:2], {"add_generation_prompt": False}),
        (turns, {"continue_final_message": True}),
    ):
        answer = httpx.post(
            f"{demo_server.url}/chat_tokenize", json={"messages": messages, **options}, timeout=300
        ).json()
        expected = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert answer["templated_text"] == expected
        token_ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert [token["id"] for token in answer["tokenize_response"]] == token_ids


# The others run in environments of their own: tests/clients/matrix.py.
DOCUMENTED = [
    (heading, language, text)
    for heading, language, text in blocks_of("clients.md")
    if heading in ("curl", "openai", "huggingface_hub", "Evaluation harnesses", "Structured output and tools")
]


@pytest.mark.parametrize(("heading", "language", "text"), DOCUMENTED, ids=[heading for heading, _, _ in DOCUMENTED])
def test_an_example_of_the_page_about_clients_runs(
    demo_server: LaunchedServer, heading: str, language: str, text: str
) -> None:
    block = text.replace(ADDRESS, f"127.0.0.1:{demo_server.port}")
    command = ["bash", "-c", block] if language == "bash" else [sys.executable, "-c", block]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert '"error"' not in run.stdout
    expected = {
        "Evaluation harnesses": '"text":"The capital of France is',
        "Structured output and tools": "get_weather {'city': ",
    }
    assert expected.get(heading, "Yo ho ho!") in run.stdout


def test_every_client_of_the_page_has_an_example() -> None:
    assert len(DOCUMENTED) == 5
    headings = {heading for heading, _, _ in blocks_of("clients.md")}
    assert {"lorax-client", "text-generation", "LangChain", "LiteLLM", "JavaScript", "OpenAI Agents SDK"} <= headings


def test_the_example_of_an_endpoint_names_what_huggingface_hub_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [text for heading, _, text in blocks_of("clients.md") if heading == "Hosted endpoints"]
    real = inspect.signature(huggingface_hub.create_inference_endpoint)
    asked: list[inspect.BoundArguments] = []

    def create(*args: object, **kwargs: object) -> MagicMock:
        asked.append(real.bind(*args, **kwargs))
        return MagicMock()

    monkeypatch.setattr(huggingface_hub, "create_inference_endpoint", create)
    exec(block, {})
    (arguments,) = asked
    image = arguments.arguments["custom_image"]
    assert (image["port"], image["health_route"]) == (80, "/health")
    known = {field.env_name for group in GROUPS for field in setting_fields(group)}
    assert set(image["env"]) <= known
