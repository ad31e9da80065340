"""The peer transformers + peft: answers the requests it reads one by one. Run by peers.py as a process of its own.

Reads one JSON line {"requests": [[prompt, adapter or null], …], "num_tokens": n} at a time from standard input and
writes one line with the times at which each request's tokens came, in seconds after it began.
"""

import argparse
import contextlib
import json
import sys
import time
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class TokenTimes:
    """A streamer that keeps nothing but the time of each token."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: list[float] = []
        self._is_prompt = True

    def put(self, _: torch.Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if not self._is_prompt:
            self.times.append(time.perf_counter() - self.started)
        self._is_prompt = False

    def end(self) -> None:
        """Called after the last token."""


def main() -> None:
    """Load everything, say so, and answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None  # answers have their full length
    for name, path in (adapter.split("=", 1) for adapter in options.adapter):
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    model.eval()
    print(json.dumps("ready"), flush=True)

    for line in sys.stdin:
        work = json.loads(line)
        times = [answer(model, tokenizer, prompt, adapter, work["num_tokens"]) for prompt, adapter in work["requests"]]
        print(json.dumps(times), flush=True)


def answer(model, tokenizer, prompt: str, adapter: str | None, num_tokens: int) -> list[float]:
    """Generate greedily and give the times of the tokens."""
    times = TokenTimes()
    inputs = tokenizer(prompt, return_tensors="pt")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if adapter is not None:
            model.set_adapter(adapter)
        elif isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, streamer=times)
    return times.times


if __name__ == "__main__":
    main()
