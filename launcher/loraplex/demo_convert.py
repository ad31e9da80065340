"""`python -m loraplex.demo_convert GGUF FOLDER`: turn the demo's GGUF file into a safetensors checkpoint."""

import os
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    """End when the pipe from the process that started this one closes."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written; sys.stdin itself must not be held at exit
    os._exit(1)


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise the weights to bfloat16 and save them with config, tokenizer and chat template."""
    # Heavy, and wanted in this process only.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = source.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        fields.pop(name, None)
    # The GGUF file leaves the epsilon to its reader; these are the values of the model's own config.json.
    fields["rms_norm_eps"] = 1e-5
    # A model read from GGUF counts as quantised and refuses to be saved: its weights go into a plain one.
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)  # type: ignore[no-untyped-call]
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
