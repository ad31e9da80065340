"""The GPU engine as a whole, from staging to graphs, on the CPU's stand-in for torch.cuda."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_clocks import HostWaits, NotInCapture, Race
from cuda_stand_in import CudaStandIn
from engines import EngineBench
from flashinfer_stand_in import FlashInferStandIn
from tiny_models import make_peft_adapter, make_tiny_llama
from triton_interpreter import needs_interpreter
from truth import Answer

from loraplex_kernels import streams
from loraplex_kernels.flashinfer_prompts import AttentionSizes, PromptAttention
from loraplex_kernels.lora_pages import RankPages
from loraplex_models.decoder import CausalLM
from loraplex_server.engine import graphs, staging

pytestmark = needs_interpreter

# Whatever takes programs of the interpreter, as small as it can be.
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
# One slot for two adapters, and prompts in chunks: adapters come and go between steps.
SETTINGS = {"max_resident_adapters": 1, "max_batch_prefill_tokens": 8, "max_batch_size": 2, "max_total_tokens": 64}
ONE_ROW = SETTINGS | {"max_batch_size": 1}
World = tuple[Path, dict[str, Path]]
# Name, prompt, adapter, what else the request asks for.
Requests = list[tuple[str, list[int], str | None, dict[str, Any]]]
REQUESTS: Requests = [
    ("base", list(range(3, 16)), None, {}),
    ("one", [5, 6, 7], "narrow", {}),
    ("other", list(range(40, 46)), "wide", {"repetition_penalty": 1.3, "presence_penalty": 0.4, "num_logprobs": 3}),
    ("again", [5, 6, 7, 9], "narrow", {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}),
    ("last", [8, 9], None, {"logit_bias": {5: 3.0}, "bad_words": ((5, 5),), "min_new_tokens": 2}),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("stand-in")
    reference = make_tiny_llama(folder / "model", **SMALL)
    wide = {"rank": 20, "target_modules": ["q_proj", "down_proj"], "seed": 2}
    return folder / "model", {
        "narrow": make_peft_adapter(folder / "narrow", reference, rank=3),
        "wide": make_peft_adapter(folder / "wide", reference, **wide),
    }


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaStandIn:
    monkeypatch.setattr(streams, "_side_streams", {})
    return CudaStandIn(monkeypatch)


def answers(bench: EngineBench, requests: Requests = REQUESTS) -> dict[str, Answer]:
    for name, prompt, adapter, sampling in requests:
        bench.add(name, prompt, adapter, max_new_tokens=4, ignore_eos=True, **sampling)
    bench.run()
    bench.engine.blocks.check_integrity()
    bench.engine.close()
    return {name: bench.answer(name) for name, *_ in requests}


@pytest.fixture(scope="module")
def truth(world: World) -> dict[str, Answer]:
    """What the CPU's engine answers."""
    return answers(EngineBench(*world, **SETTINGS))


def test_the_gpu_engine_gives_the_tokens_of_the_cpu_and_never_waits_but_to_read_them(
    world: World, truth: dict[str, Answer], cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "OFTEN", 2)
    bench = EngineBench(*world, device="cuda", **SETTINGS)
    torch.cuda.set_sync_debug_mode("error")
    ours = answers(bench)
    cuda.finish()
    # Four at start; then, between steps, those of the linears that an adapter touches.
    assert len(cuda.captures) > 4 and cuda.num_replays > 0
    for name, answer in truth.items():
        assert ours[name].token_ids == answer.token_ids, name
        assert ours[name].logprobs == pytest.approx(answer.logprobs, abs=1e-3), name


