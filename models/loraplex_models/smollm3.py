"""SmolLM3: Llama, some of whose layers have no rotary embedding."""

import torch
from torch import Tensor

from loraplex_models.decoder import CausalLM


class SmolLM3(CausalLM):
    """The shared decoder; those layers get angles of zero."""

    def _turn_layers(self, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        cos, sin = self._rotary.angles(positions)
        turned, unturned = (cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))
        flat = self.config.unturned_layers
        return [unturned if index in flat else turned for index in range(self.config.num_layers)]
