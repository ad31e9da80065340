"""The world that bench/gpu.py measures can be made and answers, so that the script is fit when a GPU is there."""

import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[3] / "bench"))
from gpu_checks import check_engine
from gpu_world import random_model


def test_two_engines_over_the_same_random_weights_give_the_same_tokens() -> None:
    (row,) = check_engine(torch.device("cpu"), 1)
    assert row["ok"] and row["requests"] >= 1


def test_the_shape_for_quantised_figures_can_be_made() -> None:
    plain, packed = (random_model("tiny128", torch.float32, torch.device("cpu"), bits=bits) for bits in (None, 4))
    assert plain.lora_sites == packed.lora_sites and packed.num_bytes > 0


BENCH = Path(__file__).parents[3] / "bench"
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