def test_tables_that_are_bound_anew_are_not_what_a_captured_graph_reads(
    world: World, truth: dict[str, Answer], cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = RankPages.put_rows

    def put_elsewhere(pages: RankPages, *arguments: Any) -> None:
        pages._ranks = pages._ranks.clone()
        put(pages, *arguments)

    monkeypatch.setattr(RankPages, "put_rows", put_elsewhere)
    one = [request for request in REQUESTS if request[0] == "one"]
    ours = answers(EngineBench(*world, device="cuda", **ONE_ROW), one)
    assert ours["one"].logprobs != pytest.approx(truth["one"].logprobs, abs=1e-3)


def attends_by_flashinfer(monkeypatch: pytest.MonkeyPatch) -> FlashInferStandIn:
    library = FlashInferStandIn(monkeypatch)
    sizes = AttentionSizes(num_heads=2, num_kv_heads=1, head_dim=16, scale=0.25, cap=None, dtype=torch.float32)
    monkeypatch.setattr(CausalLM, "prompt_attention", PromptAttention(sizes, torch.device("cuda")))
    return library


def test_prompts_attend_by_flashinfer_and_no_step_waits_for_its_plan(
    world: World, truth: dict[str, Answer], cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = attends_by_flashinfer(monkeypatch)
    bench = EngineBench(*world, device="cuda", **SETTINGS)
    torch.cuda.set_sync_debug_mode("error")
    ours = answers(bench, REQUESTS[:2])
    cuda.finish()
    assert [wrapper.num_runs for wrapper in library.wrappers] == [3]  # chunks of 8, of 5 beside 3, of the 3's next
    for name, answer in ours.items():
        assert answer.token_ids == truth[name].token_ids, name
        assert answer.logprobs == pytest.approx(truth[name].logprobs, abs=1e-3), name


def test_a_plan_that_does_not_wait_for_the_copies_of_the_last_is_noticed(
    world: World, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = attends_by_flashinfer(monkeypatch)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1, device="cuda"))
    monkeypatch.setattr(PromptAttention, "_wrapper", lambda self, window: (wrapper, None))
    with pytest.raises(Race, match="pinned memory was written before"):
        answers(EngineBench(*world, device="cuda", **ONE_ROW), REQUESTS[:1])
        cuda.finish()


@contextmanager
def never_joined(x: torch.Tensor) -> Iterator[Any]:
    """As `streams.beside`, without its end."""
    side = streams.side_stream(x.device)
    side.wait_stream(torch.cuda.current_stream(x.device))
    yield torch.cuda.stream(side)


def test_a_side_stream_that_is_not_joined_is_noticed(
    world: World, cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, out = torch.ones(3, device="cuda"), torch.empty(3, device="cuda")
    for beside in (streams.beside, never_joined):
        with beside(x) as side:
            with side:
                out.copy_(x + 1)
            y = x * 2
        if beside is never_joined:
            with pytest.raises(Race, match=r"on default stream reads what copy_ on stream \d+ writes"):
                out + y
        else:
            assert (out + y).tolist() == [4, 4, 4]
    monkeypatch.setattr("loraplex_kernels.lora_pages.beside", never_joined)
    with pytest.raises(NotInCapture, match="was forked and never joined"):
        EngineBench(*world, device="cuda", **ONE_ROW)


def test_staging_memory_that_is_written_while_it_is_copied_is_noticed(
    cuda: CudaStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = staging.StagedInputs([((3,), np.int64)], torch.device("cuda"))
    for turn in range(2 * staging.NUM_BUFFERS):
        inputs.write()[0][:] = turn
        inputs.send()
        assert inputs.tensors[0].tolist() == [turn] * 3
    for turn in range(staging.NUM_BUFFERS):
        inputs.write()[0][:] = turn
        inputs.send()
    inputs._buffers[0][1][0][:] = 99  # its copy may be under way still
    with pytest.raises(Race, match="pinned memory was written before"):
        inputs.write()


def test_what_a_capture_refuses_is_refused(cuda: CudaStandIn) -> None:
    x = torch.ones(3, device="cuda")
    side = torch.cuda.Stream()
    refused = {
        "waiting": lambda: x.tolist(),
        "a number for the host": lambda: bool(x.sum() > 0),
        "memory that is not pinned": lambda: x.copy_(torch.zeros(3)),
        "pinning": lambda: torch.empty(3, pin_memory=True),
        "a stream that was not forked": lambda: _on(side, lambda: x + 1),
    }
    for what, work in refused.items():
        with pytest.raises(NotInCapture), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            work()
            pytest.fail(what)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
    assert y.isnan().all()  # nothing ran
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [6, 6, 6]


def test_waiting_for_the_device_is_an_error_where_it_shall_be_one(cuda: CudaStandIn) -> None:
    x = torch.ones(1, device="cuda")
    assert x.tolist() == [1]
    torch.cuda.set_sync_debug_mode("error")
    for wait in (x.tolist, x.cpu, x.item, lambda: x.copy_(torch.zeros(1)), lambda: bool(x > 0)):
        with pytest.raises(HostWaits):
            wait()


def _on(stream: torch.cuda.Stream, work: Any) -> None:
    with torch.cuda.stream(stream):
        work()
