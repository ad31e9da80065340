"""The MLP of a layer: up, activation, down."""

from collections.abc import Callable

from torch import Tensor

from loraplex_kernels.lora_pages import RowDelta
from loraplex_models.checkpoint import Checkpoint
from loraplex_models.forward import LoraBatch
from loraplex_models.layers.linear import Linear


class MLP:
    """Two linears with an activation between, gated or plain; the first may fuse gate and up."""

    def __init__(self, up: Linear, activate: Callable[..., Tensor], down: Linear) -> None:
        self.linears: tuple[Linear, ...] = (up, down)
        self._up = up
        self._activate = activate
        self._down = down

    @property
    def num_bytes(self) -> int:
        """Size of the loaded weights."""
        return self._up.num_bytes + self._down.num_bytes

    def load(self, checkpoint: Checkpoint) -> None:
        """Take the weights from the checkpoint."""
        for linear in self.linears:
            linear.load(checkpoint, "model.")

    def project(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, RowDelta | None]:
        """As `forward`, with the delta of the last linear left to the operation that reads it."""
        gate_up, delta = self._up.project(x, lora)
        return self._down.project(self._activate(gate_up, delta), lora)

    def forward(self, x: Tensor, lora: LoraBatch | None, addend: Tensor | None = None) -> Tensor:
        """Return what the MLP gives for x [T, hidden], plus `addend`."""
        return self._down.forward(self._activate(self._up.forward(x, lora)), lora, addend)
