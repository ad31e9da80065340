"""A linear layer that may fuse several linears of the checkpoint, and adds the deltas of the batch's adapters."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from loraplex_kernels.lora import Deltas, add_deltas
from loraplex_kernels.lora_pages import RowDelta, add_rows, row_delta
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.forward import LoraBatch
from loraplex_quant.method import ALL_ROWS, LinearWeight, QuantMethod


class Linear:
    """One product for all the linears that read the same input, their outputs side by side.

    `parts` are the fused linears in order: module name (`layers.0.self_attn.q_proj`) → output size. `index` is the
    layer's place in `LoraBatch.tables`.
    """

    _method: QuantMethod  # from `load` on

    def __init__(
        self,
        index: int,
        in_size: int,
        parts: Mapping[str, int],
        has_bias: bool,
        keep: Callable[[Sequence[LinearWeight]], QuantMethod],
    ) -> None:
        """`keep` says in which form the weights are kept: a method of `Keeping`."""
        self.index = index
        self.in_size = in_size
        self.parts = dict(parts)
        self._has_bias = has_bias
        self._keep = keep

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight."""
        return self._method.num_bytes

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Take the weights of the parts, named `<prefix><module>.<suffix>`, from the checkpoint."""
        weights = [
            checkpoint.linear(prefix + module).read(self.in_size, size, self._has_bias)
            for module, size in self.parts.items()
        ]
        self._method = self._keep(weights)

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        """Return the weight [sum of the parts' sizes, in], or some rows, in float32; not for every step."""
        return self._method.dequantize(rows)

    def bias(self) -> Tensor | None:
        """Return the bias [sum of the parts' sizes] in float32, None where there is none; not for every step."""
        found = self._method.bias
        return None if found is None else found.float()

    def forward(self, x: Tensor, lora: LoraBatch | None, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T, plus the bias, plus `addend`, plus each token's adapter delta. x: [T, in]."""
        if lora is None:
            return self._method.apply(x, addend)
        if lora.tiles is not None:
            return self._forward_paged(x, lora, addend)
        table = lora.tables[self.index]
        deltas = None if table is None else Deltas(table, lora.segments)
        extras = None if lora.extras is None else lora.extras[self.index]
        if extras is None:
            return self._method.apply(x, addend, deltas)
        out = self._method.apply(x)
        extras.apply(out, lora.segments)
        if addend is not None:
            out += addend
        if deltas is not None:
            add_deltas(x, deltas, out)
        return out

    def project(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, RowDelta | None]:
        """Return the product, and apart from it what adapters in rank pages add, for the operation that reads both."""
        return self._project(x, lora)

    def _project(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, RowDelta | None]:
        pages = None if lora is None else lora.pages[self.index]
        if lora is None or lora.tiles is None or pages is None:
            return self._method.apply(x), None
        return row_delta(x, pages, lora.tiles, lambda: self._method.apply(x))

    def _forward_paged(self, x: Tensor, lora: LoraBatch, addend: Tensor | None) -> Tensor:
        out, delta = self._project(x, lora)
        extras = None if lora.extras is None else lora.extras[self.index]
        if extras is not None:
            extras.apply(out, lora.segments)
        if delta is not None:
            add_rows(out, delta)
        return out if addend is None else out + addend
