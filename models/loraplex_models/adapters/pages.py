"""Rank pages: how adapters lie in device memory, what one takes there, and who has which page; no torch.

Linears that are fused into one (q, k and v; gate and up) are a class, every other linear is one by itself. A page holds
`PAGE_ROWS` ranks of one adapter for all layers of a class: for each layer the rows of A of every part, each `in` long,
then the same rows of B transposed, each as long as the outputs of all parts. So an adapter whose highest rank in a
class is r has ceil(r / 8) pages of it, and none of the classes that it leaves alone; nothing depends on the ranks of
other adapters. Rows beyond a module's own rank are never read. Scaling, and the gain of DoRA, are part of B. Kernels
find the layout in `loraplex_kernels.lora_pages`.

Pages lie in chunks. A chunk serves pages of one size only, side by side from its begin, and goes back to the pool with
its last page, so that memory never stays bound to one class. Vectors and full matrices that some adapters bring
(`dense`) are tensors of their own, in the same budget.

The allocator decides by numbers alone and always alike: rank 0 plans with one, and each rank that keeps pages follows
with its own and finds every page at the same place.
"""

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PAGE_ROWS = 8
# A chunk holds at least so many of the largest pages: what is left at its end is then a small share.
MIN_PAGES_PER_CHUNK = 4

# Modules of one kind, as `module_shapes` names it (or embed_tokens, lm_head), and their highest rank.
RankRows = tuple[str, int]
# The kinds that share a class; every other kind is one by itself.
CLASS_OF = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
}


