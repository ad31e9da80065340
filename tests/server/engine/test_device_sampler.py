"""The sampler for GPUs, compiled or in Triton's interpreter: the CPU's tokens by launches alone, in any batch."""

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from host_waits import HostWait, Watch, watch_host_waits
from numpy.typing import NDArray
from triton_interpreter import DEVICE, IS_INTERPRETED, needs_interpreter

from loraplex_kernels import dispatch
from loraplex_server.engine import device_rows, device_sampler, device_sampling
from loraplex_server.engine.device_sampler import DeviceSampler
from loraplex_server.engine.guided import GuidedRows
from loraplex_server.engine.sampled_tokens import NO_TOKEN, PendingTokens, SampledTokens
from loraplex_server.engine.sampler import Sampler
from loraplex_server.messages import SamplingParams

# Neither whole words of a mask nor a whole tile of a kernel; of full size where that takes no time.
VOCAB = 1000 if IS_INTERPRETED else 151_669
PROMPT = [7, 8, 999, 8, 3, 8, 3]  # the last two are output
NUM_OUTPUT = 2
CHOICES: dict[str, list[Any]] = {
    "do_sample": [True, True, False],
    "temperature": [1.0, 0.3, 6.0, 1e-40],
    "top_k": [0, 1, 50, 9999],
    "top_p": [1.0, 0.6, 1e-6],
    "typical_p": [1.0, 0.5],
    "min_p": [0.0, 0.05, 1.0],
    "repetition_penalty": [1.0, 1.4, 0.7],
    "frequency_penalty": [0.0, 2.0],
    "presence_penalty": [0.0, -1.5],
    "count_penalty": [0.0, 2.0],
    "logit_bias": [{}, {3: 4.0, 999: -100.0, 8: -1.0}],
    "watermark": [False, False, True],
    "min_new_tokens": [0, 3],
    "held_back_token_ids": [(0, 1, 2, 3, 4)],
    "allowed_token_ids": [(), (), tuple(range(2, 1000, 7))],
    "bad_words": [(), ((8,), (999,)), ((8, 3), (8, 3, 5), (9, 9, 9), (11,))],
    "num_logprobs": [0, 1, 6],
    "guide": [None, None, "even", "odd"],
    "seed": [1, 2**64 - 1],
}


