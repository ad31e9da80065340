"""GPUs are counted as CUDA would show them, and only where the installed torch can use them."""

import pynvml
import pytest

from loraplex import gpus
from loraplex.gpus import Gpus, find_gpus

CUDA, NVIDIA = "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that shows four, a torch for CUDA, and nothing that hides them."""
    for name, answer in (("nvmlInit", None), ("nvmlShutdown", None), ("nvmlDeviceGetCount", 4)):
        monkeypatch.setattr(pynvml, name, lambda answer=answer: answer)
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0")
    for variable in (CUDA, NVIDIA):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 4),
        ({CUDA: "1,3"}, 2),
        ({CUDA: "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"}, 1),
        ({CUDA: ""}, 0),
        ({CUDA: "-1"}, 0),
        ({CUDA: "0,-1,2"}, 1),
        ({CUDA: "0,1,2,3,4,5"}, 4),
        ({NVIDIA: "all"}, 4),
        ({NVIDIA: "0, 1"}, 2),
        ({NVIDIA: "void"}, 0),
        ({CUDA: "2", NVIDIA: "all"}, 1),
    ],
)
def test_variables_hide_gpus_as_they_do_from_cuda(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_gpus() == Gpus(count)


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    monkeypatch.setenv(CUDA, "0")
    assert find_gpus() == Gpus()


def test_a_torch_for_the_cpu_leaves_gpus_unused_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "version", lambda _: "2.13.0+cpu")
    found = find_gpus()
    assert found.count == 0 and found.note is not None and "4 GPU visible" in found.note
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    assert find_gpus() == Gpus()
