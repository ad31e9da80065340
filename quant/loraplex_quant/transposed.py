"""Plain weights that a checkpoint stores as [in, out], as GPT-2's do."""

from torch import Tensor

from loraplex_quant.method import FLOATS, StoredLinear


class Transposed:
    """See `WeightFormat`."""

    def is_quantized(self, stored: StoredLinear) -> bool:
        """Whether this linear is there, and so in this form."""
        return "weight" in stored

    def read(self, stored: StoredLinear, in_size: int, out_size: int) -> Tensor:
        """Return the weight [out, in]."""
        return stored.take("weight", (in_size, out_size), FLOATS).t().contiguous()