class Parity(GuidedRows):
    """Grammars that allow the even or the odd tokens by turns, and nothing at all behind the token 13."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[int, list[int]]] = {}

    def start(self, row: int, grammar: str, output_token_ids: Sequence[int]) -> None:
        self._written[row] = (grammar == "odd", list(output_token_ids))

    def stop(self, row: int) -> None:
        del self._written[row]

    def masks(self, rows: Sequence[int]) -> tuple[NDArray[np.int32], dict[int, str]]:
        masks = np.zeros((len(rows), VOCAB // 32 + 2), dtype=np.int32)  # more bits than tokens
        problems = {}
        for line, row in enumerate(rows):
            is_odd, written = self._written[row]
            masks[line] = 0xAAAAAAAA - (1 << 32) if (is_odd + len(written)) % 2 else 0x55555555
            if written[-1:] == [13]:
                masks[line] = 0
                problems[row] = "the end"
        return masks, problems

    def advance(self, token_ids: Any) -> None:
        for row, token_id in token_ids.items():
            self._written[row][1].append(token_id)


def make(kind: type[Any], num_rows: int) -> Any:
    guided = Parity()
    device = DEVICE if kind is DeviceSampler else torch.device("cpu")
    return kind(num_rows, VOCAB, device, watermark_gamma=0.5, watermark_delta=2.0, guided_rows=guided)


def pairwise_mixes() -> list[SamplingParams]:
    """Parameters such that any two values of different parameters come together, and plain greedy rows between."""
    choose = random.Random(0)
    values = [(name, i) for name, some in CHOICES.items() for i in range(len(some))]
    missing = {frozenset(pair) for pair in combinations(values, 2) if pair[0][0] != pair[1][0]}
    mixes = []
    while missing:
        tries = [{name: choose.randrange(len(some)) for name, some in CHOICES.items()} for _ in range(30)]
        covered = [{frozenset(pair) for pair in combinations(mix.items(), 2)} & missing for mix in tries]
        best = max(range(30), key=lambda i: len(covered[i]))
        missing -= covered[best]
        fields = {name: CHOICES[name][i] for name, i in tries[best].items()}
        mixes.append(SamplingParams(max_new_tokens=9, **fields))
        if len(mixes) % 5 == 0:
            mixes.append(SamplingParams(max_new_tokens=9))
    return mixes


MIXES = pairwise_mixes()
FEW = [
    SamplingParams(max_new_tokens=9),
    SamplingParams(max_new_tokens=9, do_sample=True, seed=5, temperature=1.5),
    SamplingParams(max_new_tokens=9, repetition_penalty=3.0, count_penalty=4.0),
    SamplingParams(max_new_tokens=9, do_sample=True, seed=6, top_k=30, allowed_token_ids=tuple(range(2, 1000, 7))),
    SamplingParams(max_new_tokens=9, do_sample=True, seed=7, bad_words=((8, 3, 5),), num_logprobs=3),
]


@pytest.fixture(autouse=True)
def interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", IS_INTERPRETED)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = watch_host_waits(monkeypatch)
    for module in (device_sampler, device_sampling, device_rows):
        watch.exempt(monkeypatch, module, "send_arrays")
    watch.exempt(monkeypatch, device_sampler, "green_list")
    return watch


def logits_of(num_rows: int, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(step)) * 3
    numbers[:, 3] += 4  # ends bad words, is biased and was there before
    return numbers.to(dtype)


def fill(sampler: Any, params: Sequence[SamplingParams]) -> None:
    for row, some in enumerate(params):
        sampler.add(row, some, PROMPT, NUM_OUTPUT)


def assert_same(ours: SampledTokens, truth: SampledTokens) -> None:
    assert ours.token_ids == truth.token_ids
    assert ours.logprobs == pytest.approx(truth.logprobs, abs=1e-4)
    assert ours.problems == truth.problems
    for our_tops, true_tops in zip(ours.top_logprobs, truth.top_logprobs, strict=True):
        assert [top.token_id for top in our_tops] == [top.token_id for top in true_tops]
        assert [top.logprob for top in our_tops] == pytest.approx([top.logprob for top in true_tops], abs=1e-4)


def test_every_pair_of_parameters_gives_the_cpus_tokens_by_launches_alone(watch: Watch) -> None:
    ours, truth = make(DeviceSampler, len(MIXES)), make(Sampler, len(MIXES))
    fill(truth, MIXES)
    for row, params in enumerate(MIXES):
        with watch.launches_only():
            ours.add(row, params, PROMPT, NUM_OUTPUT)
    rows = list(range(len(MIXES)))
    for step in range(2):
        logits = logits_of(len(MIXES), step)
        there = logits.to(DEVICE)
        with watch.launches_only():
            pending = ours.launch(there, rows)
        assert_same(pending.read(), truth.sample(logits, rows))
    assert len(MIXES) < 60


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_steps_that_are_read_late_give_the_same_tokens(watch: Watch, dtype: torch.dtype) -> None:
    # Rows come, go and change places between the launches, which lie in any lines of the logits.
    choose = random.Random(3)
    ours, truth = make(DeviceSampler, len(FEW)), make(Sampler, len(FEW))
    fill(ours, FEW)
    fill(truth, FEW)
    pending: list[PendingTokens] = []
    expected: list[SampledTokens] = []
    written = [PROMPT.copy() for _ in FEW]
    for step in range(6):
        rows = choose.sample(range(len(FEW)), choose.randint(2, len(FEW)))
        lines = choose.sample(range(7), len(rows))
        logits = logits_of(7, step, dtype)
        there = logits.to(DEVICE)
        with watch.launches_only():
            pending.append(ours.launch(there, rows, lines))
        expected.append(truth.sample(logits[lines], rows))
        for row, token_id in zip(rows, expected[-1].token_ids, strict=True):
            written[row].append(token_id)
            assert ours.last_token_ids[row] == token_id
        back = rows[0]  # preempted, and back
        for sampler in (ours, truth):
            sampler.remove(back)
            sampler.add(back, FEW[back], written[back], len(written[back]) - len(PROMPT) + NUM_OUTPUT)
    for late, true in zip(pending, expected, strict=True):
        assert_same(late.read(), true)


@needs_interpreter
def test_a_batch_of_greedy_rows_is_one_kernel_and_other_rows_cost_only_what_they_ask_for(watch: Watch) -> None:
    plain, cold = SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=9, do_sample=True)
    for params, num_kernels in [([plain, plain], 1), ([plain, cold], 4), ([cold], 3), (FEW[:3], 5)]:
        sampler = make(DeviceSampler, len(params))
        fill(sampler, params)
        watch.num_launches = 0
        sampler.launch(logits_of(len(params), 0), list(range(len(params))))
        assert watch.num_launches == num_kernels


def test_a_token_read_late_does_not_move_the_grammar_of_the_rows_next_sequence() -> None:
    guided = msgspec.structs.replace(FEW[0], guide="odd")
    ours, fresh = make(DeviceSampler, 1), make(DeviceSampler, 1)
    ours.add(0, guided, PROMPT)
    pending = ours.launch(logits_of(1, 0).to(DEVICE), [0])
    ours.remove(0)
    ours.add(0, guided, PROMPT)
    pending.read()
    fresh.add(0, guided, PROMPT)
    logits = logits_of(1, 1).to(DEVICE)
    assert ours.launch(logits, [0]).read() == fresh.launch(logits, [0]).read()


@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf])
def test_broken_logits_cost_only_their_own_rows(damage: float) -> None:
    params = [*FEW, *MIXES[:3]]
    rows = list(range(len(params)))
    ours, truth = make(DeviceSampler, len(params)), make(Sampler, len(params))
    fill(ours, params)
    fill(truth, params)
    for step, broken in enumerate([rows[::2], rows[1::3]]):
        logits = logits_of(len(params), step)
        for row in broken:
            logits[row, slice(None) if damage == -torch.inf else 3 + 7 * 100] = damage
        last = ours.last_token_ids.clone()
        sampled = ours.launch(logits.to(DEVICE), rows).read()
        assert_same(sampled, truth.sample(logits, rows))
        for row, token_id in enumerate(sampled.token_ids):
            if step and token_id == NO_TOKEN:
                assert ours.last_token_ids[row] == last[row]


@pytest.mark.parametrize("num_top", [0, 4])
def test_prompt_logprobs_are_those_of_the_cpu(watch: Watch, num_top: int) -> None:
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=True, num_prompt_logprobs=num_top)
    ours, truth = make(DeviceSampler, 1), make(Sampler, 1)
    ours.add(0, params, PROMPT)
    truth.add(0, params, PROMPT)
    logits = logits_of(9, 1)
    logits[4, :600] = 5.0  # ties
    there = logits.to(DEVICE)
    with watch.launches_only():
        pending = ours.launch_prompt(there[1:], [*PROMPT, 0], 0)
    found, expected = pending.read(), truth.launch_prompt(logits[1:], [*PROMPT, 0], 0).read()
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert [[top.token_id for top in tops] for tops in found.top_logprobs] == [
        [top.token_id for top in tops] for tops in expected.top_logprobs
    ]


# Planted faults


@needs_interpreter
def test_waits_for_the_device_are_found(watch: Watch) -> None:
    numbers = torch.randn(3)
    for wait in (
        lambda: numbers[0].item(),
        lambda: bool(numbers[0] > 0),
        lambda: numbers[numbers > 0],
        lambda: numbers[[0, 2]],
        lambda: numbers.nonzero(),
        lambda: numbers.to("cpu", torch.float64),
        lambda: torch.tensor([1]),
        lambda: numbers.tolist(),
        lambda: torch.masked_select(numbers, numbers > 0),
    ):
        with pytest.raises(HostWait), watch.launches_only():
            wait()


def compare(params: Sequence[SamplingParams]) -> None:
    """Three steps over the same logits, so that only what was chosen before makes a difference between them."""
    rows = list(range(len(params)))
    ours, truth = make(DeviceSampler, len(params)), make(Sampler, len(params))
    fill(ours, params)
    fill(truth, params)
    for _ in range(3):
        logits = logits_of(len(params), 0)
        assert_same(ours.launch(logits.to(DEVICE), rows).read(), truth.sample(logits, rows))


def test_a_missing_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = device_sampler.copy_scores
    compare(FEW)
    monkeypatch.setattr(device_sampler, "copy_scores", lambda logits, lines, masks, out: copy(logits, lines, None, out))
    with pytest.raises(AssertionError):
        compare(FEW)


def test_a_stale_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampling, "IS_COUNTED", 0)
    with pytest.raises(AssertionError):
        compare(FEW)


def test_another_rows_seed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = device_sampling.seed_keys
    monkeypatch.setattr(device_sampling, "seed_keys", lambda seeds: np.roll(keys(seeds), 1))
    with pytest.raises(AssertionError):
        compare(FEW)
