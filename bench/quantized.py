"""What quantising while loading gives and costs on this machine: speed, perplexity and memory, beside bfloat16.

    python bench/quantized.py                  the demo's model; prints a table and whether each bound is kept

Memory is that of a process of its own for each kind: the highest resident size while loading, less what the process
took before. Speeds are the median over rounds in which the kinds take turns.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

KINDS = ("bfloat16", "int8", "int4")
# Of the perplexity over that of bfloat16, and of memory while loading over the checkpoint's size.
PERPLEXITY_BOUNDS = {"int8": 1.02, "int4": 1.08}
MEMORY_BOUND = 1.3
TEXT = Path(__file__).parent / "perplexity.txt"
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def main() -> int:
    """Measure all kinds; returns 1 when a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; the demo's when absent")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="generated in each request")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(loading_bytes(options.model, options.memory_of)))
        return 0
    folder = options.model or demo_model()
    size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    memory = {kind: child_loading_bytes(folder, kind) for kind in KINDS}
    engines = {kind: engine(folder, kind) for kind in KINDS}
    perplexities = {kind: perplexity(engines[kind]) for kind in KINDS}
    speeds = {kind: {1: [], 8: []} for kind in KINDS}
    for round_number in range(options.rounds + 1):
        for kind in KINDS:
            for batch, found in speeds[kind].items():
                rate = speed(engines[kind], batch, options.tokens)
                if round_number:  # the first is to warm up
                    found.append(rate)
    return report(size, memory, perplexities, speeds)


def report(size: int, memory: dict, perplexities: dict, speeds: dict) -> int:
    """Print the table; returns 1 when a bound is not kept."""
    broken = 0
    plain = KINDS[0]
    print(f"checkpoint {size / 2**20:.0f} MiB; loading may take {MEMORY_BOUND} of it")
    print(
        f"{'':10}{'tok/s, 1':>10}{'ratio':>7}{'tok/s, 8':>10}{'ratio':>7}{'perplexity':>12}{'ratio':>8}{'loading':>9}"
    )
    for kind in KINDS:
        line = f"{kind:10}"
        for batch in (1, 8):
            pairs = zip(speeds[kind][batch], speeds[plain][batch], strict=True)
            line += f"{statistics.median(speeds[kind][batch]):10.1f}"
            line += f"{statistics.median(rate / reference for rate, reference in pairs):7.2f}"
        worse = perplexities[kind] / perplexities[plain]
        share = memory[kind] / size
        broken += worse > PERPLEXITY_BOUNDS.get(kind, math.inf) or share > MEMORY_BOUND
        print(f"{line}{perplexities[kind]:12.3f}{worse:8.4f}{share:8.2f}x")
    print(f"{broken} kinds beyond their bounds" if broken else "all bounds kept")
    return int(broken > 0)


def demo_model() -> str:
    """The folder of the demo's model, made when it is not there yet."""
    from loraplex.demo import prepare

    return str(prepare())


def child_loading_bytes(folder: str, kind: str) -> int:
    """Memory of loading, in a process of its own."""
    argv = [sys.executable, __file__, "--model", folder, "--memory-of", kind]
    return int(json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))


def loading_bytes(folder: str, kind: str) -> int:
    """The highest resident size while the model is loaded, less the one before."""
    import torch

    from loraplex_models.loader import load_model
    from loraplex_models.parallel import ParallelGroup
    from loraplex_quant.keep import Keeping
    from loraplex_quant.method import LinearWeight

    def load():
        return load_model(
            folder,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            group=ParallelGroup.single(),
            quantize=None if kind == KINDS[0] else kind,
        )

    # What oneDNN and torch take once for any model is not the model's.
    Keeping(torch.bfloat16, torch.device("cpu")).plain([LinearWeight(torch.zeros(64, 64))]).apply(
        torch.zeros(1, 64, dtype=torch.bfloat16)
    )
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = resident_bytes("VmRSS")
    model = load()
    assert model.num_bytes
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str) -> int:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def engine(folder: str, kind: str):
    """An engine in this process."""
    from loraplex import LLM

    quantize = None if kind == KINDS[0] else kind
    return LLM(folder, dtype="bfloat16", quantize=quantize, num_kv_blocks=256, prefix_caching=False)


def perplexity(llm) -> float:
    """Of the text, in one piece."""
    from loraplex import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (answer,) = llm.generate([TEXT.read_text(encoding="utf-8")], params, use_tqdm=False)
    pairs = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
    logprobs = [of_token[token_id].logprob for token_id, of_token in pairs]
    return math.exp(-statistics.fmean(logprobs))


def speed(llm, batch: int, num_tokens: int) -> float:
    """Tokens a second of so many requests at a time, prompts included."""
    from loraplex import SamplingParams

    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    answers = llm.generate([PROMPT] * batch, params, use_tqdm=False)
    count = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
