"""Several ranks of one model, each a thread of this process: what tensor parallelism is tested on."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch

from loraplex_models.parallel import ParallelGroup

MEETING_S = 300  # kernels may have to be compiled
T = TypeVar("T")


def run_ranks(size: int, folder: Path, work: Callable[[ParallelGroup], T], rendezvous: str | None = None) -> list[T]:
    """Run `work` on every rank of a group that meets in `folder`; returns what each gave, or raises the first error."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    rendezvous = rendezvous or f"file://{folder}/ranks-{uuid4()}"

    def run(rank: int) -> None:
        try:
            results[rank] = work(ParallelGroup.join(rank, size, rendezvous, torch.device("cpu")))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(MEETING_S)
        if errors:
            raise errors[0]
        assert not thread.is_alive(), f"a rank of {size} waits for the others"
    return [results[rank] for rank in range(size)]
