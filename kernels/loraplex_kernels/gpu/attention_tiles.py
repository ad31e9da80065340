"""How many rows and keys a program of attention has before it: as many as fit, by what they compile to."""

from dataclasses import dataclass
from functools import lru_cache

import torch

H100_SHARED_BYTES = 227 * 1024


@dataclass(frozen=True, slots=True)
class ChunkTile:
    """What a program of `_chunks` has before it: rows are queries times the heads that share a key head."""

    rows: int
    keys: int
    warps: int


# The first that fits is taken: its queries, and keys and values twice, into a processor's shared memory. For sm_90 and
# heads of 128 in bfloat16 a warp has 603 instructions for the keys of a step in the first, and 385 for half of them in
# the second; products are those of a warp group (wgmma), copies take 16 bytes a thread, nothing spills.
CHUNK_TILES = (ChunkTile(128, 128, 8), ChunkTile(128, 64, 8), ChunkTile(64, 64, 8), ChunkTile(64, 32, 8))
# Products of float32 have no tensor cores, and in larger tiles no end of code.
FLOAT32_TILES = (ChunkTile(32, 64, 8), ChunkTile(16, 16, 4))
MOST_IN_REGISTERS = 160  # float32 of a thread that hold scores and what is gathered


def decode_keys(dims: int, item_bytes: int) -> int:
    """How many keys a decode takes in at a time, of heads that take `dims` numbers."""
    return 64 if dims <= 128 else 8192 // dims if item_bytes == 2 else 16


def chunk_tile(dims: int, item_bytes: int, device: torch.device) -> ChunkTile:
    """The tile of a chunk's programs, for heads that take `dims` numbers of `item_bytes`, on that device."""
    return fitting_tile(dims, item_bytes, _shared_bytes(device))


def fitting_tile(dims: int, item_bytes: int, shared_bytes: int) -> ChunkTile:
    """The same for programs that may have that much shared memory."""
    tiles = CHUNK_TILES if item_bytes == 2 else FLOAT32_TILES
    for tile in tiles:
        in_registers = tile.rows * (dims + tile.keys) // (tile.warps * 32)
        if item_bytes * dims * (tile.rows + 4 * tile.keys) + 2048 <= shared_bytes and in_registers <= MOST_IN_REGISTERS:
            return tile
    return tiles[-1]


@lru_cache
def _shared_bytes(device: torch.device) -> int:
    """What one program may have; in the interpreter and to compile for a GPU that is not here, an H100's."""
    if device.type != "cuda":
        return H100_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # missing in torch's stubs
