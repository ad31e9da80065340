"""A mixture of experts in place of a layer's MLP: each token goes through the few MLPs that a router chooses."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.dispatch import has_gpu_forms
from loraplex_kernels.moe import route_tokens, sum_experts
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.config import ExpertsConfig
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.build import Build
from loraplex_models.layers.expert_lora import DOWN, UP
from loraplex_models.layers.linear import Linear
from loraplex_models.layers.tiled_moe import TiledExpertLinear, TiledExperts
from loraplex_quant.method import QuantMethod


class ExpertLinear:
    """One linear of every expert: rows that are ordered by expert go through their experts' weights."""

    def __init__(self, build: Build, prefix: str, in_size: int, parts: dict[str, int], num_experts: int) -> None:
        """`parts` as in `Linear`, named `<prefix>.<number>.<name>` in the checkpoint."""
        self.in_size = in_size
        self.parts = parts
        self._prefix = prefix
        self._num_experts = num_experts
        self._keep = build.keeping.linear
        self._methods: list[QuantMethod] = []

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return sum(method.num_bytes for method in self._methods)

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Take the weights of all experts from the checkpoint."""
        for expert in range(self._num_experts):
            names = [f"{prefix}{self._prefix}.{expert}.{part}" for part in self.parts]
            weights = [
                checkpoint.linear(name).read(self.in_size, size, has_bias=False)
                for name, size in zip(names, self.parts.values(), strict=True)
            ]
            self._methods.append(self._keep(weights))

    def forward(self, rows: Tensor, starts: tuple[int, ...]) -> Tensor:
        """Return each row's product. rows: [R, in], those of expert e from starts[e] to starts[e + 1]."""
        outs = [
            method.apply(rows[start:end])
            for method, start, end in zip(self._methods, starts, starts[1:], strict=False)
            if start < end
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class Experts(Protocol):
    """The MLPs of all experts of a layer."""

    @property
    def linears(self) -> tuple[TiledExpertLinear, ...]:
        """The linears that adapters in rank pages may change; none on a CPU, where adapters are kept otherwise."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights from the checkpoint."""
        ...

    def forward(self, x: Tensor, scores: Tensor, lora: LoraBatch | None, addend: Tensor | None) -> Tensor:
        """Return what each token's best experts by `scores` [T, experts] give for x [T, hidden], plus `addend`."""
        ...


class ListedExperts:
    """Experts one after the other. See `Experts`."""

    linears: tuple[TiledExpertLinear, ...] = ()

    def __init__(
        self, build: Build, index: int, hidden_size: int, config: ExpertsConfig, activate: Callable[..., Tensor]
    ) -> None:
        """Those of the layer with that index."""
        up_parts, down_parts = config.part_sizes(hidden_size)
        prefix = f"layers.{index}.mlp.experts"
        self._index = index
        self._up = ExpertLinear(build, prefix, hidden_size, up_parts, config.num_experts)
        self._down = ExpertLinear(build, prefix, config.inner_size, down_parts, config.num_experts)
        self._num_chosen = config.num_chosen
        self._rescales = config.rescales
        self._activate = activate

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return self._up.num_bytes + self._down.num_bytes

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights from the checkpoint."""
        for linear in (self._up, self._down):
            linear.load(checkpoint, "model.")

    def forward(self, x: Tensor, scores: Tensor, lora: LoraBatch | None, addend: Tensor | None) -> Tensor:
        """Return what the chosen experts give, plus `addend`."""
        route = route_tokens(scores, self._num_chosen, self._rescales)
        deltas = None if lora is None or lora.experts is None else lora.experts.of_layer(self._index, route)
        rows = x.index_select(0, route.tokens)
        up = self._up.forward(rows, route.starts)
        if deltas is not None:
            deltas.add(UP, rows, up)
        inner = self._activate(up)
        down = self._down.forward(inner, route.starts)
        if deltas is not None:
            deltas.add(DOWN, inner, down)
        return sum_experts(down, route, addend)


class SparseMLP:
    """The experts of a layer and their router. See `MLP`, in whose place it stands.

    What adapters change of the router decides about their own tokens' experts only.
    """

    def __init__(
        self, build: Build, index: int, hidden_size: int, config: ExpertsConfig, activate: Callable[..., Tensor]
    ) -> None:
        """The MLP of the layer with that index."""
        self._router = build.router(f"layers.{index}", hidden_size, config.num_experts)
        self.linears: tuple[Linear, ...] = (self._router,)
        make = TiledExperts if has_gpu_forms(build.device) else ListedExperts
        self._experts: Experts = make(build, index, hidden_size, config, activate)
        self._group = build.group

    @property
    def expert_linears(self) -> tuple[TiledExpertLinear, ...]:
        """The experts' linears that adapters in rank pages may change: up, then down; none on a CPU."""
        return self._experts.linears

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return self._router.num_bytes + self._experts.num_bytes

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights from the checkpoint."""
        self._router.load(checkpoint, "model.")
        self._experts.load(checkpoint)

    def project(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, None]:
        """As `forward`; what adapters add is added."""
        return self.forward(x, lora), None

    def forward(self, x: Tensor, lora: LoraBatch | None, addend: Tensor | None = None) -> Tensor:
        """Return what the chosen experts give for x [T, hidden], plus `addend`."""
        # Each rank has a part of every expert's inner units, and so a summand of what it gives.
        addend = addend if self._group.rank == 0 else None
        return self._group.all_reduce(self._experts.forward(x, self._router.forward(x, lora), lora, addend))
