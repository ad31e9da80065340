"""KV blocks: allocate, free, find a prompt's cached head, and evict the oldest free block first.

Every block is in one of three states: held (ref_count > 0), free and cached (its content is still known by hash), or
free and blank. The free list is ordered: blank and oldest first, so a cached block lives as long as there is room.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b


@dataclass(slots=True)
class KVBlock:
    """A fixed run of KV cells. `block_hash` names its content once all of its cells are computed."""

    block_id: int
    ref_count: int = 0
    block_hash: bytes | None = None


def hash_block(parent: bytes, token_ids: Tokens[int]) -> bytes:
    """Name a full block by all that its keys and values depend on: `parent` and its own tokens.

    The first block's parent is `root_hash` of the adapter: two adapters give different keys and values for the same
    tokens, and a hit across them would be silently wrong.
    """
    return blake2b(array("q", token_ids).tobytes(), key=parent, digest_size=16).digest()


def root_hash(adapter_digest: str | None, cache_salt: str | None = None) -> bytes:
    """The parent of a sequence's first block: its adapter's content or the base, and who may share it."""
    name = adapter_digest or ""
    return blake2b((name if cache_salt is None else f"{name}\n{cache_salt}").encode(), digest_size=16).digest()


def activation_hash(parent: bytes, adapter_digest: str, position: int) -> bytes:
    """The parent of the first block that an adapter acts in, where the tokens before `position` are the base's.

    `parent` is the block before it, or the base's root. The position is part of the name: which occurrence of its
    invocation wakes an adapter depends on tokens that may come after the block.
    """
    return blake2b(f"{position}:{adapter_digest}".encode(), key=parent, digest_size=16).digest()


class BlockManager:
    """The owner of all KV blocks; knows nothing of sequences but their tokens and block ids."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._blocks = [KVBlock(block_id) for block_id in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, with those kept for prefix hits."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, block_hashes: list[bytes]) -> list[int]:
        """Hold the cached blocks of the longest known head, in order; `block_hashes` name a prompt's full blocks."""
        found: list[int] = []
        for block_hash in block_hashes:
            block_id = self._cached.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        for block_id in found:
            self._hold(self._blocks[block_id])
        return found

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blank blocks; evicts the oldest cached ones. The caller has looked at `num_free`."""
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in taken:
            block = self._blocks[block_id]
            self._forget(block)
            block.ref_count = 1
        return taken

    def commit(self, block_hash: bytes, block_id: int) -> None:
        """Make a block whose cells are all computed findable.

        Where another block already has that content, this one stays private to its sequence.
        """
        if self._prefix_caching and block_hash not in self._cached:
            self._blocks[block_id].block_hash = block_hash
            self._cached[block_hash] = block_id

    def free(self, block_ids: Tokens[int]) -> None:
        """Give back one hold on each; a sequence's last blocks will be evicted before its first."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} is given back twice"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.block_hash is None:
                    self._free.move_to_end(block_id, last=False)

    def check_integrity(self) -> None:
        """Assert that every block is in exactly one state; for tests and idle moments."""
        for block in self._blocks:
            assert (block.ref_count == 0) == (block.block_id in self._free), block
            assert block.block_hash is None or self._cached.get(block.block_hash) == block.block_id, block
        assert all(self._blocks[block_id].block_hash == name for name, block_id in self._cached.items())

    def _hold(self, block: KVBlock) -> None:
        if block.ref_count == 0:
            del self._free[block.block_id]
        block.ref_count += 1

    def _forget(self, block: KVBlock) -> None:
        if block.block_hash is not None:
            del self._cached[block.block_hash]
            block.block_hash = None
