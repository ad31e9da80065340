"""The world that bench/gpu.py measures can be made and answers, so that the script is fit when a GPU is there."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton_interpreter import needs_interpreter

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu import watch
from gpu_checks import check_engine, check_kernels
from gpu_prefill import prefill_forms
from gpu_report import Report, Row
from gpu_run import LOST_CONTEXT, Bench
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
    rows = list(check_kernels(torch.device("cpu"), small=True))
    assert len(rows) > 20 and [row for row in rows if not row["ok"]] == []


@needs_interpreter
@pytest.mark.parametrize("own", [False, True])
def test_all_forms_of_a_prompts_linear_give_the_same(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETS", True)
    rows = prefill_forms(torch.device("cpu"), torch.float32, small=True, own=own)
    assert [row["adapters"] for row in rows] == [1, 3] and all(row["ok"] for row in rows)


def _bench(path: Path, *, resume: bool = False) -> Bench:
    return Bench(argparse.Namespace(interpret=True, budget=100.0, json=path, shape="tiny", resume=resume))


def test_a_part_that_fails_keeps_its_rows_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    bench = _bench(path)

    def broken() -> Iterator[Row]:
        yield {"ms": 2.0}
        raise RuntimeError("out of memory")

    bench.section("check", 1, lambda: [{"ok": False}])
    bench.section("broken", 1, broken)
    written = json.loads(path.read_text())
    assert written["wrong"] == ["check"] and "out of memory" in written["failed"]["broken"]
    bench.section("too long", 1000, broken)
    bench.section("last", 1, lambda: [{"ms": 1.5}])
    written = json.loads(path.read_text())
    assert written["tables"] == {"check": [{"ok": False}], "broken": [{"ms": 2.0}], "last": [{"ms": 1.5}]}
    assert [*written["left_out"]] == ["too long"] and "FAILED" in capsys.readouterr().out
    bench.deadline = 0.0
    assert bench.is_late("more rows") and [*bench.report.left_out][-1] == "more rows"


def test_a_resumed_run_does_only_the_parts_that_its_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    _bench(path).section("first", 1, lambda: [{"ms": 1.5}])
    left_out = _bench(path, resume=True)
    left_out.section("second", 1000, lambda: [{"ms": 2.5}])
    left_out.write()
    resumed = _bench(path, resume=True)
    for name in ("first", "second"):
        resumed.section(name, 1, lambda: [{"ms": 3.5}])
    assert resumed.report.tables == {"first": [{"ms": 1.5}], "second": [{"ms": 3.5}]}
    assert resumed.report.left_out == {}


def test_a_part_that_breaks_the_devices_context_ends_the_process_with_its_traceback_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    bench = _bench(path)
    bench.device = torch.device("cuda")

    def broken(*arguments: object) -> list[Row]:
        raise RuntimeError("an illegal memory access was encountered")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        bench.section("breaks", 1, broken)
    report = Report.read(path)
    assert left.value.code == LOST_CONTEXT and report.running == "breaks"
    assert "illegal memory access" in report.failed["breaks"]


LOSES_ITS_PROCESS = """
import os, sys
from pathlib import Path
from gpu_report import Report

path, arguments = Path(sys.argv[1]), sys.argv[2:]
assert arguments[:2] == ["--resume", "--budget"] and float(arguments[2]) <= 100
report = Report.read(path)
report.running = None if report.has("lost") else "lost"
report.tables["last" if report.has("lost") else "first"] = [{"ms": 1.5}]
report.write(path)
os._exit(0 if report.has("lost") else 9)
"""


def test_where_a_process_is_lost_to_a_part_another_does_the_parts_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    path.write_text("of an earlier run")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCH), *sys.path]))
    command = [sys.executable, "-c", LOSES_ITS_PROCESS, str(path)]
    assert watch(command, argparse.Namespace(budget=100.0, json=path, resume=False)) == 0
    report = Report.read(path)
    assert report.tables == {"first": [{"ms": 1.5}], "last": [{"ms": 1.5}]}
    assert report.failed == {"lost": "its process ended with 9"} and report.running is None


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
