"""Random adapters on the experts of a tiny model, as peft writes them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import unload_peft
from transformers import PreTrainedModel

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def write_adapter(folder: Path, model: PreTrainedModel, **fields: Any) -> Path:
    """Let peft write an adapter with these fields of LoraConfig to `folder`; `model` stays as it was."""
    torch.manual_seed(len(str(fields)))
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | fields)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3 if "lora_A" in name else 0.15)
    adapted.save_pretrained(str(folder))
    unload_peft(adapted)
    return folder
