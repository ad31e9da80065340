"""The sampling that a model's generation_config.json recommends, in the names of `SamplingParams`."""

import json
from pathlib import Path
from typing import Any

NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """What the file in a model's folder names; empty where there is none. Raises ValueError for a broken file."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}; LLM(generation_config='vllm') does without") from None
    return {ours: config[theirs] for theirs, ours in NAMES.items() if config.get(theirs) is not None}
