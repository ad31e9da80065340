"""The interpreter proves what a kernel computes; this, that the compiler takes it. Neither needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("compile_kernels.py")
H100 = "90"  # others by hand: 80 for an A100, 89 for an L4


def test_every_kernel_compiles_fits_and_spills_nothing_and_streams_by_wide_loads(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, SCRIPT, H100], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("FAULT")] == []
    assert len({line.split()[0] for line in lines}) == 32
