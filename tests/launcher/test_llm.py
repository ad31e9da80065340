import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from demo_server import environment
from tiny_llm import ADAPTERS, make_tiny_world
from tiny_models import make_peft_adapter, make_tiny_llama
from truth import Answer, Truth

from loraplex import LLM, GuidedDecodingParams, LoRARequest, SamplingParams, StructuredOutputsParams
from loraplex.launch_error import LaunchError
from loraplex.outputs import RequestOutput
from loraplex_server.errors import AdapterNotFound, AdapterRefused

GREEDY = SamplingParams(temperature=0, max_tokens=12)
END_TOKEN = 2
FLAGS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 256, "num_threads": 1}


@pytest.fixture(scope="module")
def folder_and_truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Truth]:
    folder = tmp_path_factory.mktemp("world")
    model = make_tiny_world(folder)
    return folder, Truth(model, {name: folder / name for name in ADAPTERS})


@pytest.fixture(scope="module")
def world(folder_and_truth: tuple[Path, Truth]) -> Path:
    return folder_and_truth[0]


@pytest.fixture(scope="module")
def truth(folder_and_truth: tuple[Path, Truth]) -> Truth:
    return folder_and_truth[1]


@pytest.fixture(scope="module")
def llm(world: Path) -> Iterator[LLM]:
    with LLM(str(world / "base"), **FLAGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def adapters(world: Path) -> dict[str, LoRARequest]:
    return {name: LoRARequest(name, number, str(world / name)) for number, name in enumerate(ADAPTERS, start=1)}


def ask(llm: LLM, prompts: Any, params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_base_and_adapters_in_one_call_answer_as_transformers_and_peft(
    llm: LLM, truth: Truth, adapters: dict[str, LoRARequest]
) -> None:
    names = [None, "red", "blue", "red", None, "blue"]
    prompts = [f"{'ab' * number}: what is it?" for number in range(len(names))]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    outputs = ask(llm, prompts, params, lora_request=[adapters[name] if name else None for name in names])
    assert [output.lora_request and output.lora_request.lora_name for output in outputs] == names
    assert [output.prompt for output in outputs] == prompts
    for name, output in zip(names, outputs, strict=True):
        (one,) = output.outputs
        assert one.logprobs is not None
        values = [position[token_id].logprob for position, token_id in zip(one.logprobs, one.token_ids, strict=True)]
        answer = Answer(one.token_ids, values, "eos_token" if one.finish_reason == "stop" else "length")
        assert truth.objection(name, output.prompt_token_ids, answer, {END_TOKEN}) is None
        assert one.cumulative_logprob == pytest.approx(sum(values))


def test_every_form_of_a_prompt_gives_the_same_answer(llm: LLM) -> None:
    token_ids = llm.get_tokenizer().encode("hello")
    forms = ["hello", {"prompt": "hello"}, token_ids, {"prompt_token_ids": token_ids}]
    one_by_one = [tokens(ask(llm, form)) for form in forms]
    assert one_by_one == [tokens(ask(llm, ["hello"]))] * 4
    together = ask(llm, forms)
    assert [one.prompt for one in together] == ["hello", "hello", None, None]
    assert len({str(one.outputs[0].token_ids) for one in together}) == 1
    assert ask(llm, []) == []


def test_what_is_no_prompt_is_a_type_error_that_shows_it(llm: LLM) -> None:
    for wrong in (7, [7.5], [{"text": "x"}], [None], {"prompt": "x", "multi_modal_data": {}}):
        with pytest.raises(TypeError, match="prompt"):
            ask(llm, wrong)


def test_lists_of_parameters_and_adapters_go_by_place_and_must_fit(llm: LLM, adapters: dict[str, LoRARequest]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=number, ignore_eos=True) for number in (3, 1, 2)]
    assert [len(ids) for ids in tokens(ask(llm, ["a", "b", "c"], params))] == [3, 1, 2]
    with pytest.raises(ValueError, match="sampling_params must be one, or a list with one for each of 2 prompts"):
        ask(llm, ["a", "b"], params)
    with pytest.raises(ValueError, match="lora_request must be one"):
        ask(llm, ["a", "b"], lora_request=[adapters["red"]])


def test_one_adapter_counts_for_all_prompts(llm: LLM, adapters: dict[str, LoRARequest]) -> None:
    prompts = ["a rose", "a tree"]
    together = tokens(ask(llm, prompts, lora_request=adapters["red"]))
    assert together == [tokens(ask(llm, prompt, lora_request=adapters["red"]))[0] for prompt in prompts]
    assert together != tokens(ask(llm, prompts))


def test_a_seed_gives_the_same_tokens_alone_and_among_others(llm: LLM) -> None:
    drawn = SamplingParams(temperature=1.0, max_tokens=12, seed=7)
    other = SamplingParams(temperature=1.0, max_tokens=12, seed=8)
    alone = tokens(ask(llm, "x", drawn))[0]
    among = tokens(ask(llm, ["y", "x", "x"], [other, drawn, other]))
    assert among[1] == alone
    assert among[2] != alone


def test_without_a_seed_a_program_draws_the_same_each_time_it_runs(world: Path) -> None:
    answers = []
    for seed in (0, 0, 1):
        with LLM(str(world / "base"), seed=seed, **FLAGS) as llm:
            answers.append(tokens(ask(llm, ["x", "x"], SamplingParams(max_tokens=12))))
    assert answers[0] == answers[1] != answers[2]
    assert answers[0][0] != answers[0][1]


def test_the_sequences_of_one_prompt_have_the_seeds_that_follow(llm: LLM) -> None:
    (output,) = ask(llm, "x", SamplingParams(n=3, seed=5, max_tokens=8))
    assert [one.index for one in output.outputs] == [0, 1, 2]
    alone = [tokens(ask(llm, "x", SamplingParams(seed=5 + i, max_tokens=8)))[0] for i in range(3)]
    assert [one.token_ids for one in output.outputs] == alone


def test_best_of_keeps_the_likeliest_sequences_first(llm: LLM) -> None:
    (all_of,) = ask(llm, "x", SamplingParams(n=4, seed=5, max_tokens=8))
    (best,) = ask(llm, "x", SamplingParams(n=2, best_of=4, seed=5, max_tokens=8))
    expected = sorted((one.cumulative_logprob for one in all_of.outputs), reverse=True)[:2]
    assert [one.cumulative_logprob for one in best.outputs] == pytest.approx(expected)
    assert [one.index for one in best.outputs] == [0, 1]


def test_a_stop_string_ends_the_text_before_it_and_is_named(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    text = ask(llm, "tell", long)[0].outputs[0].text
    stop = text[10:13]
    for include, end in ((False, text.index(stop)), (True, text.index(stop) + 3)):
        params = SamplingParams(
            temperature=0, max_tokens=40, ignore_eos=True, stop=["not there", stop], include_stop_str_in_output=include
        )
        (one,) = ask(llm, "tell", params)[0].outputs
        assert (one.text, one.finish_reason, one.stop_reason) == (text[:end], "stop", stop)
        assert len(one.token_ids) < 40
    assert ask(llm, "tell", long)[0].outputs[0].text == text


def test_a_stop_token_ends_the_text_before_it_and_is_named(llm: LLM) -> None:
    long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    token_ids = tokens(ask(llm, "tell", long))[0]
    stop_id = token_ids[5]
    first = token_ids.index(stop_id)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop_id])
    (one,) = ask(llm, "tell", params)[0].outputs
    assert (one.token_ids, one.finish_reason, one.stop_reason) == (token_ids[: first + 1], "stop", stop_id)
    assert one.text == llm.get_tokenizer().decode(token_ids[:first])
    # It stops also as the last token that is allowed.
    last = SamplingParams(temperature=0, max_tokens=first + 1, ignore_eos=True, stop_token_ids=[stop_id])
    assert ask(llm, "tell", last)[0].outputs[0].finish_reason == "stop"


