"""Plain checkpoints that are quantised while they are loaded: logits and answers against transformers and peft."""

import copy
from pathlib import Path

import pytest
import torch
from engines import EngineBench
from paged_model import PagedModel
from tiny_models import SEVEN_LINEARS, make_peft_adapter, make_tiny_llama
from transformers import PreTrainedModel
from truth import Truth

from loraplex_models.checkpoint import CheckpointError
from loraplex_models.decoder import CausalLM
from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.config import ON_THE_FLY
from loraplex_quant.grouped import plain
from loraplex_quant.rounding import round_weight

PROMPT = list(range(3, 60))


def load(folder: Path, quantize: str | None, dtype: torch.dtype = torch.float32) -> CausalLM:
    group, device = ParallelGroup.single(), torch.device("cpu")
    return load_model(folder, dtype=dtype, device=device, group=group, quantize=quantize)


def logits(model: CausalLM, chunk: int = 64) -> torch.Tensor:
    paged = PagedModel(model)
    paged.add("a", PROMPT)
    return paged.run_alone("a", chunk)


@torch.inference_mode()
def rounded_model(model: PreTrainedModel, quantize: str) -> PreTrainedModel:
    """The model with the weights that `test_rounding` has checked, in its own linears."""
    model, way = copy.deepcopy(model), ON_THE_FLY[quantize]
    for name, module in model.named_modules():
        kind = way.head_kind if name == "lm_head" else way.kind
        if isinstance(module, torch.nn.Linear) and kind is not None:
            module.weight.copy_(plain(round_weight(module.weight, kind)))
    return model


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, make_tiny_llama(folder)


@pytest.mark.parametrize("quantize", ON_THE_FLY)
def test_logits_are_those_of_transformers_with_rounded_weights(
    quantize: str, truth: tuple[Path, PreTrainedModel]
) -> None:
    folder, model = truth
    with torch.inference_mode():
        expected = rounded_model(model, quantize)(torch.tensor([PROMPT])).logits[0]
        unrounded = model(torch.tensor([PROMPT])).logits[0]
    assert (logits(load(folder, quantize)) - expected).abs().max() < 1e-3
    assert 1e-3 < (unrounded - expected).abs().mean() < 0.4 * unrounded.std()


@pytest.mark.parametrize("quantize", ["int8", "int4", "bitsandbytes-nf4"])
def test_answers_with_and_without_adapters_are_those_of_peft_over_rounded_weights(
    quantize: str, truth: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = truth
    rounded = rounded_model(model, quantize)
    adapters = {
        "all": make_peft_adapter(tmp_path / "all", rounded, rank=4, seed=1, target_modules=SEVEN_LINEARS),
        "mlp": make_peft_adapter(tmp_path / "mlp", rounded, rank=12, seed=2, target_modules=["down_proj", "q_proj"]),
    }
    bench, reference = EngineBench(folder, adapters, quantize=quantize), Truth(rounded, adapters)
    prompts = {None: [5, 9, 13, 200], "all": [7, 301, 44], "mlp": [400, 3, 3, 8, 90]}
    for adapter, prompt in prompts.items():
        bench.add(str(adapter), prompt, adapter)
    bench.run()
    for adapter, prompt in prompts.items():
        assert reference.objection(adapter, prompt, bench.answer(str(adapter)), {2}) is None


@pytest.mark.parametrize(("quantize", "share"), [("int8", 0.6), ("int4", 0.4)])
def test_in_bfloat16_whole_numbers_stay_small_and_give_the_same(
    quantize: str, share: float, truth: tuple[Path, PreTrainedModel]
) -> None:
    folder, _ = truth
    small, exact = load(folder, quantize, torch.bfloat16), load(folder, quantize)
    embedding_bytes = 512 * 64 * 2
    plain_bytes = load(folder, None, torch.bfloat16).num_bytes
    assert small.num_bytes - embedding_bytes < share * (plain_bytes - embedding_bytes)
    expected = logits(exact)
    for chunk in (1, 20, 57):  # each way in which a product is computed
        ours = logits(small, chunk).float()
        assert (ours - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_weights_can_be_had_again(quantize: str, truth: tuple[Path, PreTrainedModel]) -> None:
    folder, model = truth
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        linear = load(folder, quantize, dtype).layers[1].qkv
        names = [f"{module}.weight" for module in linear.parts]
        weights = [model.state_dict()[f"model.{name}"] for name in names]
        expected = torch.cat([plain(round_weight(weight, quantize)) for weight in weights])
        assert (linear.dequantize() - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_format_that_the_checkpoint_does_not_have_is_refused(truth: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(CheckpointError, match="--quantize awq: the checkpoint's weights are not quantised"):
        load(truth[0], "awq")
