"""The whole engine through Triton's interpreter: the tokens are those of the CPU's engine."""

from pathlib import Path
from typing import Any

import pytest
from engines import EngineBench
from tiny_models import make_peft_adapter, make_tiny_llama
from triton.runtime.interpreter import GridExecutor
from triton_interpreter import needs_interpreter

from loraplex_kernels import dispatch
from loraplex_server.engine import forward_pass, graphs, process
from loraplex_server.engine.graphs import run_again

REQUESTS: list[tuple[str, list[int], str | None, dict[str, Any]]] = [
    ("base", list(range(3, 20)), None, {}),
    (
        "one",
        [5, 6, 7],
        "narrow",
        {"do_sample": True, "seed": 3, "repetition_penalty": 1.5, "bad_words": ((9, 9), (8,))},
    ),
    ("other", list(range(40, 49)), "wide", {"prompt_logprobs": True}),
    ("again", [5, 6, 7, 9], "narrow", {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "watermark": True}),
]
SAMPLING_KERNELS = {
    "_choose", "_copy_scores", "_add_biases", "_ban_tokens", "_add_to_lists", "_penalise", "_temper", "_cut_scores",
    "_draw", "_top_tokens", "_given_tokens",
}  # fmt: skip

pytestmark = needs_interpreter


@pytest.fixture
def bench(tmp_path: Path) -> EngineBench:
    model = make_tiny_llama(tmp_path / "model")
    adapters = {
        "narrow": make_peft_adapter(tmp_path / "narrow", model, rank=3),
        "wide": make_peft_adapter(tmp_path / "wide", model, rank=20, target_modules=["q_proj", "down_proj"], seed=2),
    }
    return EngineBench(tmp_path / "model", adapters)


def answers(bench: EngineBench, **settings: int | str) -> dict[str, tuple[list[int], list[float]]]:
    bench.start(**settings)
    for name, prompt, adapter, sampling in REQUESTS:
        bench.add(name, prompt, adapter, max_new_tokens=5, ignore_eos=True, **sampling)
    bench.run()
    bench.engine.blocks.check_integrity()
    found = {name: bench.answer(name) for name, *_ in REQUESTS}
    bench.engine.close()
    return {name: (answer.token_ids, answer.logprobs) for name, answer in found.items()}


def test_the_engine_gives_the_same_tokens_by_triton_and_by_the_cpu(
    bench: EngineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One slot for two adapters, and prompts in chunks: adapters come and go between steps.
    settings = {"max_resident_adapters": 1, "max_batch_prefill_tokens": 8, "max_batch_size": 4}
    truth = answers(bench, **settings)
    settings["overlap_steps"] = "on"
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    monkeypatch.setattr(forward_pass, "CAPTURE_ON_CPU", run_again)
    monkeypatch.setattr(graphs, "OFTEN", 2)
    ours = answers(bench, **settings)
    for name, (token_ids, logprobs) in truth.items():
        assert ours[name][0] == token_ids, name
        assert ours[name][1] == pytest.approx(logprobs, abs=1e-3), name


def test_the_warm_up_calls_every_kernel_of_the_sampler(bench: EngineBench, monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()
    run = GridExecutor.__call__

    def noted(self: GridExecutor, *arguments: Any, **settings: Any) -> None:
        called.add(self.fn.__name__)
        run(self, *arguments, **settings)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    bench.start()
    process._warm_up(bench.engine, bench.model)
    bench.engine.close()
    assert called >= SAMPLING_KERNELS