def test_the_end_token_ends_the_answer_unless_it_is_ignored(llm: LLM) -> None:
    wish = {END_TOKEN: 100.0}
    (one,) = ask(llm, "x", SamplingParams(temperature=0, logit_bias=wish))[0].outputs
    assert (one.token_ids, one.text, one.finish_reason, one.stop_reason) == ([END_TOKEN], "", "stop", None)
    (one,) = ask(llm, "x", SamplingParams(temperature=0, logit_bias=wish, ignore_eos=True, max_tokens=3))[0].outputs
    assert (one.token_ids, one.text, one.finish_reason) == ([END_TOKEN] * 3, "", "length")
    shown = SamplingParams(
        temperature=0, logit_bias=wish, ignore_eos=True, max_tokens=2, skip_special_tokens=False, detokenize=True
    )
    assert ask(llm, "x", shown)[0].outputs[0].text == "</s></s>"
    silent = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    assert ask(llm, "x", silent)[0].outputs[0].text == ""


def test_penalties_count_the_tokens_of_the_output_as_openai_says(llm: LLM, truth: Truth) -> None:
    penalties = {"frequency_penalty": 0.9, "presence_penalty": 0.4}
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, **penalties)
    (output,) = ask(llm, "xx", params)
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    scores = truth.logprobs(None, prompt + answer)
    for index, token_id in enumerate(answer):
        counts = torch.bincount(torch.tensor(answer[:index], dtype=torch.int64), minlength=scores.shape[1])
        punished = scores[len(prompt) - 1 + index] - 0.9 * counts - 0.4 * (counts > 0)
        assert int(punished.argmax()) == token_id
    plain = tokens(ask(llm, "xx", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)))[0]
    assert plain != answer


