from pathlib import Path

import pytest

from loraplex_server.machine import look_at_machine, quota_cores


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [([], None), (["max", "100000"], None), (["200000", "100000"], 2), (["50000", "100000"], 1)],
)
def test_a_containers_share_of_the_cores_is_whole_and_at_least_one(cpu_max: list[str], cores: int | None) -> None:
    assert quota_cores(cpu_max) == cores


def test_a_containers_limits_count_where_they_are_tighter(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    machine = look_at_machine(tmp_path)
    assert (machine.num_cores, machine.memory_bytes) == (1, 600000)


def test_without_limits_the_machine_is_what_it_is(tmp_path: Path) -> None:
    machine = look_at_machine(tmp_path)
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 0
