import subprocess
import sys
import warnings

import pytest
import torch
from demo_server import environment

import loraplex
from loraplex.llm import OWN_ARGUMENTS
from loraplex.llm_arguments import read_arguments
from loraplex_server.config import EngineConfig


def engine_of(**arguments: object) -> EngineConfig:
    return read_arguments("some/model", arguments, OWN_ARGUMENTS).serve.engine


def test_vllms_names_and_ours_mean_the_same_settings() -> None:
    theirs = engine_of(max_loras=3, max_model_len=99, max_num_seqs=5, enable_prefix_caching=False, dtype="half")
    ours = engine_of(
        max_resident_adapters=3, max_total_tokens=99, max_batch_size=5, prefix_caching=False, dtype=torch.float16
    )
    assert theirs == ours
    assert (theirs.adapters.max_resident_adapters, theirs.max_total_tokens, theirs.dtype) == (3, 99, "float16")


def test_none_is_the_same_as_leaving_an_argument_out() -> None:
    assert engine_of(quantization=None, max_model_len=None, max_loras=None) == engine_of() == EngineConfig()


def test_the_revision_the_cache_and_the_token_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of the environment")
    launch = read_arguments("some/model", {"revision": "v1", "download_dir": "/cache"}, OWN_ARGUMENTS).launch
    assert (launch.model_id, launch.revision, launch.huggingface_hub_cache) == ("some/model", "v1", "/cache")
    assert launch.hub_token == "of the environment"
    assert read_arguments("some/model", {"hf_token": "mine"}, OWN_ARGUMENTS).launch.hub_token == "mine"


def test_arguments_without_a_meaning_are_named_in_one_warning_with_the_reason() -> None:
    with pytest.warns(UserWarning) as caught:
        engine_of(gpu_memory_utilization=0.9, enforce_eager=True, trust_remote_code=False, swap_space=4)
    (one,) = caught
    assert "enforce_eager (there are no CUDA graphs to leave out)" in str(one.message)
    assert "gpu_memory_utilization" in str(one.message) and "swap_space" in str(one.message)
    assert "trust_remote_code" not in str(one.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine_of(enforce_eager=False, trust_remote_code=None)


@pytest.mark.parametrize(
    ("wrong", "near"), [("max_lora", "max_loras"), ("tensor_paralel_size", "tensor_parallel_size"), ("sead", "seed")]
)
def test_an_unknown_argument_is_a_type_error_with_the_nearest_name(wrong: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"no argument '{wrong}'; did you mean '{near}'"):
        engine_of(**{wrong: 1})
    with pytest.raises(TypeError, match=r"no argument 'zzz'$"):
        engine_of(zzz=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_loras": 0}, "max_loras must be at least 1"),
        ({"max_loras": "4"}, "max_loras must be of type int"),
        ({"max_loras": True}, "max_loras must be of type int"),
        ({"dtype": "int8"}, "dtype must be one of auto, float16"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not served"),
        ({"task": "embed"}, "task='embed' is not served"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling must be of type str"),
    ],
)
def test_a_value_that_cannot_be_is_refused_under_the_callers_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of(**arguments)


def test_the_tensor_parallel_size_is_the_number_of_ranks_and_one_where_it_is_not_given() -> None:
    assert read_arguments("m", {"tensor_parallel_size": 2}, ()).launch.num_shard == 2
    assert read_arguments("m", {}, ()).launch.num_shard == 1
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        engine_of(tensor_parallel_size=0)


def test_the_public_names_are_there_and_bring_no_torch() -> None:
    names = "LLM, SamplingParams, LoRARequest, RequestOutput, CompletionOutput, __version__"
    script = f"import sys\nfrom loraplex import {names}\nprint('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    assert {"LLM", "SamplingParams", "LoRARequest"} <= set(dir(loraplex))
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = loraplex.LLMs
