"""How much memory loading takes, as the benchmark measures it in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_llama

# What a process takes beside the model: files' headers, compiled products.
BESIDE_BYTES = 16 * 2**20


@pytest.mark.parametrize(("kind", "share"), [("bfloat16", 1.1), ("int8", 1.1), ("int4", 1.0)])
def test_loading_takes_little_more_than_the_checkpoint(kind: str, share: float, tmp_path: Path) -> None:
    make_tiny_llama(
        tmp_path, dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=16, vocab_size=1024
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    script = Path(__file__).parents[2] / "bench" / "quantized.py"
    argv = [sys.executable, str(script), "--model", str(tmp_path), "--memory-of", kind]
    taken = int(json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))
    assert taken < share * size + BESIDE_BYTES, f"{taken / size:.2f} of the checkpoint's size"
