"""Which device a rank computes on, and whether it can."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from loraplex_server.config import EngineConfig


class DeviceError(Exception):
    """The device cannot be used; the message says why and what to do."""


def resolve_device(name: str) -> str:
    """«auto» is the GPU where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of one rank: on GPUs, those of a machine in order. Raises DeviceError."""
    name = resolve_device(config.device)
    if name != "cuda":
        return torch.device(name)
    index = rank % config.num_local_ranks
    _check_gpu(index)
    _check_compiler()
    return torch.device(name, index)


def _check_gpu(index: int) -> None:
    if torch.version.cuda is None:
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} is built without CUDA; install a build with it, or --device cpu"
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} finds no GPU: see that nvidia-smi shows one with a driver for "
            f"CUDA {torch.version.cuda}, and that a container is started with --gpus; or --device cpu"
        )
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"--device cuda: rank {index} of this machine has no GPU, {count} visible: see --num-shard")


def _check_compiler() -> None:
    """Triton builds a small library of its own, for each kernel on its first use, with a C compiler."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise DeviceError("--device cuda: Triton needs a C compiler for its kernels: install gcc, or name one in CC")
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme is for what is installed beside its packages; the headers lie where the other says.
    headers = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
    if not (headers / "Python.h").is_file():
        raise DeviceError(f"--device cuda: Triton needs Python's headers (python3-dev): no Python.h in {headers}")
