"""A linear layer that may fuse several linears of the checkpoint, and adds the deltas of the batch's adapters."""

from collections.abc import Mapping

from torch import Tensor

from loraplex_kernels.lora import lora_expand, lora_shrink
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.forward import LoraBatch
from loraplex_quant.method import QuantMethod


class Linear:
    """One product for all the linears that read the same input, their outputs side by side.

    `parts` are the fused linears in order: module name (`layers.0.self_attn.q_proj`) → output size. `index` is the
    layer's place in `LoraBatch.tables`.
    """

    def __init__(self, index: int, in_size: int, parts: Mapping[str, int], method: QuantMethod) -> None:
        self.index = index
        self.in_size = in_size
        self.parts = dict(parts)
        self._method = method

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weight."""
        return self._method.num_bytes

    def load(self, checkpoint: Checkpoint, prefix: str) -> None:
        """Take the weights of the parts, named `<prefix><module>.<suffix>`, from the checkpoint."""
        self._method.finish_load([self._take(checkpoint, prefix + module, size) for module, size in self.parts.items()])

    def forward(self, x: Tensor, lora: LoraBatch | None, addend: Tensor | None = None) -> Tensor:
        """Return x @ weight.T, plus the bias, plus `addend`, plus each token's adapter delta. x: [T, in]."""
        out = self._method.apply(x, addend)
        table = None if lora is None else lora.tables[self.index]
        if lora is not None and table is not None:
            lora_expand(lora_shrink(x, table, lora.segments), table, lora.segments, out)
        return out

    def _take(self, checkpoint: Checkpoint, name: str, out_size: int) -> dict[str, Tensor]:
        """The tensors of one part; a weight that is quantised becomes a plain one of the model's dtype."""
        stored = checkpoint.linear(name)
        specs = {spec.suffix: spec for spec in self._method.create_weights(self.in_size, out_size)}
        weight = stored.dequantize(self.in_size, out_size)
        if weight is None:
            return {suffix: stored.take(suffix, spec.shape) for suffix, spec in specs.items()}
        tensors = {"weight": weight.to(specs["weight"].dtype)}
        if "bias" in specs or "bias" in stored:
            bias = stored.take("bias", (out_size,))
            # AutoGPTQ writes a bias of zeros for every linear that has none.
            if "bias" in specs or bool(bias.any()):
                tensors["bias"] = bias
        return tensors