def test_log_probabilities_have_vllms_shape(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    (output,) = ask(llm, "hello", params)
    (one,) = output.outputs
    assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids) == 6
    for position, token_id in zip(one.logprobs, one.token_ids, strict=True):
        assert next(iter(position)) == token_id
        assert len(position) in (2, 3)
        by_rank = {entry.rank: entry.logprob for entry in position.values()}
        assert by_rank[1] >= by_rank[2]
        assert position[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    assert [list(entry or {}) for entry in rest] == [[token_id] for token_id in output.prompt_token_ids[1:]]
    likely = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3)
    for same, entries in zip(ask(llm, "hello", likely)[0].prompt_logprobs or [], output.prompt_logprobs, strict=True):
        assert (same is None) == (entries is None)
        if same is not None and entries is not None:
            (token_id,) = entries
            assert next(iter(same)) == token_id
            assert same[token_id].logprob == pytest.approx(entries[token_id].logprob, abs=1e-5)
            assert len(same) in (3, 4)
            assert {1, 2, 3} <= {entry.rank for entry in same.values()}
    assert ask(llm, "hello")[0].outputs[0].logprobs is None
    assert ask(llm, "hello")[0].prompt_logprobs is None


def test_a_chat_is_written_out_by_the_models_template(llm: LLM, adapters: dict[str, LoRARequest]) -> None:
    question = {"role": "user", "content": "who?"}
    (output,) = llm.chat([question], GREEDY, use_tqdm=False, lora_request=adapters["blue"])
    assert output.prompt == "<s>user:who?<s>me:"
    assert tokens([output]) == tokens(ask(llm, output.prompt, lora_request=adapters["blue"]))
    parts = {"role": "user", "content": [{"type": "text", "text": "who?"}]}
    outputs = llm.chat([[question], [parts]], GREEDY, use_tqdm=False, lora_request=[adapters["blue"], None])
    assert [one.prompt for one in outputs] == [output.prompt] * 2
    assert tokens(outputs)[0] == tokens([output])[0]
    begun = [question, {"role": "me", "content": "I a"}]
    (output,) = llm.chat(begun, GREEDY, False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "<s>user:who?<s>me:I a"
    tool = {"type": "function", "function": {"name": "look"}}
    (output,) = llm.chat([question], GREEDY, False, tools=[tool])
    assert output.prompt.startswith('<s>user:who?\n---\n[{"type": "function", "function": {"name": "look"')
    with pytest.raises(ValueError, match="more than one tool"):
        llm.chat([question], GREEDY, False, tools=[tool, tool])
    for wrong in ("who?", [], [{"content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        with pytest.raises(ValueError, match="message"):
            llm.chat(wrong, GREEDY, False)


def test_a_wrong_adapter_is_refused_with_the_reason_and_nothing_else_is_affected(
    tmp_path: Path, llm: LLM, adapters: dict[str, LoRARequest]
) -> None:
    before = tokens(ask(llm, "x", lora_request=adapters["red"]))
    wider = make_tiny_llama(tmp_path / "wider", hidden_size=128)
    foreign = LoRARequest("foreign", 9, str(make_peft_adapter(tmp_path / "foreign", wider)))
    with pytest.raises(AdapterRefused, match=r"adapter 'foreign': .*128") as refusal:
        ask(llm, ["x", "x"], lora_request=[adapters["red"], foreign])
    assert refusal.value.error_type == "adapter_incompatible"
    with pytest.raises(AdapterNotFound, match=r"adapter 'gone': '.*' is neither a folder nor a hub id"):
        ask(llm, "x", lora_request=LoRARequest("gone", 9, str(tmp_path / "gone")))
    with pytest.raises(AdapterRefused, match=r"adapter 'empty': .*adapter_config\.json"):
        (tmp_path / "empty").mkdir()
        ask(llm, "x", lora_request=LoRARequest("empty", 9, str(tmp_path / "empty")))
    assert tokens(ask(llm, "x", lora_request=adapters["red"])) == before


def test_what_the_check_of_an_adapter_notices_is_logged_once(
    tmp_path: Path, world: Path, llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    mine = LoRARequest("mine", 3, str(shutil.copytree(world / "red", tmp_path / "mine")))
    for _ in range(2):
        ask(llm, "x", lora_request=mine)
    assert [record.getMessage() for record in caplog.records] == [
        "adapter 'mine': adapter_config.json names no base model; checked by names and shapes only"
    ]


def test_an_adapter_above_the_highest_rank_is_refused(world: Path, adapters: dict[str, LoRARequest]) -> None:
    with LLM(str(world / "base"), max_lora_rank=4, max_loras=1, **FLAGS) as llm:
        with pytest.raises(AdapterRefused, match="rank 8"):
            ask(llm, "x", lora_request=adapters["blue"])
        assert ask(llm, "x", lora_request=adapters["red"])[0].finished
    with (
        LLM(str(world / "base"), enable_lora=False, **FLAGS) as llm,
        pytest.raises(ValueError, match="enable_lora=False"),
    ):
        ask(llm, "x", lora_request=adapters["red"])


def test_an_adapter_whose_files_are_replaced_is_read_anew(
    tmp_path: Path, world: Path, llm: LLM, adapters: dict[str, LoRARequest]
) -> None:
    folder = shutil.copytree(world / "red", tmp_path / "mine")
    mine = LoRARequest("mine", 3, str(folder))
    as_red = tokens(ask(llm, "x", lora_request=mine))
    shutil.rmtree(folder)
    shutil.copytree(world / "blue", folder)
    as_blue = tokens(ask(llm, "x", lora_request=mine))
    assert [as_red, as_blue] == [tokens(ask(llm, "x", lora_request=adapters[name])) for name in ("red", "blue")]


def test_a_request_that_the_engine_fails_on_says_so_and_the_others_are_answered(tmp_path: Path, world: Path) -> None:
    folder = shutil.copytree(world / "red", tmp_path / "mine")
    with LLM(str(world / "base"), **FLAGS) as llm:
        resolve = llm._adapters.resolve

        def resolve_and_break(request: LoRARequest) -> Any:
            spec = resolve(request)
            (folder / "adapter_model.safetensors").write_bytes(b"broken")
            return spec

        llm._adapters.resolve = resolve_and_break  # type: ignore[method-assign]
        with pytest.warns(RuntimeWarning, match="request 1 failed: adapter 'mine' could not be loaded"):
            params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
            outputs = ask(llm, ["x", "x"], params, lora_request=[None, LoRARequest("mine", 1, str(folder))])
    assert [one.outputs[0].finish_reason for one in outputs] == ["length", "error"]
    assert "could not be loaded" in str(outputs[1].outputs[0].error)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("x" * 600, GREEDY, "a prompt must have 1 to 511 tokens"),
        ("", GREEDY, "a prompt must have 1 to 511 tokens"),
        ([1, 999], GREEDY, "prompt_token_ids: 999 is not in the vocabulary of 259 tokens"),
        ("x", SamplingParams(stop_token_ids=[259]), "stop_token_ids: 259 is not in the vocabulary"),
        ("x", SamplingParams(logit_bias={-1: 1.0}), "logit_bias: -1 is not in the vocabulary"),
        ("x", SamplingParams(logprobs=21), "logprobs must be 0 to 20"),
        ("x", SamplingParams(prompt_logprobs=-1), "prompt_logprobs must be 0 to 20"),
        ("\ud800", GREEDY, "surrogates not allowed"),
    ],
)
def test_what_is_out_of_bounds_is_a_value_error(llm: LLM, prompt: Any, params: SamplingParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(llm, ["fine", prompt], params)


def test_output_ends_where_the_models_length_does(llm: LLM) -> None:
    (output,) = ask(llm, "x" * 500, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 512
    assert output.outputs[0].finish_reason == "length"


class InterruptingBar:
    """A progress bar at whose second step the user presses Ctrl-C."""

    def __init__(self, **options: Any):
        self.num_done = 0

    def __enter__(self) -> "InterruptingBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, number: int) -> None:
        self.num_done += number
        if self.num_done == 2:
            raise KeyboardInterrupt


def test_after_an_interrupt_nothing_runs_on_and_the_next_call_is_answered(llm: LLM) -> None:
    expected = tokens(ask(llm, "x"))
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["x"] * 5, SamplingParams(temperature=0, max_tokens=30), use_tqdm=InterruptingBar)
    assert not llm._engine._engine.has_work
    assert tokens(ask(llm, "x")) == expected


def test_calls_from_several_threads_are_answered_each_with_its_own(llm: LLM, adapters: dict[str, LoRARequest]) -> None:
    asked = [None, *adapters.values()] * 2
    expected = [tokens(ask(llm, "x", lora_request=one)) for one in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: tokens(ask(llm, "x", lora_request=one)), asked))
    assert answers == expected


def test_more_prompts_than_run_at_a_time_are_all_answered_in_order(world: Path, llm: LLM) -> None:
    prompts = [f"{number} things" for number in range(20)]
    with LLM(str(world / "base"), max_num_seqs=3, **FLAGS) as narrow:
        assert tokens(ask(narrow, prompts)) == tokens(ask(llm, prompts))


def test_closing_ends_the_threads_and_a_closed_one_says_so(world: Path, adapters: dict[str, LoRARequest]) -> None:
    before = set(threading.enumerate())
    llm = LLM(str(world / "base"), **FLAGS)
    ask(llm, "x", lora_request=adapters["red"])
    llm.close()
    llm.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="closed"):
        ask(llm, "x")


def test_the_progress_bar_counts_the_prompts(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    llm.generate(["x", "y"], GREEDY)
    assert "Processed prompts: 100%" in capfd.readouterr().err
    llm.generate(["x", "y"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_the_callers_own_openmp_settings_stay_when_torch_is_there(llm: LLM) -> None:
    assert "torch" in sys.modules and llm is not None
    assert "GOMP_SPINCOUNT" not in os.environ


def test_openmp_is_set_up_before_torch_is_imported_unless_the_user_did(world: Path) -> None:
    script = (
        "import os, sys\nfrom loraplex import LLM\n"
        f"with LLM({str(world / 'base')!r}, num_threads=1, num_kv_blocks=64): pass\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['GOMP_SPINCOUNT'])"
    )
    bare = {name: value for name, value in environment().items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-W", "error", "-c", script]
    for ours, expected in (({}, "1 2000"), ({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}, "2 7")):
        run = subprocess.run(command, env=bare | ours, capture_output=True, text=True, check=True, timeout=300)
        assert run.stdout.strip() == expected


def test_a_model_that_cannot_be_served_is_a_launch_error_that_says_why(tmp_path: Path, world: Path) -> None:
    with pytest.raises(LaunchError, match="model '/nowhere'"):
        LLM("/nowhere")
    with pytest.raises(LaunchError, match="quantis"):
        LLM(str(world / "base"), quantization="gptq")
    with pytest.raises(LaunchError, match="room for 32 tokens"):
        LLM(str(world / "base"), max_model_len=64, num_kv_blocks=2, dtype="float32")
    silent = shutil.copytree(world / "base", tmp_path / "silent")
    (silent / "tokenizer.json").unlink()
    with pytest.raises(LaunchError, match=r"no tokenizer\.json"):
        LLM(str(silent), **FLAGS)
    with LLM(str(silent), tokenizer=str(world / "base"), **FLAGS) as llm:
        assert ask(llm, "x")[0].finished
    weights = silent / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LaunchError, match=r"model\.safetensors"):
        LLM(str(silent), **FLAGS)


def test_encode_says_that_it_is_for_pooling_models(llm: LLM) -> None:
    with pytest.raises(NotImplementedError, match="get_tokenizer"):
        llm.encode("x")


def test_the_models_own_defaults_count_where_none_are_given(tmp_path: Path, world: Path) -> None:
    folder = shutil.copytree(world / "base", tmp_path / "base")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 5, "max_new_tokens": 3}')
    with LLM(str(folder), **FLAGS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=5, max_tokens=3)
        assert len(tokens(llm.generate("x", use_tqdm=False))[0]) <= 3
    with LLM(str(folder), generation_config="vllm", **FLAGS) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_structured_outputs_are_obeyed_beside_prompts_without_any(llm: LLM, adapters: dict[str, LoRARequest]) -> None:
    class Answer(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=3)
        ok: bool

    wanted = [
        SamplingParams(max_tokens=90, seed=1, structured_outputs=StructuredOutputsParams(json=Answer)),
        SamplingParams(max_tokens=20, temperature=0, structured_outputs={"choice": ["left", "right"]}),
        SamplingParams(max_tokens=20, seed=2, n=2, guided_decoding=GuidedDecodingParams(regex="[0-9]{4}")),
        GREEDY,
    ]
    loras = [adapters["red"], None, adapters["blue"], None]
    first, second, third, last = ask(llm, ["a", "b", "c", "what is it?"], wanted, lora_request=loras)
    assert Answer.model_validate_json(first.outputs[0].text)
    assert second.outputs[0].text in ("left", "right") and second.outputs[0].finish_reason == "stop"
    assert all(re.fullmatch("[0-9]{4}", output.text) for output in third.outputs) and len(third.outputs) == 2
    assert tokens([last]) == tokens(ask(llm, "what is it?"))


def test_structured_outputs_that_do_not_compile_are_refused_before_anything_runs(llm: LLM) -> None:
    for wanted, words in (({"regex": "("}, "unclosed group"), ({"json": {"type": "x"}}, "Invalid type: x")):
        with pytest.raises(ValueError, match=words):
            ask(llm, ["a", "b"], [GREEDY, SamplingParams(structured_outputs=wanted)])
