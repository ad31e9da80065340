"""What peft can write and is not served: each refused with its reason and a fix; the run prints a table."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_models import make_tiny_llama, peft_warnings_ignored
from transformers import PreTrainedModel

from loraplex_models.adapters.manifest import ManifestError, check_adapter
from loraplex_models.config import ModelConfig, read_config

BOTH = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ONE = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
TOKENS = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
CONVERT, SAVE_AS_LORA, NO_WAY = "loraplex adapters convert", "peft.save_as_lora", "cannot be turned into it"

# By name: what peft is given, the field that the message must name, and the fix that it must give.
REFUSED: dict[str, tuple[Callable[[], PeftConfig], str, str]] = {
    "AdaLoRA": (lambda: peft.AdaLoraConfig(total_step=9, **BOTH), "peft_type is 'ADALORA'", CONVERT),
    "VeRA": (lambda: peft.VeraConfig(r=4, **ONE), "peft_type is 'VERA'", SAVE_AS_LORA),
    "MiSS": (lambda: peft.MissConfig(r=4, **BOTH), "peft_type is 'MISS'", SAVE_AS_LORA),
    "LoHa": (lambda: peft.LoHaConfig(**BOTH), "peft_type is 'LOHA'", SAVE_AS_LORA),
    "LoKr": (lambda: peft.LoKrConfig(**BOTH), "peft_type is 'LOKR'", SAVE_AS_LORA),
    "RandLoRA": (lambda: peft.RandLoraConfig(r=4, **ONE), "peft_type is 'RANDLORA'", SAVE_AS_LORA),
    "C3A": (lambda: peft.C3AConfig(block_size=16, **ONE), "peft_type is 'C3A'", SAVE_AS_LORA),
    "FourierFT": (lambda: peft.FourierFTConfig(n_frequency=9, **BOTH), "peft_type is 'FOURIERFT'", SAVE_AS_LORA),
    "VB-LoRA": (
        lambda: peft.VBLoRAConfig(num_vectors=16, vector_length=16, r=2, **BOTH), "peft_type is 'VBLORA'", SAVE_AS_LORA
    ),
    "SHiRA": (lambda: peft.ShiraConfig(r=4, **BOTH), "peft_type is 'SHIRA'", NO_WAY),
    "IA3": (lambda: peft.IA3Config(feedforward_modules=["down_proj"], **BOTH), "peft_type is 'IA3'", NO_WAY),
    "RoAd": (lambda: peft.RoadConfig(group_size=16, **ONE), "peft_type is 'ROAD'", NO_WAY),
    "LN tuning": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        "peft_type is 'LN_TUNING'", NO_WAY,
    ),
    "OFT": (lambda: peft.OFTConfig(oft_block_size=8, **ONE), "peft_type is 'OFT'", NO_WAY),
    "BOFT": (lambda: peft.BOFTConfig(boft_block_size=4, **ONE), "peft_type is 'BOFT'", NO_WAY),
    "HRA": (lambda: peft.HRAConfig(r=4, **BOTH), "peft_type is 'HRA'", NO_WAY),
    "prompt tuning": (lambda: peft.PromptTuningConfig(**TOKENS), "peft_type is 'PROMPT_TUNING'", NO_WAY),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(**TOKENS), "peft_type is 'PREFIX_TUNING'", NO_WAY),
    "P-tuning": (
        lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **TOKENS), "peft_type is 'P_TUNING'", NO_WAY
    ),
    "PiSSA, not converted": (
        lambda: LoraConfig(r=4, init_lora_weights="pissa", **BOTH), "init_lora_weights is 'pissa'",
        "path_initial_model_for_weight_conversion",
    ),
    "OLoRA, not converted": (
        lambda: LoraConfig(r=4, init_lora_weights="olora", **BOTH), "init_lora_weights is 'olora'",
        "path_initial_model_for_weight_conversion",
    ),
    "QA-LoRA": (
        lambda: LoraConfig(r=4, use_qalora=True, qalora_group_size=16, **BOTH), "use_qalora is True",
        "train and save the adapter without it",
    ),
    "layer_replication": (
        lambda: LoraConfig(r=4, layer_replication=[[0, 2], [1, 2]], **BOTH),
        "layer_replication is [[0, 2], [1, 2]]", "merge the adapter into its base",
    ),
    "target_parameters": (
        lambda: LoraConfig(r=4, target_parameters=["mlp.gate_proj.weight"], **BOTH),
        "target_parameters is ['mlp.gate_proj.weight']", "use target_modules",
    ),
    "modules_to_save, norms": (
        lambda: LoraConfig(r=4, modules_to_save=["input_layernorm"], **BOTH),
        "modules_to_save is ['input_layernorm']", "full copies are served of embed_tokens and lm_head",
    ),
    "aLoRA with modules_to_save": (
        lambda: LoraConfig(r=4, alora_invocation_tokens=[5], modules_to_save=["lm_head"], **BOTH),
        "modules_to_save is not served together with alora_invocation_tokens", "train without it",
    ),
    "a head for classes": (
        lambda: LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj"]), "task_type is 'SEQ_CLS'",
        "only CAUSAL_LM",
    ),
}  # fmt: skip
# Fields of LoraConfig that need a base or parts that a tiny Llama has not: written into a plain config.
REFUSED_FIELDS = {
    "init_lora_weights": ("corda", "path_initial_model_for_weight_conversion"),
    "kasa_config": ({"beta": 0.1}, "train and save the adapter without it"),
    "arrow_config": ({"top_k": 3}, "serve the adapters one by one"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, ModelConfig]:
    folder = tmp_path_factory.mktemp("base")
    return make_tiny_llama(folder), read_config(folder)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    rows: dict[str, str] = {}
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nrefused with 422, files by peft")
        for name, message in rows.items():
            print(f"{name:28}  {message}")


def write(folder: Path, model: PreTrainedModel, config: PeftConfig) -> Path:
    with peft_warnings_ignored(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own advice about these methods
        get_peft_model(copy.deepcopy(model), config).save_pretrained(str(folder))
    return folder


def refusal(folder: Path, config: ModelConfig) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        check_adapter(folder, config, max_rank=64)
    return caught.value


@pytest.mark.parametrize("name", REFUSED)
def test_a_feature_that_is_not_served_is_refused_with_its_reason_and_a_fix(
    name: str, base: tuple[PreTrainedModel, ModelConfig], table: dict[str, str], tmp_path: Path
) -> None:
    make_config, reason, fix = REFUSED[name]
    error = refusal(write(tmp_path / "a", base[0], make_config()), base[1])
    table[name] = str(error)
    assert error.error_type == "adapter_unsupported"
    assert reason in str(error)
    assert fix in str(error)


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_field_that_changes_the_output_and_is_not_served_is_refused(
    field: str, base: tuple[PreTrainedModel, ModelConfig], table: dict[str, str], tmp_path: Path
) -> None:
    value, fix = REFUSED_FIELDS[field]
    folder = write(tmp_path / "a", base[0], LoraConfig(r=4, **BOTH))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    error = refusal(folder, base[1])
    table[field] = str(error)
    assert error.error_type == "adapter_unsupported"
    assert f"{field} is {value!r}" in str(error) and fix in str(error)
