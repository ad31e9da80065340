"""Collectives of several ranks, each a thread; and the end of one of them."""

from pathlib import Path

import pytest
import torch
from demo_server import free_port
from ranks import run_ranks

from loraplex_models.parallel import FIRST_BYTES, ParallelGroup, RanksLost

CPU = torch.device("cpu")


def test_one_rank_keeps_what_it_gives() -> None:
    group = ParallelGroup.join(0, 1, "nowhere", CPU)
    tensor = torch.arange(6.0).view(2, 3)
    assert group.all_reduce(tensor) is tensor and group.all_gather(tensor) is tensor
    assert group.gather_numbers([4, 2]) == [[4, 2]]
    group.send(b"nobody hears this")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_and_gathered_columns(tmp_path: Path, dtype: torch.dtype) -> None:
    def work(group: ParallelGroup) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.full((2, 2), 2.0**group.rank, dtype=dtype)
        with torch.inference_mode():
            gathered = group.all_gather(mine)
            return group.all_reduce(mine.clone()), gathered

    for total, gathered in run_ranks(3, tmp_path, work):
        assert torch.equal(total, torch.full((2, 2), 7, dtype=dtype))
        assert torch.equal(gathered, torch.tensor([[1, 1, 2, 2, 4, 4]] * 2, dtype=dtype))


SIZES = (0, 1, FIRST_BYTES - 8, FIRST_BYTES - 7, 3 * FIRST_BYTES + 5)


def test_messages_of_any_length_reach_every_rank_in_order(tmp_path: Path) -> None:
    messages = [bytes(place % 251 for place in range(size)) for size in SIZES]

    def work(group: ParallelGroup) -> list[bytes]:
        if group.rank > 0:
            return [group.receive() for _ in messages]
        for message in messages:
            group.send(message)
        return messages

    assert run_ranks(3, tmp_path, work) == [messages] * 3


def test_numbers_come_in_the_order_of_ranks(tmp_path: Path) -> None:
    found = run_ranks(3, tmp_path, lambda group: group.gather_numbers([group.rank, -(2**40) * group.rank]))
    assert found == [[[0, 0], [1, -(2**40)], [2, -(2**41)]]] * 3


def test_ranks_can_meet_at_an_address(tmp_path: Path) -> None:
    found = run_ranks(2, tmp_path, lambda group: group.gather_numbers([group.rank]), f"tcp://localhost:{free_port()}")
    assert found == [[[0], [1]]] * 2


def test_a_rank_that_goes_is_an_error_for_those_who_wait_for_it(tmp_path: Path) -> None:
    def work(group: ParallelGroup) -> str:
        if group.rank == 1:
            return ""  # its connections close with the last reference to the group
        with pytest.raises(RanksLost) as loss:
            group.all_reduce(torch.ones(3))
        return str(loss.value)

    assert run_ranks(2, tmp_path, work)[0]
