"""The world that bench/gpu.py measures can be made and answers, so that the script is fit when a GPU is there."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import needs_interpreter

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu_checks import check_engine, check_kernels
from gpu_prefill import prefill_forms
from gpu_tables import Bench
from gpu_world import random_model

from loraplex_kernels import dispatch


def test_two_engines_over_the_same_random_weights_give_the_same_tokens() -> None:
    (row,) = check_engine(torch.device("cpu"), 1)
    assert row["ok"] and row["requests"] >= 1


def test_the_shape_for_quantised_figures_can_be_made() -> None:
    plain, packed = (random_model("tiny128", torch.float32, torch.device("cpu"), bits=bits) for bits in (None, 4))
    assert plain.lora_sites == packed.lora_sites and packed.num_bytes > 0


BENCH = Path(__file__).parents[3] / "bench"


@needs_interpreter
def test_the_checks_of_the_kernels_run_and_pass() -> None:
    rows = check_kernels(torch.device("cpu"), small=True)
    assert len(rows) > 20 and [row for row in rows if not row["ok"]] == []


@needs_interpreter
@pytest.mark.parametrize("own", [False, True])
def test_all_forms_of_a_prompts_linear_give_the_same(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    rows = prefill_forms(torch.device("cpu"), torch.float32, small=True, own=own)
    assert [row["adapters"] for row in rows] == [1, 3] and all(row["ok"] for row in rows)


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(interpret=True, budget=100.0, json=tmp_path / "gpu.json", shape="tiny")
    bench = Bench(options)

    def broken() -> list[dict[str, object]]:
        raise RuntimeError("an illegal memory access was encountered")

    bench.section("check", 1, lambda: [{"ok": False}])
    bench.section("broken", 1, broken)
    written = json.loads(options.json.read_text())
    assert written["wrong"] == ["check"] and "illegal memory access" in written["failed"]["broken"]
    bench.section("too long", 1000, broken)
    bench.section("last", 1, lambda: [{"ms": 1.5}])
    written = json.loads(options.json.read_text())
    assert written["tables"] == {"check": [{"ok": False}], "last": [{"ms": 1.5}]}
    assert "too long" in written["left_out"][0] and "FAILED" in capsys.readouterr().out
    bench.deadline = 0.0
    assert bench.is_late("more rows") and bench.left_out[-1].startswith("more rows")


WITHOUT_NUMBA = """
import gpu_packages
gpu_packages.do_without_numba()
import torch
from gpu_checks import check_engine
import numba
assert isinstance(numba, gpu_packages._Module)
(row,) = check_engine(torch.device("cpu"), 1)
print(row["ok"], row["requests"])
"""


def test_a_gpu_host_needs_no_numba() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), *sys.path])}
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == "True"
