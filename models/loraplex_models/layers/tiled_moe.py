"""A mixture of experts on a GPU: one product for all experts, over rows that are cut into tiles of one expert."""

from collections.abc import Callable

from torch import Tensor

from loraplex_kernels.lora_pages import RowDelta, RowTiles, row_delta
from loraplex_kernels.moe_tiles import ExpertTiles, adapter_tiles, route_rows, sum_rows
from loraplex_models.checkpoint import Checkpoint, CheckpointError
from loraplex_models.config import ExpertsConfig
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.build import Build
from loraplex_quant.gpu_experts import ExpertWeights, keep_experts


class TiledExpertLinear:
    """One linear of every expert."""

    index: int  # behind all other linears of the model, which gives it; the place in `LoraBatch.pages`
    _weights: ExpertWeights  # from `load` on

    def __init__(self, build: Build, prefix: str, in_size: int, parts: dict[str, int], num_experts: int) -> None:
        """`parts` as in `Linear`, named `<prefix>.<number>.<name>` in the checkpoint."""
        self.in_size = in_size
        self.parts = parts
        self._prefix = prefix
        self._num_experts = num_experts
        self._keeping = build.keeping

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return self._weights.num_bytes

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Take the weights of all experts from the checkpoint. Raises CheckpointError."""
        experts = [
            [
                checkpoint.linear(f"{prefix}{self._prefix}.{expert}.{part}").read(self.in_size, size, has_bias=False)
                for part, size in self.parts.items()
            ]
            for expert in range(self._num_experts)
        ]
        if any(part.bias is not None for parts in experts for part in parts):
            raise CheckpointError(f"{prefix}{self._prefix}: experts with biases are not served on a GPU")
        self._weights = keep_experts(experts, self._keeping)

    def forward(self, x: Tensor, tiles: ExpertTiles, *, is_by_token: bool) -> Tensor:
        """Return each row's product, [R, out]; x: [T, in] with `is_by_token`, else [R, in]."""
        return self._weights.apply(x, tiles, is_by_token=is_by_token)

    def project(self, x: Tensor, tiles: ExpertTiles, rows: RowTiles, lora: LoraBatch) -> tuple[Tensor, RowDelta | None]:
        """Return each row's product, and apart from it what adapters add; x: [R, in]; `rows`: those with adapters."""
        pages = lora.pages[self.index]
        if pages is None:
            return self.forward(x, tiles, is_by_token=False), None
        return row_delta(x, pages, rows, lambda: self.forward(x, tiles, is_by_token=False))


class TiledExperts:
    """All experts of a layer together. See `Experts`."""

    def __init__(
        self, build: Build, index: int, hidden_size: int, config: ExpertsConfig, activate: Callable[..., Tensor]
    ) -> None:
        """Those of the layer with that index."""
        up_parts, down_parts = config.part_sizes(hidden_size)
        prefix = f"layers.{index}.mlp.experts"
        self._up = TiledExpertLinear(build, prefix, hidden_size, up_parts, config.num_experts)
        self._down = TiledExpertLinear(build, prefix, config.inner_size, down_parts, config.num_experts)
        self._num_experts = config.num_experts
        self._num_chosen = config.num_chosen
        self._rescales = config.rescales
        self._activate = activate

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return self._up.num_bytes + self._down.num_bytes

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights from the checkpoint. Raises CheckpointError."""
        for linear in (self._up, self._down):
            linear.load(checkpoint, "model.")

    @property
    def linears(self) -> tuple[TiledExpertLinear, ...]:
        """The linears that adapters may change."""
        return self._up, self._down

    def forward(self, x: Tensor, scores: Tensor, lora: LoraBatch | None, addend: Tensor | None) -> Tensor:
        """Return what the chosen experts give, plus `addend`."""
        if lora is None or all(lora.pages[linear.index] is None for linear in self.linears):
            tiles = route_rows(scores, self._num_chosen, self._rescales)
            inner = self._activate(self._up.forward(x, tiles, is_by_token=True))
            out = sum_rows(self._down.forward(inner, tiles, is_by_token=False), tiles)
        else:
            out = self._forward_adapted(x, scores, lora)
        return out if addend is None else out + addend

    def _forward_adapted(self, x: Tensor, scores: Tensor, lora: LoraBatch) -> Tensor:
        token_tiles = lora.tiles
        assert token_tiles is not None
        tiles = route_rows(scores, self._num_chosen, self._rescales, token_tiles.row_slots)
        # Each tile of tokens is of one adapter, so an expert has at most as many runs of one adapter's rows.
        rows = adapter_tiles(tiles, len(token_tiles.starts) * self._num_experts)
        up, delta = self._up.project(x.index_select(0, tiles.tokens), tiles, rows, lora)
        down, delta = self._down.project(self._activate(up, delta), tiles, rows, lora)
        return sum_rows(down, tiles, delta)
