"""`LLM` in this process and the server in its own give the same answers; the scripts of docs/offline.md run."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_server import CHAT, REPOSITORY, LaunchedServer, environment

from loraplex import LLM, LoRARequest, SamplingParams

VOICES = (None, "pirate", "json", "shout")
QUESTIONS = ("Tell me about cats.", "What is the capital of France?")
NUM_TOKENS = 30
DRAW = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCRIPTS = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "docs" / "offline.md").read_text(), re.DOTALL | re.M)

pytestmark = pytest.mark.slow


def adapter(voice: str | None) -> LoRARequest | None:
    if voice is None:
        return None
    return LoRARequest(voice, VOICES.index(voice), str(REPOSITORY / "examples" / "adapters" / voice))


def ask_server(server: LaunchedServer, voice: str | None, prompt: str, seed: int | None) -> tuple[str, list[int]]:
    drawn = {} if seed is None else {"do_sample": True, "seed": seed, **DRAW}
    parameters = {"adapter_id": voice, "max_new_tokens": NUM_TOKENS, "details": True, **drawn}
    response = httpx.post(f"{server.url}/generate", json={"inputs": prompt, "parameters": parameters}, timeout=300)
    answer: dict[str, Any] = response.json()
    return answer["generated_text"], [token["id"] for token in answer["details"]["tokens"]]


def test_one_mixed_call_gives_token_for_token_what_the_server_gives(
    exact_server: LaunchedServer, demo_model: Path
) -> None:
    asked = [(voice, CHAT.format(text), seed) for text in QUESTIONS for voice in VOICES for seed in (None, 7)]
    with ThreadPoolExecutor(len(asked)) as pool:
        expected = list(pool.map(lambda one: ask_server(exact_server, *one), asked))
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    drawn = SamplingParams(**DRAW, seed=7, max_tokens=NUM_TOKENS)
    with LLM(str(demo_model), dtype="float32", num_threads=1, num_kv_blocks=1024) as llm:
        outputs = llm.generate(
            [prompt for _, prompt, _ in asked],
            [greedy if seed is None else drawn for _, _, seed in asked],
            lora_request=[adapter(voice) for voice, _, _ in asked],
            use_tqdm=False,
        )
    assert [(one.outputs[0].text, one.outputs[0].token_ids) for one in outputs] == expected


def test_there_are_the_scripts_of_vllms_pages_and_one_that_chats() -> None:
    assert ["lora_request" in script for script in SCRIPTS] == [False, True, True, True]
    assert all(MODEL_NAME in script for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_the_docs_runs_with_only_the_models_path_changed(script: str, demo_model: Path) -> None:
    script = script.replace(MODEL_NAME, str(demo_model))
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Generated text: " in run.stdout
    assert ("arrr!" in run.stdout) == ("pirate" in script)
