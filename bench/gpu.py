"""The GPU engine on one GPU: is it right, and what do a step, a prompt and an adapter cost. No network, no files.

    python bench/gpu.py [--json gpu.json] [--shape llama-3-8b] [--budget 460] [--vllm]

Correctness comes first: kernels against their references on this GPU, the engine's tokens against the CPU's engine
(float32), steps as graphs against steps without (bfloat16). Then the tables, most wanted first; a part that fails or no
longer fits into the budget of seconds is named, the others go on, and the JSON file is written after each. Decode steps
are whole steps of the engine: planning, one copy of the inputs, the graph, the choice of tokens, and reading them.
`--interpret` runs all of it on a tiny model in Triton's interpreter: it proves this script, its figures mean nothing.

What the host must have: torch, Triton, numpy, safetensors, tokenizers; msgspec, llguidance and psutil, as wheels where
nothing can be installed (bench/README.md has the commands); not numba, and not ourselves installed.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_packages


def main() -> int:
    """Check, measure, print, write the JSON file; 1 when a check or a part failed."""
    if "--interpret" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    gpu_packages.prepare()
    import gpu_tables  # its imports can be met only now

    return gpu_tables.main(__doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
