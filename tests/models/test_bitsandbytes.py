"""bitsandbytes against its own modules: layers, and transformers' loading of models, which computes in bfloat16."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import EngineBench
from paged_model import PagedModel
from slow_dequantization import FIXTURES
from tiny_models import load_peft, make_peft_adapter, make_tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from loraplex_models.loader import load_model
from loraplex_models.parallel import ParallelGroup
from loraplex_quant.config import ON_THE_FLY
from loraplex_quant.keep import Keeping
from loraplex_quant.method import LinearWeight

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it does not find on a CPU
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

CPU = torch.device("cpu")
TOKENS = list(range(3, 60))
# What bfloat16 makes of logits, as a share of their spread; 8 bits round activations besides.
NOISE = {"nf4": 0.03, "fp4": 0.04, "int8": 0.04}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bitsandbytes about the types it casts to
        yield


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_of_4_bits_gives_what_bitsandbytes_module_gives(kind: str) -> None:
    weight, bias, x = random(48, 128, seed=1) * 0.1, random(48, seed=2), random(5, 128, seed=3)
    module = Linear4bit(128, 48, compute_dtype=torch.float32, quant_type=kind, compress_statistics=False)
    module.weight = Params4bit(weight.clone(), requires_grad=False, quant_type=kind, compress_statistics=False)
    module.bias = torch.nn.Parameter(bias.clone())
    module = module.to("cpu")
    ours = Keeping(torch.float32, CPU, ON_THE_FLY[f"bitsandbytes-{kind}"]).linear([LinearWeight(weight, bias)])
    with torch.inference_mode():
        theirs = module(x)
    assert (ours.apply(x) - theirs).abs().max() < 1e-3 * theirs.abs().max()


def test_a_layer_of_8_bits_is_as_near_as_rounded_activations_allow() -> None:
    weight, x = random(48, 128, seed=1) * 0.1, random(5, 128, seed=3)
    module = Linear8bitLt(128, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    module.weight = Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    module = module.to("cpu")
    ours = Keeping(torch.float32, CPU, ON_THE_FLY["bitsandbytes"]).linear([LinearWeight(weight.half())])
    with torch.inference_mode():
        theirs = module(x.half()).float()
    assert (ours.apply(x) - theirs).abs().mean() < 0.01 * theirs.std()
    exact = x @ weight.T
    assert (ours.apply(x) - exact).abs().mean() < (theirs - exact).abs().mean()


def load_theirs(folder: Path, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    # None would stand for «not quantised», whatever the checkpoint says.
    more = {} if quantization is None else {"quantization_config": quantization}
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", attn_implementation="eager", **more).eval()


@torch.inference_mode()
def their_logits(model: torch.nn.Module, tokens: list[int] = TOKENS) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.float()


def our_logits(folder: Path, quantize: str | None = None) -> torch.Tensor:
    paged = PagedModel(
        load_model(folder, dtype=torch.float32, device=CPU, group=ParallelGroup.single(), quantize=quantize)
    )
    paged.add("a", TOKENS)
    return paged.run_alone("a", 64)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-double", "bnb-fp4", "bnb-int8"])
def test_a_checkpoint_gives_the_logits_of_transformers_own_loading(name: str) -> None:
    theirs = their_logits(load_theirs(FIXTURES / name))
    assert (our_logits(FIXTURES / name) - theirs).abs().mean() < NOISE[name.split("-")[1]] * theirs.std()


@pytest.mark.parametrize("name", ["bnb-nf4-double", "bnb-fp4", "bnb-int8"])
def test_answers_with_and_without_an_adapter_are_those_of_transformers_and_peft(name: str, tmp_path: Path) -> None:
    model = load_theirs(FIXTURES / name)
    adapter = make_peft_adapter(tmp_path / "a", model, rank=4)
    bench = EngineBench(FIXTURES / name, {"a": adapter})
    prompts = {None: [5, 9, 13, 200], "a": [7, 301, 44]}
    for asked, prompt in prompts.items():
        bench.add(str(asked), prompt, asked)
    bench.run()
    for asked, prompt in prompts.items():
        answer = bench.answer(str(asked)).token_ids
        logits = their_logits(load_peft(adapter, model) if asked else model, prompt + answer)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 4 * NOISE[name.split("-")[1]] * logits.std()


@pytest.mark.parametrize(
    ("quantize", "config"),
    [
        ("bitsandbytes-nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bitsandbytes-fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("bitsandbytes", {"load_in_8bit": True}),
    ],
)
def test_quantising_while_loading_gives_the_logits_of_transformers_doing_so(
    quantize: str, config: dict[str, object], tmp_path: Path
) -> None:
    make_tiny_llama(tmp_path, dtype=torch.bfloat16, intermediate_size=128)
    theirs = their_logits(load_theirs(tmp_path, BitsAndBytesConfig(**config)))
    noise = NOISE[quantize.rpartition("-")[2]] if "-" in quantize else NOISE["int8"]
    assert (our_logits(tmp_path, quantize) - theirs).abs().mean() < noise * theirs.std()
