"""What bench/gpu.py needs of a host that has torch, Triton and numpy: our packages' folders, and no numba.

Our CPU kernels are compiled by numba, whose llvmlite (60 MB) a GPU host may lack. A run that measures a GPU needs them
for nothing but to be imported: `prepare` then puts modules in their place that are only names, and operations of the
CPU take their plain torch forms, which are the truth that the checks compare with.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDERS = ("launcher", "server", "models", "quant", "kernels")
ABSENT = ("numba", "llvmlite")


class _Anything(type):
    """A class whose every attribute and instance is such a class: enough to define code that is never called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name

    def __call__(cls, *arguments: Any, **settings: Any) -> Any:
        return Name


class Name(metaclass=_Anything):
    """Stands for any name of an absent package."""


def _decorator(*arguments: Any, **settings: Any) -> Any:
    """As numba's decorators, with arguments or without; numba, too, refuses a cache where it has none."""
    if settings.get("cache"):
        raise RuntimeError("no cache: numba is not installed")
    return (lambda function: function) if settings or not callable(arguments[0]) else arguments[0]


def _overload(*arguments: Any, **settings: Any) -> Callable[[Any], Any]:
    return lambda function: function


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"njit": _decorator, "intrinsic": _decorator, "overload": _overload}.get(name, Name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to run."""


def prepare() -> None:
    """Make our packages importable; to be called before the first of them is imported."""
    sys.path[:0] = [str(ROOT / folder) for folder in FOLDERS if str(ROOT / folder) not in sys.path]
    if not all(importlib.util.find_spec(name) for name in ABSENT):
        do_without_numba()


def do_without_numba() -> None:
    """Put names in numba's place, and have nothing compiled for the CPU."""
    sys.meta_path.insert(0, _Finder())
    from loraplex_kernels.cpu import compiled  # once its needs can be met

    compiled.COMPILED_DTYPES = ()
    print("without numba: what runs on the CPU takes plain torch", file=sys.stderr)