def pages_for(rank: int) -> int:
    """Pages of a class for that rank."""
    return -(-rank // PAGE_ROWS)


def page_bytes(shapes: Mapping[str, tuple[int, int]], num_layers: int, itemsize: int) -> dict[str, int]:
    """The size of a page of each class, from the input and output size of each kind of module on this rank."""
    sizes: Counter[str] = Counter()
    for kind, (num_in, num_out) in shapes.items():
        sizes[CLASS_OF.get(kind, kind)] += num_layers * PAGE_ROWS * (num_in + num_out) * itemsize
    return dict(sizes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an adapter takes on a device: pages by their size in bytes, and the bytes of its dense tensors."""

    pages: dict[int, int]
    dense_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(size * count for size, count in self.pages.items()) + self.dense_bytes


def footprint(rank_rows: Iterable[RankRows], dense_elements: int, sizes: Mapping[str, int], itemsize: int) -> Footprint:
    """The footprint of an adapter; `sizes` are from `page_bytes`."""
    ranks: dict[str, int] = {}
    for kind, rank in rank_rows:
        name = CLASS_OF.get(kind, kind)
        ranks[name] = max(rank, ranks.get(name, 0))
    pages: Counter[int] = Counter()
    for name, rank in ranks.items():
        pages[sizes[name]] += pages_for(rank)
    return Footprint(dict(pages), dense_elements * itemsize)


@dataclass(slots=True)
class _Chunk:
    """Pages of one size; `free` are the numbers of its free pages, ascending."""

    page_size: int
    num_pages: int
    free: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Holding:
    """What one owner has: (chunk, page number) by page size, in the order they were given."""

    places: dict[int, list[tuple[int, int]]]
    footprint: Footprint


class PagePool:
    """The pages of one budget and their owners.

    `chunk_bytes` is at least MIN_PAGES_PER_CHUNK times the largest page (see `chunk_size`).
    """

    def __init__(self, budget_bytes: int, chunk_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.chunk_bytes = chunk_bytes
        self._chunks: dict[int, _Chunk] = {}
        self._free_numbers: list[int] = []  # of chunks given back, ascending; so the numbers stay small
        self._open: dict[int, set[int]] = {}  # by page size: the chunks with free pages
        self._num_free: Counter[int] = Counter()  # by page size
        self._dense_bytes = 0
        self._holdings: dict[str, _Holding] = {}
        self.used_bytes = 0  # what the owners take: pages and dense tensors

    @property
    def reserved_bytes(self) -> int:
        """What the budget has given: `used_bytes` and the free pages in chunks that are in use."""
        return len(self._chunks) * self.chunk_bytes + self._dense_bytes

    @property
    def owners(self) -> list[str]:
        """Who has pages."""
        return list(self._holdings)

    def bytes_of(self, owner: str) -> int:
        """What one owner takes; 0 if it has nothing."""
        holding = self._holdings.get(owner)
        return 0 if holding is None else holding.footprint.num_bytes

    def could_ever_hold(self, need: Footprint) -> bool:
        """Whether an empty pool has room for it."""
        chunks = sum(-(-count // self._pages_in_chunk(size)) for size, count in need.pages.items())
        return chunks * self.chunk_bytes + need.dense_bytes <= self.budget_bytes

    def can_hold(self, need: Footprint) -> bool:
        """Whether `allocate` would succeed now."""
        return self.reserved_bytes + self._missing_chunks(need) * self.chunk_bytes + need.dense_bytes <= (
            self.budget_bytes
        )

    def allocate(self, owner: str, need: Footprint) -> dict[int, list[tuple[int, int]]]:
        """Give an owner its pages: by page size the (chunk number, byte offset in it) of each, in a fixed order.

        `can_hold` holds, and the owner has nothing yet.
        """
        assert owner not in self._holdings, f"{owner} has its pages already"
        assert self.can_hold(need), f"{owner} does not fit"
        places = {size: self._take(size, count) for size, count in sorted(need.pages.items())}
        self._dense_bytes += need.dense_bytes
        self.used_bytes += need.num_bytes
        self._holdings[owner] = _Holding(places, need)
        return {size: [(chunk, page * size) for chunk, page in taken] for size, taken in places.items()}

    def free(self, owner: str) -> None:
        """Take back all that an owner has."""
        holding = self._holdings.pop(owner)
        self._dense_bytes -= holding.footprint.dense_bytes
        self.used_bytes -= holding.footprint.num_bytes
        for size, taken in holding.places.items():
            for number, page in taken:
                self._give_back(size, number, page)

    def check_integrity(self) -> None:
        """Assert that every page has at most one owner and every chunk some; for tests and idle moments."""
        held: Counter[tuple[int, int]] = Counter()
        for holding in self._holdings.values():
            for taken in holding.places.values():
                held.update(taken)
        assert all(count == 1 for count in held.values()), "a page has two owners"
        for number, chunk in self._chunks.items():
            mine = {page for chunk_number, page in held if chunk_number == number}
            assert mine and mine.isdisjoint(chunk.free), f"chunk {number} and its free pages do not agree"
            assert len(mine) + len(chunk.free) == chunk.num_pages, f"chunk {number} has lost pages"
            assert bool(chunk.free) == (number in self._open[chunk.page_size]), f"chunk {number} is listed wrongly"
        assert self.reserved_bytes <= self.budget_bytes, "the pool is over its budget"

    def _pages_in_chunk(self, size: int) -> int:
        assert size <= self.chunk_bytes, f"a page of {size} bytes is larger than a chunk of {self.chunk_bytes}"
        return self.chunk_bytes // size

    def _missing_chunks(self, need: Footprint) -> int:
        return sum(
            -(-max(count - self._num_free[size], 0) // self._pages_in_chunk(size)) for size, count in need.pages.items()
        )

    def _take(self, size: int, count: int) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        usable = self._open.setdefault(size, set())
        # Fullest chunks first: those that are nearly empty can become empty.
        for number in sorted(usable, key=lambda n: (len(self._chunks[n].free), n)):
            if len(taken) == count:
                break
            taken += self._take_from(number, count - len(taken))
        while len(taken) < count:
            # Without free numbers, those in use are 0 … len - 1.
            number = self._free_numbers.pop(0) if self._free_numbers else len(self._chunks)
            num_pages = self._pages_in_chunk(size)
            self._chunks[number] = _Chunk(size, num_pages, list(range(num_pages)))
            self._num_free[size] += num_pages
            usable.add(number)
            taken += self._take_from(number, count - len(taken))
        return taken

    def _take_from(self, number: int, count: int) -> list[tuple[int, int]]:
        chunk = self._chunks[number]
        pages = chunk.free[:count]
        del chunk.free[: len(pages)]
        self._num_free[chunk.page_size] -= len(pages)
        if not chunk.free:
            self._open[chunk.page_size].remove(number)
        return [(number, page) for page in pages]

    def _give_back(self, size: int, number: int, page: int) -> None:
        chunk = self._chunks[number]
        insort(chunk.free, page)
        self._num_free[size] += 1
        self._open[size].add(number)
        if len(chunk.free) == chunk.num_pages:
            self._num_free[size] -= chunk.num_pages
            self._open[size].remove(number)
            del self._chunks[number]
            insort(self._free_numbers, number)


def chunk_size(sizes: Mapping[str, int]) -> int:
    """Bytes of a chunk for pages of these sizes."""
    return MIN_PAGES_PER_CHUNK * max(sizes.values())
