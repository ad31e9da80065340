"""Draws with cuts through Triton's interpreter: the tokens are those of the CPU's sampler."""

import pytest
import torch
from triton_interpreter import needs_interpreter

from loraplex_kernels import dispatch
from loraplex_server.engine.sampler import Sampler
from loraplex_server.messages import SamplingParams

PARAMS = [
    SamplingParams(do_sample=True, seed=1, top_k=5, temperature=0.8, max_new_tokens=4),
    SamplingParams(do_sample=True, seed=2, top_p=0.7, max_new_tokens=4),
    SamplingParams(do_sample=True, seed=3, typical_p=0.6, repetition_penalty=1.3, max_new_tokens=4),
    SamplingParams(do_sample=True, seed=4, top_k=9, top_p=0.5, min_p=0.05, max_new_tokens=4),
    SamplingParams(max_new_tokens=4),
]


@needs_interpreter
def test_draws_with_cuts_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = [torch.randn(len(PARAMS), 400) * 3 for _ in range(3)]
    found = []
    for interprets in (False, True):
        monkeypatch.setattr(dispatch, "INTERPRETS", interprets)
        sampler = Sampler(len(PARAMS), 400, torch.device("cpu"), watermark_gamma=0.5, watermark_delta=2.0)
        for row, params in enumerate(PARAMS):
            sampler.add(row, params, [3, 4, 5])
        found.append([sampler.sample(logits, list(range(len(PARAMS)))) for logits in steps])
    for cpu, triton in zip(*found, strict=True):
        assert triton.token_ids == cpu.token_ids
        assert triton.logprobs == pytest.approx(cpu.logprobs, abs=1e-4)
