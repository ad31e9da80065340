"""lm-eval's local-completions over the demo in float32: 50 questions, and its log-probabilities against transformers'.

    python tests/clients/lm_eval_run.py

Runs `lm_eval run` in an environment of its own, with a task and data that it writes itself, for the base model and for
an adapter. Ends with 0 when both have run to the end and every log-probability of the base model's is the one that
transformers computes, within 1e-3.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from environments import clean_environment, python_of
from matrix import served_demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex import demo

TOLERANCE = 1e-3
PAIRS = """
Albania:Tirana Austria:Vienna Belgium:Brussels Bulgaria:Sofia Canada:Ottawa Chile:Santiago China:Beijing
Croatia:Zagreb Cuba:Havana Cyprus:Nicosia Denmark:Copenhagen Ecuador:Quito Egypt:Cairo Estonia:Tallinn
Finland:Helsinki France:Paris Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest Iceland:Reykjavik
Iran:Tehran Iraq:Baghdad Ireland:Dublin Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman Kenya:Nairobi
Latvia:Riga Lebanon:Beirut Lithuania:Vilnius Malta:Valletta Mongolia:Ulaanbaatar Morocco:Rabat
Nepal:Kathmandu Norway:Oslo Peru:Lima Poland:Warsaw Portugal:Lisbon Qatar:Doha Romania:Bucharest
Russia:Moscow Senegal:Dakar Serbia:Belgrade Slovenia:Ljubljana Spain:Madrid Sweden:Stockholm Turkey:Ankara
Ukraine:Kyiv
"""
CAPITALS = dict(pair.split(":") for pair in PAIRS.split())
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""


def documents() -> list[dict[str, object]]:
    """The questions: each capital beside the next one of the list."""
    names = list(CAPITALS.values())
    return [
        {"question": f"The capital of {country} is", "choices": [capital, names[(i + 1) % len(names)]], "answer": 0}
        for i, (country, capital) in enumerate(CAPITALS.items())
    ]


def evaluate(folder: Path, url: str, model: str) -> list[dict[str, object]]:
    """Run the harness; one entry a question, with the log-probability of each choice."""
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents()))
    (folder / "capitals.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    output = folder / f"output-{model.rpartition('/')[2]}"
    arguments = f"model={model},base_url={url}/v1/completions,num_concurrent=2,max_length=1024"
    subprocess.run(
        [str(Path(python_of("lm-eval")).parent / "lm_eval"), "run", "--model", "local-completions", "--model_args",
         arguments, "--tasks", "capitals", "--include_path", str(folder), "--output_path", str(output),
         "--log_samples"],
        check=True, env=clean_environment() | {"HF_HOME": str(folder / "hub"), "HF_DATASETS_OFFLINE": "1"},
    )  # fmt: skip
    (samples,) = output.rglob("samples_capitals_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def expected(model_path: Path) -> list[list[float]]:
    """What transformers says of each choice behind its question."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    found = []
    for one in documents():
        question = tokenizer(one["question"])["input_ids"]
        values = []
        for choice in one["choices"]:
            token_ids = tokenizer(f"{one['question']} {choice}")["input_ids"]
            with torch.inference_mode():
                logprobs = model(torch.tensor([token_ids])).logits[0].log_softmax(1)
            places = range(len(question), len(token_ids))
            values.append(sum(logprobs[place - 1, token_ids[place]].item() for place in places))
        found.append(values)
    return found


def main() -> int:
    """Serve, evaluate, compare."""
    torch.set_num_threads(1)
    model_path = demo.prepare()
    with tempfile.TemporaryDirectory() as name, served_demo("--dtype", "float32") as url:
        samples = evaluate(Path(name), url, "tgi")
        with_adapter = evaluate(Path(name), url, "pirate")
    found = [[float(resp[0][0]) for resp in sample["resps"]] for sample in samples]
    differences = [
        abs(ours - theirs)
        for got, wanted in zip(found, expected(model_path), strict=True)
        for ours, theirs in zip(got, wanted, strict=True)
    ]
    print(f"{len(samples)} samples; {len(differences)} log-probabilities, largest difference {max(differences):.2e}")
    changed = [one["resps"] for one in with_adapter] != [one["resps"] for one in samples]
    print(f"the adapter's run: {len(with_adapter)} samples, {'other' if changed else 'THE SAME'} log-probabilities")
    return int(max(differences) > TOLERANCE or not changed or len(with_adapter) != len(samples))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
