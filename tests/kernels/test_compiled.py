import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loraplex_kernels import warm_up
from loraplex_kernels.cpu import compiled
from loraplex_kernels.cpu.compiled import exp, floats, halves, jit, load, store

SCRIPT = """
import numba.core.caching
numba.core.caching.CompileResultCacheImpl._locator_classes = []  # no folder can be written
import torch
from loraplex_kernels.cpu.compiled import CAN_KEEP_CODE
from loraplex_kernels.norm import rms_norm
from loraplex_kernels.warm_up import compiling_notice
assert not CAN_KEEP_CODE
print(rms_norm(torch.full((1, 4), 2.0), torch.ones(4), 1e-5).tolist())
print(compiling_notice(torch.device("cpu")))
"""


@jit
def _copy_halves(source, size, target):
    numbers, copies = floats(source, size), halves(target, size)
    for i in range(size):
        copies[i] = store(numbers[i], copies[i])


@jit
def _copy_exp(source, size, target):
    numbers, results = floats(source, size), floats(target, size)
    for i in range(size):
        results[i] = exp(load(numbers[i]))


def test_kernels_run_where_compiled_code_cannot_be_kept() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[0.99999")
    assert "as at every start" in done.stdout


def test_a_first_start_says_that_it_compiles_and_where_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(warm_up, "kept_code_folder", lambda: tmp_path)
    assert str(tmp_path) in (warm_up.compiling_notice(cpu) or "")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "norm.rms_norm.nbi").write_bytes(b"")
    assert warm_up.compiling_notice(cpu) is None


def test_rounding_to_bfloat16_is_torchs() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    numbers = torch.from_numpy(bits.view(np.float32))
    ours = torch.empty(len(numbers), dtype=torch.bfloat16)
    _copy_halves(numbers.data_ptr(), len(numbers), ours.data_ptr())
    truth = numbers.bfloat16()
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours[~truth.isnan()], truth[~truth.isnan()])


@pytest.mark.parametrize(("low", "high"), [(-87.0, 88.0), (-1.0, 1.0)])
def test_exp_is_within_two_units_in_the_last_place(low: float, high: float) -> None:
    numbers = torch.linspace(low, high, 100_001)
    ours = torch.empty_like(numbers)
    _copy_exp(numbers.data_ptr(), len(numbers), ours.data_ptr())
    truth = numbers.double().exp()
    assert float(((ours.double() - truth) / truth).abs().max()) <= 2 * 2**-23


def test_kept_code_belongs_to_all_sources_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    shutil.copytree(Path(compiled.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "emit.py").write_text((folder / "emit.py").read_text() + "# another line\n")
    assert compiled.sources_digest(folder) != compiled.sources_digest(Path(compiled.__file__).parent)
    assert compiled.sources_digest(Path(compiled.__file__).parent) in _copy_exp._cache.cache_path
