"""`LLMEngine`: what its caller adds and steps comes out as `LLM` gives it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_llm import make_tiny_world

from loraplex import LLM, EngineArgs, LLMEngine, LoRARequest, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_world(folder)
    return folder


@pytest.fixture
def engine(world: Path) -> Iterator[LLMEngine]:
    arguments = EngineArgs(model=str(world / "base"), enable_lora=True, max_loras=1, num_threads=1, num_kv_blocks=64)
    engine = LLMEngine.from_engine_args(arguments)
    yield engine
    engine.close()


def run_to_the_end(engine: LLMEngine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        outputs |= {one.request_id: one for one in engine.step()}
    return outputs


def test_requests_added_between_steps_end_as_in_one_call(engine: LLMEngine, world: Path) -> None:
    red, blue = (LoRARequest(name, i, str(world / name)) for i, name in enumerate(("red", "blue"), start=1))
    asked = [("a", None), ("hello", red), ("hello", blue), ("hello", None)]
    outputs: dict[str, RequestOutput] = {}
    for number, (prompt, lora_request) in enumerate(asked):
        engine.add_request(f"mine-{number}", prompt, GREEDY, lora_request=lora_request)
        outputs |= {one.request_id: one for one in engine.step()}
    outputs |= run_to_the_end(engine)
    with LLM(str(world / "base"), num_threads=1, num_kv_blocks=64) as llm:
        expected = llm.generate(
            [prompt for prompt, _ in asked], GREEDY, lora_request=[one for _, one in asked], use_tqdm=False
        )
    assert [outputs[f"mine-{i}"].outputs[0].token_ids for i in range(4)] == [
        one.outputs[0].token_ids for one in expected
    ]
    assert outputs["mine-1"].lora_request == red
    assert all(one.finished for one in outputs.values())


def test_a_request_of_several_sequences_ends_once(engine: LLMEngine) -> None:
    engine.add_request("n", "hello", SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True))
    outputs = run_to_the_end(engine)
    assert [len(one.token_ids) for one in outputs["n"].outputs] == [5, 5, 5]


def test_an_aborted_request_never_ends_and_leaves_nothing(engine: LLMEngine) -> None:
    for name in ("a", "b", "c"):
        engine.add_request(name, name, GREEDY)
    engine.step()
    engine.abort_request("a")
    engine.abort_request(["b", "unknown"])
    assert engine.get_num_unfinished_requests() == 1
    assert set(run_to_the_end(engine)) == {"c"}
    engine.add_request("a", "again", GREEDY)
    assert len(run_to_the_end(engine)["a"].outputs[0].token_ids) == 8


def test_an_id_in_use_and_bad_arguments_are_refused(engine: LLMEngine) -> None:
    engine.add_request("a", "x", GREEDY)
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request("a", "x", GREEDY)
    with pytest.raises(ValueError, match="a prompt must have"):
        engine.add_request("b", "x" * 100_000, GREEDY)
    assert set(run_to_the_end(engine)) == {"a"}
    assert engine.step() == []
