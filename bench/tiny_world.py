"""A random tiny model and as many adapters for it as wanted, with what each of them must answer."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

# The tests' helpers write the checkpoint and the tokenizer; the project installs neither tests nor benchmarks.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from tiny_models import SEVEN_LINEARS, make_tiny_llama
from tiny_tokenizer import byte_tokenizer

RANKS = (4, 8, 16, 32, 64)
PREFIX = "base_model.model."


def make_model(folder: Path, *, max_positions: int = 4096) -> LlamaForCausalLM:
    """Write a random tiny Llama with a byte tokenizer, and return it."""
    tokenizer = byte_tokenizer()
    model = make_tiny_llama(folder, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=max_positions)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def write_adapter(folder: Path, model: LlamaForCausalLM, rank: int, seed: int) -> None:
    """Write random LoRA weights over all linears in peft's format, much faster than peft would."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SEVEN_LINEARS:
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) / rank**0.5
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": list(SEVEN_LINEARS), "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True, slots=True)
class TrueAnswer:
    """The greedy tokens after a prompt, and by how much each beat the second best (in its logit)."""

    token_ids: list[int]
    margins: list[float]

    def is_met_by(self, token_ids: list[int]) -> bool:
        """Whether these are the tokens, up to a first place where two were all but equal."""
        for mine, theirs, margin in zip(self.token_ids, token_ids, self.margins, strict=False):
            if mine != theirs:
                return margin < 1e-3
        return len(token_ids) == len(self.token_ids)


class Truth:
    """Plain transformers over W + (alpha / r) B A: it shares no code with the server."""

    def __init__(self, model: LlamaForCausalLM):
        self._model = model.eval()
        self._linears = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in SEVEN_LINEARS}
        self._weights = {name: module.weight.detach().clone() for name, module in self._linears.items()}

    @torch.inference_mode()
    def answers(self, folder: Path | None, prompts: list[list[int]], num_tokens: int) -> list[TrueAnswer]:
        """What an adapter (None: the base) answers to prompts of one length; end tokens are like others."""
        self._wear(folder)
        tokens = torch.tensor(prompts)
        margins: list[torch.Tensor] = []
        past = None
        inputs = tokens
        for _ in range(num_tokens):
            output = self._model(inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            best = output.logits[:, -1].topk(2)
            margins.append(best.values[:, 0] - best.values[:, 1])
            inputs = best.indices[:, :1]
            tokens = torch.cat([tokens, inputs], 1)
        length = len(prompts[0])
        margin = torch.stack(margins, 1)
        return [TrueAnswer(tokens[i, length:].tolist(), margin[i].tolist()) for i in range(len(prompts))]

    def _wear(self, folder: Path | None) -> None:
        tensors = {} if folder is None else load_file(folder / "adapter_model.safetensors")
        for name, module in self._linears.items():
            weight = self._weights[name]
            if tensors:
                a, b = (tensors[f"{PREFIX}{name}.lora_{half}.weight"] for half in "AB")
                weight = weight + 2 * (b @ a)  # alpha is twice the rank
            module.weight.copy_(weight)


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts of printable bytes, all of one length."""
    chance = random.Random(seed)
    return [[chance.randrange(40, 120) for _ in range(length)] for _ in range(count)]
