"""From a model folder to a model that can run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from loraplex_models.architectures import refusal
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import ModelConfig, ModelConfigError, RopeConfig, read_config
from loraplex_models.cuts import CutError, RankPart
from loraplex_models.decoder import CausalLM
from loraplex_models.names import served_names
from loraplex_models.parallel import ParallelGroup
from loraplex_models.registry import find_model_class
from loraplex_models.weight_stream import WeightStream
from loraplex_quant.config import OnTheFly, QuantConfig, QuantConfigError, settle_quantization
from loraplex_quant.keep import Keeping
from loraplex_quant.registry import weight_format

SERVED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a caller may ask for instead of the config's own rotary scaling; the other kinds need more numbers than a factor.
ROPE_OVERRIDES = ("linear", "dynamic")
# Buffers that older writers stored beside the weights; they follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
NAMES_SHOWN = 5


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: ParallelGroup,
    rope_scaling: str | None = None,
    rope_factor: float | None = None,
    quantize: str | None = None,
    by_transformers: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Build the model of a folder and fill it from the folder's safetensors checkpoint.

    Layers are filled and packed one after the other, so that no second copy of the model exists at any time.
    Each rank of `group` reads its own part. `quantize` is what --quantize says: it makes sure of the checkpoint's
    format, or quantises plain weights on the way. `by_transformers`: by the code of the package transformers in place
    of a family of ours. `progress` is told the bytes done and the bytes in all. Raises CheckpointError.
    """
    if dtype not in SERVED_DTYPES:
        raise CheckpointError(f"dtype {dtype} is not served; served are float32, bfloat16 and float16")
    config = _overridden_rope(_served_config(path), rope_scaling, rope_factor)
    model_class = find_model_class(config.architecture)
    if model_class is None and not by_transformers:
        raise CheckpointError(refusal(config.architecture))
    stored, on_the_fly = _quantization(path, config, quantize)
    try:
        part = RankPart(config, group.rank, group.size)
    except CutError as error:
        raise CheckpointError(str(error)) from None
    keeping = Keeping(dtype, device, on_the_fly)
    if by_transformers or model_class is None:
        if stored is not None or rope_scaling is not None:
            raise CheckpointError("--modeling transformers takes no quantised checkpoint, and no --rope-scaling")
        model = _made_by_transformers(path, part.config, keeping, group)
    else:
        model = model_class(part.config, keeping, group)
    reader = model.plain_format if stored is None else weight_format(stored)
    # What is quantised, or will be, is read and repacked by the CPU.
    stream = open_stream(device) if reader is None and on_the_fly is None else None
    with (
        Checkpoint(path, reader, part, served_names(config.architecture), stream) as checkpoint,
        torch.inference_mode(),
    ):
        for _ in model.load(checkpoint):
            checkpoint.release()
            if progress is not None:
                progress(min(checkpoint.taken_bytes, checkpoint.total_bytes), checkpoint.total_bytes)
        if stored is not None and not checkpoint.num_quantized:
            raise CheckpointError(
                f"the checkpoint in '{path}' calls itself quantised, and none of its linears is quantised"
            )
        _check_left_over(path, checkpoint, config)
        if progress is not None:
            progress(checkpoint.total_bytes, checkpoint.total_bytes)
    return model


def open_stream(device: torch.device) -> WeightStream | None:
    """What reads plain weights for a device; None where files are mapped."""
    return WeightStream(device) if device.type == "cuda" else None


def _made_by_transformers(path: str | Path, config: ModelConfig, keeping: Keeping, group: ParallelGroup) -> CausalLM:
    try:
        # A package that not every machine has, and heavy.
        from loraplex_models.transformers_model import TransformersModel
    except ImportError as error:
        raise CheckpointError(
            f"--modeling transformers needs the package transformers (pip install 'loraplex[transformers]'): {error}"
        ) from None
    return TransformersModel(path, config, keeping, group)


def _served_config(path: str | Path) -> ModelConfig:
    try:
        config = read_config(path)
    except ModelConfigError as error:
        raise CheckpointError(str(error)) from None
    return config


def _quantization(
    path: str | Path, config: ModelConfig, wanted: str | None
) -> tuple[QuantConfig | None, OnTheFly | None]:
    try:
        return settle_quantization(wanted, config.quantization)
    except QuantConfigError as error:
        raise CheckpointError(f"the checkpoint in '{path}': {error}") from None


def _overridden_rope(config: ModelConfig, kind: str | None, factor: float | None) -> ModelConfig:
    if kind is None:
        if factor is not None:
            raise CheckpointError("a rope factor was given without a rope scaling; give both or none")
        return config
    if kind not in ROPE_OVERRIDES:
        raise CheckpointError(f"rope scaling '{kind}' cannot be asked for; can be: {', '.join(ROPE_OVERRIDES)}")
    if factor is not None and factor < 1:
        raise CheckpointError(f"rope factor {factor} is below 1")
    parameters = {"factor": 1.0 if factor is None else factor}
    if "partial_rotary_factor" in config.rope.parameters:
        parameters["partial_rotary_factor"] = config.rope.parameters["partial_rotary_factor"]
    return replace(config, rope=RopeConfig(theta=config.rope.theta, kind=kind, parameters=parameters))


def _check_left_over(path: str | Path, checkpoint: Checkpoint, config: ModelConfig) -> None:
    left_over = [name for name in checkpoint.left_over() if not name.endswith(IGNORED_SUFFIXES)]
    if config.tie_embeddings and "lm_head.weight" in left_over:
        left_over.remove("lm_head.weight")
    if left_over:
        shown = ", ".join(left_over[:NAMES_SHOWN]) + (" …" if len(left_over) > NAMES_SHOWN else "")
        raise CheckpointError(
            f"the checkpoint in '{path}' has {len(left_over)} tensors that {config.architecture} does not know: {shown}"
        )
