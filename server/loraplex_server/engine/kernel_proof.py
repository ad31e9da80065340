"""Whether our kernels give right numbers on this kind of GPU: asked once, before a model is served by them."""

import hashlib
import logging
import time
from pathlib import Path

import torch

from loraplex_models.config import ModelConfig
from loraplex_quant.config import OnTheFly, QuantConfig
from loraplex_quant.gpu_groups import PACKED_BITS
from loraplex_server.engine.device import DeviceError

logger = logging.getLogger(__name__)


def prove_kernels(
    config: ModelConfig, quantization: QuantConfig | OnTheFly | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare the kernels with their plain torch twins on this GPU, for the sizes of `config`, a rank's part.

    What agreed is noted beside the kernels' compiled code, in Triton's cache, and not asked again until the kernels,
    torch, Triton, the kind of GPU or the sizes change. Raises DeviceError with the kernels that differ, or with the
    reason why one cannot run.
    """
    # Imports Triton, which machines without a GPU may lack.
    import triton
    from triton.errors import TritonError

    import loraplex_kernels
    from loraplex_kernels.self_check import ModelSizes, compare_kernels

    name = torch.cuda.get_device_name(device)
    bits = () if quantization is None or quantization.bits not in PACKED_BITS else (PACKED_BITS[quantization.bits],)
    sizes = ModelSizes(
        config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads, config.vocab_size, bits,
        has_experts=config.experts is not None,
    )  # fmt: skip
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    subject = (name, torch.cuda.get_device_capability(device), versions, dtype, sizes)
    note = _note(Path(loraplex_kernels.__file__).parent, repr(subject), Path(triton.knobs.cache.dir))
    if note.exists():
        return
    logger.info("first start of these kernels on %s: comparing each with plain torch", name)
    began = time.monotonic()
    try:
        found = list(compare_kernels(device, dtype, sizes))
    except (TritonError, RuntimeError) as error:
        raise DeviceError(
            f"--device cuda: on {name} with {versions} a kernel in {dtype} cannot run: {error}"
        ) from error
    torch.cuda.empty_cache()
    if wrong := [comparison for comparison in found if not comparison.is_near]:
        named = "; ".join(f"{one.kernel} by {one.error:.1e}, {one.limit:.0e} at most" for one in wrong)
        raise DeviceError(
            f"--device cuda: on {name} with {versions} kernels in {dtype} differ from plain torch: {named}. "
            "Another version of torch, or --device cpu, may serve; --no-check-kernels starts all the same"
        )
    logger.info("all %d comparisons agree, after %.0f s", len(found), time.monotonic() - began)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(f"{one.kernel}: {one.error:.1e}\n" for one in found))
    except OSError as error:
        logger.warning("%s cannot be written, so each start compares again: %s", note, error)


def _note(kernels: Path, subject: str, cache: Path) -> Path:
    hasher = hashlib.sha256(subject.encode())
    for source in sorted(kernels.rglob("*.py")):
        hasher.update(source.read_bytes())
    return cache / f"loraplex-agrees-{hasher.hexdigest()[:32]}.txt"
