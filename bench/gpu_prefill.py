"""Forms in which a prompt's linear can get its adapters' part, on one linear at a time: which is the fastest.

The engine's form is the side stream: it leaves the product to the library's GEMM and hides most of the adapters' bytes
under it, and `bench/README.md` has what was measured of prototypes. Here all forms do the same work, on fresh numbers,
and each is compared with the sums in float32. SiLU stands for the kernel that reads the output next, so that a form
which leaves the adding to that kernel pays for what it reads there, and for no more.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from gpu_fused import activate_and_add, product_and_delta
from torch import Tensor

from loraplex_kernels.activation import silu
from loraplex_kernels.lora_pages import (
    PAGE_RANKS,
    PREFILL_TILE_ROWS,
    LinearPages,
    RankPages,
    expand_rows,
    make_tiles,
    row_delta,
    shrink_rows,
    write_pages,
)
from loraplex_kernels.lora_pages import RowDelta as Delta
from loraplex_kernels.streams import beside

RANK = 16
REPEATS = 10
GEMM_TILE_ROWS = 128
# Input size and parts of an 8B model's linears; `small`: for the interpreter.
LINEARS = {"qkv": (4096, (4096, 1024, 1024)), "gate and up": (4096, (14336, 14336)), "down": (14336, (4096,))}
SMALL_LINEARS = {"qkv": (32, (32, 16, 16))}


Form = Callable[[], Tensor]


class Work:
    """One linear, a prompt's rows, and equal shares of them for each adapter."""

    def __init__(
        self, in_size: int, parts: tuple[int, ...], num_rows: int, num_adapters: int, dtype: torch.dtype, device: Any
    ) -> None:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float32, device=device).mul_(shape[-1] ** -0.5).to(dtype)

        self.parts, self.num_parts = parts, len(parts)
        self.x = torch.randn(num_rows, in_size, dtype=torch.float32, device=device).to(dtype)
        self.weight = numbers(sum(parts), in_size)
        self.a = [numbers(self.num_parts * RANK, in_size) for _ in range(num_adapters)]
        self.b = [[numbers(size, RANK) for size in parts] for _ in range(num_adapters)]
        borders = [num_rows * index // num_adapters for index in range(num_adapters + 1)]
        self.segments = list(itertools.pairwise(borders))
        self.tiles, self.high_tiles = (
            make_tiles(borders, range(num_adapters), rows, device) for rows in (PREFILL_TILE_ROWS, GEMM_TILE_ROWS)
        )
        self.pages = self._pages(in_size, dtype, device)
        self.no_pages = replace(self.pages, ranks=torch.zeros_like(self.pages.ranks))
        self.no_ranks = shrink_rows(self.x, self.no_pages, self.tiles)
        width = self.num_parts * RANK
        self.extended_x = torch.zeros(num_rows, in_size + num_adapters * width, dtype=dtype, device=device)
        self.extended_weight = torch.zeros(sum(parts), in_size + num_adapters * width, dtype=dtype, device=device)
        self.extended_x[:, :in_size] = self.x
        self.extended_weight[:, :in_size] = self.weight
        for index, columns in enumerate(self.b):
            row = 0
            for part, b in enumerate(columns):
                start = in_size + index * width + part * RANK
                self.extended_weight[row : row + len(b), start : start + RANK] = b
                row += len(b)

    def _pages(self, in_size: int, dtype: torch.dtype, device: Any) -> LinearPages:
        blocks: list[Tensor] = []
        places: dict[int, dict[tuple[int, int], tuple[int, list[int]]]] = {}
        end = 0
        for slot, (a, columns) in enumerate(zip(self.a, self.b, strict=True)):
            for part, b in enumerate(columns):
                pages = torch.zeros(RANK // PAGE_RANKS, PAGE_RANKS * (in_size + len(b)), dtype=dtype, device=device)
                write_pages(pages, a[part * RANK : (part + 1) * RANK], b)
                starts = [end + page * pages.shape[1] for page in range(len(pages))]
                places.setdefault(slot, {})[0, part] = (RANK, starts)
                blocks.append(pages.flatten())
                end += pages.numel()
        tables = RankPages(torch.cat(blocks), [(in_size, self.parts)], num_slots=len(self.a), max_rank=RANK)
        for slot, modules in places.items():
            tables.put_rows(slot, tables.rows(modules))
        return tables.linear(0)

    def product(self) -> Tensor:
        """The base's part alone."""
        return torch.nn.functional.linear(self.x, self.weight)

    def base(self) -> Tensor:
        """Without adapters."""
        return silu(self.product())

    def side_stream(self) -> Tensor:
        """Shrink and expand under the product, the adding left to what reads the output: the engine's form."""
        return silu(*row_delta(self.x, self.pages, self.tiles, self.product))

    def in_line(self) -> Tensor:
        """The same kernels behind the product."""
        out = self.product()
        values = torch.empty_like(out)
        expand_rows(shrink_rows(self.x, self.pages, self.tiles), self.pages, self.tiles, values)
        return silu(out, Delta(values, self.pages, self.tiles))

    def onto_delta(self) -> Tensor:
        """The same kernels before the product, which the library's GEMM adds to what they have written."""
        out = self.x.new_empty(len(self.x), len(self.weight))
        expand_rows(shrink_rows(self.x, self.pages, self.tiles), self.pages, self.tiles, out)
        return silu(out.addmm_(self.x, self.weight.t()))

    def in_consumer(self) -> Tensor:
        """Shrink under the product, expand inside of what reads the output."""
        with beside(self.x) as side:
            with side:
                h = shrink_rows(self.x, self.pages, self.tiles)
            out = self.product()
        activate_and_add(out, h, self.pages, self.tiles)
        return out

    def epilogue(self) -> Tensor:
        """Shrink before a product of our own, which expands into its output before it writes it."""
        h = shrink_rows(self.x, self.pages, self.tiles)
        return silu(product_and_delta(self.x, self.weight, h, self.pages, self.high_tiles))

    def own_product(self) -> Tensor:
        """The same product without adapters: what it loses to the library's."""
        return silu(product_and_delta(self.x, self.weight, self.no_ranks, self.no_pages, self.high_tiles))

    def by_segment(self) -> Tensor:
        """Two of the library's products for each adapter and part, the second into the output."""
        out = self.product()
        for (start, stop), a, columns in zip(self.segments, self.a, self.b, strict=True):
            ranks = self.x[start:stop] @ a.t()
            column = 0
            for part, b in enumerate(columns):
                target = out[start:stop, column : column + len(b)]
                target.addmm_(ranks[:, part * RANK : (part + 1) * RANK], b.t())
                column += len(b)
        return silu(out)

    def wider_product(self) -> Tensor:
        """One product whose inputs go on with the ranks: weights stand beside B, and inputs have room for ranks."""
        in_size, width = self.x.shape[1], self.num_parts * RANK
        for index, ((start, stop), a) in enumerate(zip(self.segments, self.a, strict=True)):
            first = in_size + index * width
            torch.mm(self.x[start:stop], a.t(), out=self.extended_x[start:stop, first : first + width])
        return silu(torch.nn.functional.linear(self.extended_x, self.extended_weight))

    def truth(self, *, has_adapters: bool) -> Tensor:
        """In float32."""
        out = self.x.float() @ self.weight.float().t()
        if not has_adapters:
            return torch.nn.functional.silu(out)
        for (start, stop), a, columns in zip(self.segments, self.a, self.b, strict=True):
            parts = (self.x[start:stop].float() @ a.float().t()).split(RANK, 1)
            out[start:stop] += torch.cat([h @ b.float().t() for h, b in zip(parts, columns, strict=True)], 1)
        return torch.nn.functional.silu(out)


def prefill_forms(device: torch.device, dtype: torch.dtype, *, small: bool, own: bool = False) -> list[dict[str, Any]]:
    """Milliseconds of each form, by linear and number of adapters; `own`: of those that need kernels for this alone."""
    rows: list[dict[str, Any]] = []
    num_rows, counts = (70, (1, 3)) if small else (8192, (1, 4, 16))
    limit = 1e-4 if dtype is torch.float32 else 3e-2
    with torch.inference_mode():
        for name, (in_size, parts) in (SMALL_LINEARS if small else LINEARS).items():
            for count in counts:
                work = Work(in_size, parts, num_rows, count, dtype, device)
                without: list[Form] = [work.base, work.own_product] if own else [work.base]
                others: list[Form] = [work.in_line, work.onto_delta, work.by_segment, work.wider_product]
                with_adapters = [work.side_stream, *([work.in_consumer, work.epilogue] if own else others)]
                row: dict[str, Any] = {"linear": name, "adapters": count}
                errors = []
                for forms, has_adapters in ((without, False), (with_adapters, True)):
                    truth = work.truth(has_adapters=has_adapters)
                    errors += [float((form().float() - truth).abs().max() / truth.abs().max()) for form in forms]
                    row |= {f"{form.__name__} ms": _median_ms(form, device) for form in forms}
                rows.append(row | {"error": max(errors), "ok": max(errors) <= limit})
    return rows


def _median_ms(form: Form, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        form()
        return (time.perf_counter() - began) * 1e3
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        form()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times[2:])
