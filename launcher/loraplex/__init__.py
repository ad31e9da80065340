"""loraplex: one base model, many LoRA adapters, one server.

The public names, `LLM` above all, are imported when they are asked for: the command line stays quick, and OpenMP's
settings can still be made before torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex.llm import LLM as LLM
    from loraplex.llm_engine import EngineArgs as EngineArgs
    from loraplex.llm_engine import LLMEngine as LLMEngine
    from loraplex.lora_request import LoRARequest as LoRARequest
    from loraplex.outputs import CompletionOutput as CompletionOutput
    from loraplex.outputs import RequestOutput as RequestOutput
    from loraplex.sampling_params import SamplingParams as SamplingParams
    from loraplex.structured_outputs import GuidedDecodingParams as GuidedDecodingParams
    from loraplex.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "loraplex.llm",
    "EngineArgs": "loraplex.llm_engine",
    "LLMEngine": "loraplex.llm_engine",
    "LoRARequest": "loraplex.lora_request",
    "SamplingParams": "loraplex.sampling_params",
    "StructuredOutputsParams": "loraplex.structured_outputs",
    "GuidedDecodingParams": "loraplex.structured_outputs",
    "RequestOutput": "loraplex.outputs",
    "CompletionOutput": "loraplex.outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraplex' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
