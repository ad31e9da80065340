"""Which implementation an operation takes: gpu, else cpu, else reference, by the device of its tensors.

Triton is imported by the first call that takes a gpu form, so a machine without a GPU needs none of it.
"""

from torch import Tensor, device

# Tests set this to run whole models through Triton's interpreter: tensors of the CPU then take the gpu forms too.
# Triton itself must have been imported with TRITON_INTERPRET=1.
INTERPRETS = False


def on_gpu(tensor: Tensor) -> bool:
    """Whether operations on this tensor take their gpu form."""
    return tensor.is_cuda or INTERPRETS


def has_gpu_forms(where: device) -> bool:
    """Whether operations on tensors of that device take their gpu form."""
    return where.type == "cuda" or INTERPRETS
