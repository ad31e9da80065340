"""The GPU engine on one GPU: is it right, and what do a step, a prompt and an adapter cost. No network, no files.

    python bench/gpu.py [--json gpu.json] [--shape llama-3-8b] [--budget 460] [--vllm]

Correctness comes first: kernels against their references on this GPU, the engine's tokens against the CPU's engine
(float32), steps as graphs against steps without (bfloat16). Then the tables, most wanted first; a part that fails or no
longer fits into the budget of seconds is named, the others go on, and the JSON file is written after each row. The work
is done in a process of its own: where one is lost to a part (a broken device context, a kernel that never ends), the
next goes on with the other parts; so does `--resume` with the file of a run that was cut off. Decode steps are whole
steps of the engine: planning, one copy of the inputs, the graph, the choice of tokens, and reading them. `--interpret`
runs all of it on a tiny model in Triton's interpreter, however long that takes: it proves this script, its figures mean
nothing.

What the host must have: torch, Triton, numpy, safetensors, tokenizers; msgspec, llguidance and psutil, as wheels where
nothing can be installed (bench/README.md has the commands); not numba, and not ourselves installed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_packages
from gpu_report import Report


def main() -> int:
    """Check, measure, print, write the JSON file; 1 when a check or a part failed."""
    options = _options()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        options.budget = float("inf")
    if options.works:
        gpu_packages.prepare()
        import gpu_tables  # its imports can be met only now

        return gpu_tables.main(options)
    return watch([sys.executable, __file__, *sys.argv[1:], "--works"], options)


def watch(command: list[str], options: argparse.Namespace) -> int:
    """Have a process do the parts, and another go on where one was lost; its arguments come after those of `command`.

    Each loss costs the part that ran, so there is an end.
    """
    began = time.monotonic()
    if not options.resume:
        options.json.unlink(missing_ok=True)
    while True:
        left = options.budget - (time.monotonic() - began)
        code = subprocess.call([*command, "--resume", "--budget", str(left)])
        report = Report.read(options.json)
        if report.running is None:
            return code
        report.failed.setdefault(report.running, f"its process ended with {code}")
        print(f"\n## {report.running} FAILED: its process ended with {code}; another goes on", flush=True)
        report.running = None
        report.write(options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=("llama-3-8b", "qwen2.5-7b", "mistral-7b", "1b"))
    parser.add_argument("--budget", type=float, default=460, help="seconds for the whole run")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for all figures")
    parser.add_argument("--resume", action="store_true", help="only the parts that the JSON file does not have")
    parser.add_argument("--only-checks", action="store_true", help="no tables")
    parser.add_argument("--interpret", action="store_true", help="a tiny model in Triton's interpreter, without a GPU")
    parser.add_argument("--vllm", action="store_true", help="measure vLLM too, where it can be imported")
    parser.add_argument("--works", action="store_true", help=argparse.SUPPRESS)  # the process that is watched
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
