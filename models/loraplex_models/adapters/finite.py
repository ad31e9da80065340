"""Whether an adapter's weights are finite numbers, found out without torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from loraplex_models.adapters.manifest import WEIGHTS_FILE, ManifestError, open_adapter_file
from loraplex_models.adapters.refusal import shown
from loraplex_models.adapters.tensor_header import read_tensor_header

# Elements looked at in one piece: a piece and its mask stay in a core's cache.
PIECE_BYTES = 2**18

# Of each dtype: an unsigned integer of its size, and the bits that are all ones in NaN and infinity, nowhere else.
# (E4M3 has no infinity, and its only NaN has all bits but the sign.)
_PATTERNS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("<u1", 0x7F),
    "F8_E5M2": ("<u1", 0x7C),
}


def check_finite(folder: str | Path, keep_going: Callable[[], None] = lambda: None) -> None:
    """Raise ManifestError naming the first tensor that has a NaN or an infinity.

    `keep_going` is called between pieces and may raise to end a check that nobody waits for any more.
    """
    with open_adapter_file(Path(folder) / WEIGHTS_FILE) as (file, file_bytes):
        tensors = read_tensor_header(file, file_bytes).tensors
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            pattern = _PATTERNS.get(tensor.dtype)
            if pattern is None:
                continue
            dtype, mask = pattern
            file.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left > 0:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise ManifestError(f"{WEIGHTS_FILE} became shorter while it was read: load the adapter again")
                left -= len(piece)
                bits = np.frombuffer(piece, dtype=dtype)
                if ((bits & mask) == mask).any():
                    raise ManifestError(
                        f"tensor {shown(name)} has values that are not finite (NaN or infinity): the training went"
                        " wrong; save an earlier checkpoint"
                    )
            keep_going()
