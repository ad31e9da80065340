"""Any causal language model of transformers, run by its own code over our linears, adapters and paged attention.

Slower than a family of ours. Imported only when it is asked for, as the package transformers is optional.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loraplex_models.adapters.manifest import module_shapes
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import ModelConfig
from loraplex_models.decoder import CausalLM
from loraplex_models.forward import AttentionBatch, ForwardBatch
from loraplex_models.layers.attention import KVCache
from loraplex_models.layers.build import Build
from loraplex_models.layers.linear import Linear
from loraplex_models.parallel import ParallelGroup
from loraplex_models.transformers_modules import (
    ATTENTION_NAME,
    EmbeddingModule,
    HeadModule,
    LinearModule,
    Now,
    PagedAttention,
    Step,
)
from loraplex_quant.keep import Keeping

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LINEAR_PATH = re.compile(r"(?P<prefix>.*?)(?P<layer>layers\.\d+)\.(?P<kind>(?:self_attn|mlp)\.[a-z0-9_]+)")


class TransformersModel(CausalLM):
    """A model of transformers with our parts put in. `load` fills it, and tries it out on two tokens."""

    def __init__(self, folder: str | Path, config: ModelConfig, keeping: Keeping, group: ParallelGroup) -> None:
        """Lay out the model of a folder, of whose config.json `config` is our reading, without weights.

        Raises CheckpointError for what cannot be run this way.
        """
        if group.size > 1 or keeping.device.type != "cpu":
            raise _refusal(config, "it is served on one rank and on a CPU only")
        self.dtype, self.device, self.group = keeping.dtype, keeping.device, group
        self._now = Now()
        self._module = _make_module(folder, config)
        theirs = self._module.config
        num_kv_heads = getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads
        self.config = config = replace(
            config,
            num_layers=theirs.num_hidden_layers,
            num_kv_heads=num_kv_heads,
            head_dim=getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
            max_positions=_max_positions(theirs, config),
            tie_embeddings=bool(theirs.tie_word_embeddings),
        )
        build = Build(keeping, group)
        self._embedding = build.embedding(config.vocab_size, config.hidden_size)
        self._head = build.head(config.vocab_size, config.hidden_size)
        self._put_ends()
        self._linears = self._put_linears(build)
        paged = PagedAttention(config.num_kv_heads, config.head_dim, self._now)
        for module in self._module.modules():
            if hasattr(module, "layer_idx"):
                module.loraplex_attention = paged
        self._windowed = _windowed_layers(theirs)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All linears that adapters may change, by their index."""
        return tuple(self._linears.values())

    @property
    def can_be_captured(self) -> bool:
        """The model's own code may do anything."""
        return False

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        rest: int = sum(parameter.nbytes for parameter in self._module.parameters())
        ends = self._embedding.num_bytes + self._head.num_bytes
        return ends + rest + sum(linear.num_bytes for linear in self.linears)

    def load(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Take the weights from the checkpoint, part by part; yields after each part. Raises CheckpointError."""
        self._embedding.load(checkpoint, f"{self._embedding_name}.weight")
        if self.config.tie_embeddings:
            self._head.tie(self._embedding)
        else:
            self._head.load(checkpoint, f"{self._head_name}.weight")
        yield
        for name, linear in self._linears.items():
            linear.load(checkpoint, name.removesuffix(next(iter(linear.parts))))
            yield
        for name, module in list(self._module.named_modules()):
            self._fill_buffers(name, module)
            for leaf, parameter in list(module.named_parameters(prefix=name, recurse=False)):
                taken = checkpoint.take(leaf, tuple(parameter.shape)).to(self.device, self.dtype, copy=True)
                setattr(module, leaf.rpartition(".")[2], nn.Parameter(taken, requires_grad=False))
        yield
        self._try()

    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Return the logits of `batch.sample_rows`, [S, vocab] in float32; writes the cache in place.

        To be called under torch.inference_mode.
        """
        self._now.step = Step(batch, kv_cache)
        found = self._module(batch.token_ids.unsqueeze(0), position_ids=batch.positions.unsqueeze(0), use_cache=False)
        logits: Tensor = found.logits[0]
        return logits.float()

    def _put_ends(self) -> None:
        embedding, head = self._module.get_input_embeddings(), self._module.get_output_embeddings()
        if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
            raise _refusal(self.config, "its embedding or its head is not a plain one")
        names = {id(module): name for name, module in self._module.named_modules()}
        self._embedding_name, self._head_name = names[id(embedding)], names[id(head)]
        self._module.set_submodule(self._embedding_name, EmbeddingModule(self._embedding, self._now))
        self._module.set_submodule(self._head_name, HeadModule(self._head, self._now))

    def _put_linears(self, build: Build) -> dict[str, Linear]:
        """By their names in the checkpoint. Linears elsewhere in the model stay transformers' own, without adapters."""
        linears: dict[str, Linear] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name, module in list(self._module.named_modules()):
            path = LINEAR_PATH.fullmatch(name)
            if path is None or type(module) is not nn.Linear:
                continue
            in_size, out_size = shapes[path["kind"]] = module.in_features, module.out_features
            linear = build.linear(path["layer"], in_size, {path["kind"]: out_size}, module.bias is not None)
            linears[name] = linear
            self._module.set_submodule(name, LinearModule(linear, self._now))
        known = module_shapes(self.config)
        if shapes != known:
            raise _refusal(
                self.config,
                f"its linears are {', '.join(sorted(shapes))}, those that adapters are checked for "
                f"{', '.join(sorted(known))}",
            )
        return linears

    def _fill_buffers(self, name: str, module: nn.Module) -> None:
        """Let transformers compute the buffers that a module owns (angles of the rotary embedding)."""
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers:
            return
        for leaf, buffer in buffers.items():
            module._buffers[leaf] = torch.full(buffer.shape, float("nan")) if buffer.is_floating_point() else None
        self._module._init_weights(module)
        if any(buffer is None or buffer.isnan().any() for buffer in module._buffers.values()):
            raise _refusal(self.config, f"nothing says what the buffers of '{name}' are")

    def _try(self) -> None:
        """Run two tokens: what the model's code asks for shows now, or never. Raises CheckpointError."""
        two = torch.arange(2, dtype=torch.int32)
        attention = AttentionBatch(
            query_start=2 * two,
            seq_lens=two[:1] + 2,
            block_table=torch.zeros(1, 1, dtype=torch.int32),
            slot_mapping=two.long(),
            num_decodes=0,
            max_query_len=2,
            max_seq_len=2,
        )
        try:
            self.forward(ForwardBatch(two.long(), two.long(), two.long(), attention, None), self.new_kv_cache(1, 2))
        except CheckpointError as error:
            raise _refusal(self.config, str(error)) from None
        except Exception as error:  # whatever code that is not ours may raise
            raise _refusal(self.config, f"a first step ended with {error!r}") from error
        windows = self._now.step.windows
        if sorted(windows) != list(range(self.config.num_layers)):
            raise _refusal(self.config, "not every layer has attention that can be replaced")
        if self._windowed != {layer for layer, window in windows.items() if window is not None}:
            raise _refusal(self.config, "its layers do not use the windows that its config.json names")


def _refusal(config: ModelConfig, reason: str) -> CheckpointError:
    return CheckpointError(f"{config.architecture}: --modeling transformers cannot run it: {reason}")


def _make_module(folder: str | Path, config: ModelConfig) -> Any:
    """The model of transformers, on no device, with our attention. Raises CheckpointError."""
    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            module = make(theirs, attn_implementation=ATTENTION_NAME, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError) as error:
        raise _refusal(config, f"transformers makes no model of its config: {error}") from error
    kinds = set(getattr(theirs, "layer_types", None) or ())
    reasons = {
        "it has an encoder": theirs.is_encoder_decoder,
        "its code takes no other attention": not module._supports_attention_backend,
        f"its layers are {', '.join(sorted(kinds))}": not kinds <= SERVED_LAYER_TYPES,
        "its experts are kept otherwise than its checkpoint has them": any(p.ndim > 2 for p in module.parameters()),
        "its tokens see what comes after": getattr(theirs, "is_causal", True) is False,
    }
    for reason, holds in reasons.items():
        if holds:
            raise _refusal(config, reason)
    return module.eval()


def _max_positions(theirs: Any, ours: ModelConfig) -> int:
    if ours.rope.kind == "longrope":
        return ours.max_positions
    return int(getattr(theirs, "max_position_embeddings", None) or ours.max_positions)


def _windowed_layers(theirs: Any) -> set[int]:
    """The layers that the config gives a window."""
    if not getattr(theirs, "sliding_window", None) or getattr(theirs, "use_sliding_window", True) is False:
        return set()
    kinds = getattr(theirs, "layer_types", None)
    return {i for i in range(theirs.num_hidden_layers) if kinds is None or kinds[i] == "sliding_attention"}
