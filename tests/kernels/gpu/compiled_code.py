"""What the compiler made of a kernel: registers, spills, shared memory, widths of loads, products of tensor cores."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

# "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, ..." copies 16 bytes on their way to shared memory.
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^\]]*\], (0x[0-9a-f]+|\d+)")
_LOAD = re.compile(r"ld\.global(?:\.[a-z0-9:_]+)*?(?:\.v(\d))?\.[busf](\d+)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


MAX_SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
# Kernels that take most of a step's bytes must take 16 of them at once.
STREAMING = {
    "_multiply", "_multiply_experts", "_widen", "_shrink", "_expand", "_decode", "_chunks", "_add_norm", "_activate",
    "_square", "_choose", "_copy_scores", "_temper", "_draw", "_given_tokens",
}  # fmt: skip
# Loads of single 16-bit numbers that are known: a scale and a zero for each output of a tile; one logit; pairs of
# neighbours that are turned, of which a thread holds the two sides apart; the newest key and value of a decode, its
# angles, deltas and norms, of which a thread has one number each; and where a delta is added by a kernel of its own, up
# to a column that is read from memory.
SINGLE_NUMBERS = {"_multiply": 2, "_given_tokens": 1, "_rotate_and_store": 12, "_decode": 12, "_add": 8}


@dataclass(frozen=True, slots=True)
class CompiledCode:
    """One variant of a kernel."""

    name: str
    num_warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread: what did not fit into registers, or is indexed, and lies in local memory
    shared_bytes: int
    loads: Counter[int]  # by the bytes that a thread takes at once from global memory: how many in the code
    product: str  # wgmma (four warps together, Hopper), mma (a warp), or none

    def __str__(self) -> str:
        loads = " ".join(f"{width}Bx{count}" for width, count in sorted(self.loads.items(), reverse=True))
        return (
            f"{self.name:20} {self.num_warps} warps {self.registers:3} regs {self.spilled_bytes:4} spilled"
            f" {self.shared_bytes:6} shared {self.product:5} {loads}"
        )


def faults(code: CompiledCode, capability: int, rows: int) -> list[str]:
    """What is slow or does not fit; `rows`: of a tile that tensor cores multiply, 0 where a kernel multiplies none."""
    found = []
    if code.shared_bytes > MAX_SHARED_BYTES[capability]:
        found.append(f"needs {code.shared_bytes} bytes of shared memory")
    if code.spilled_bytes:
        found.append(f"spills {code.spilled_bytes} bytes a thread")
    if code.loads[2] > SINGLE_NUMBERS.get(code.name, 0):
        found.append(f"has {code.loads[2]} loads of 2 bytes")
    if code.name in STREAMING and max(code.loads) < 16 and code.loads:
        found.append(f"loads no more than {max(code.loads)} bytes at once")
    if rows and code.product == "-":
        found.append("multiplies without tensor cores")
    if capability == 90 and rows >= 64 and code.product != "wgmma":
        found.append(f"multiplies {rows} rows by {code.product} instead of wgmma")
    return found


def read_code(name: str, compiled: Any) -> CompiledCode:
    """Read a kernel that Triton compiled but did not load: its PTX, and its binary's own account of what it uses."""
    ptx = compiled.asm["ptx"]
    loads = Counter(int(width, 0) for width in _COPY.findall(ptx))
    for vector, bits in _LOAD.findall(ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    registers, stack, local = _usage(compiled.asm["cubin"])
    product = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "-"
    return CompiledCode(
        name, compiled.metadata.num_warps, registers, stack + local, compiled.metadata.shared, loads, product
    )


def _usage(binary: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        found = _USAGE.search(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found is not None
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
