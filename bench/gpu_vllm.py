"""vLLM on the work of bench/gpu.py, in a process of its own; says so and gives nothing where it cannot be imported."""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
NEW_TOKENS = 65
LOADS = ((1, 0), (8, 0), (32, 0), (1, 1), (8, 1), (8, 8), (32, 1), (32, 32))  # batch, adapters


def measure_vllm(shape: str, prompt_tokens: int) -> list[dict[str, Any]]:
    """Decode steps of vLLM with random weights of that shape: one row for each batch and number of adapters."""
    if importlib.util.find_spec("vllm") is None:
        return [{"vLLM": "cannot be imported here"}]
    done = subprocess.run(
        [sys.executable, __file__, shape, str(prompt_tokens)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return lines or [{"vLLM": f"failed: {done.stderr[-500:]}"}]


def _adapter_folders(folder: Path, model: dict[str, Any], count: int) -> list[Path]:
    """Folders of one rank-16 adapter's files; the engine loads each as an adapter of its own."""
    import torch
    from safetensors.torch import save_file

    hidden, inner = model["hidden_size"], model["intermediate_size"]
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    tensors = {}
    for layer in range(model["num_hidden_layers"]):
        for name, (num_in, num_out) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(16, num_in).mul_(0.02).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, 16).mul_(0.02).bfloat16()
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "bias": "none"}
    config["target_modules"] = [name.split(".")[1] for name in sizes]
    folders = [folder / f"adapter-{index}" for index in range(count)]
    for index, path in enumerate(folders):
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        if index == 0:
            save_file(tensors, path / "adapter_model.safetensors")
        else:
            (path / "adapter_model.safetensors").symlink_to(folders[0] / "adapter_model.safetensors")
    return folders


def main() -> None:
    """Print a JSON line for each load."""
    from gpu_world import SHAPES, config_folder
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    shape, prompt_tokens = sys.argv[1], int(sys.argv[2])
    folders = _adapter_folders(Path(tempfile.mkdtemp(prefix="vllm-adapters-")), SHAPES[shape], 32)
    llm = LLM(
        model=str(config_folder(shape)), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=1024, enable_lora=True, max_loras=32, max_lora_rank=16, max_num_seqs=128,
        enable_prefix_caching=False,
    )  # fmt: skip
    requests = [LoRARequest(path.name, index + 1, str(path)) for index, path in enumerate(folders)]
    for batch, count in LOADS:
        prompts = [{"prompt_token_ids": [3 + row] * prompt_tokens} for row in range(batch)]
        lora = [requests[row % count] for row in range(batch)] if count else None
        seconds = {}
        for num_new in (1, NEW_TOKENS):
            sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, detokenize=False)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                llm.generate(prompts, sampling, lora_request=lora, use_tqdm=False)
                times.append(time.perf_counter() - began)
            seconds[num_new] = statistics.median(times[1:])
        step_ms = (seconds[NEW_TOKENS] - seconds[1]) / (NEW_TOKENS - 1) * 1e3
        print(json.dumps({"batch": batch, "adapters": count, "step ms": step_ms}), flush=True)


if __name__ == "__main__":
    main()
