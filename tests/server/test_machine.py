from pathlib import Path

import pytest

from loraplex_server.machine import look_at_machine, quota_cores


@pytest.mark.parametrize(("quota", "cores"), [("max", None), ("-1", None), ("200000", 2), ("50000", 1)])
def test_a_containers_share_of_the_cores_is_whole_and_at_least_one(quota: str, cores: int | None) -> None:
    assert quota_cores(quota, "100000") == cores


VERSION_2 = {
    "cpu.max": "100000 100000\n",
    "memory.max": "1000000\n",
    "memory.current": "400000\n",
    "memory.stat": "anon 100000\nfile 310000\ninactive_file 200000\nactive_file 100000\nshmem 10000\n",
}
VERSION_1 = {
    "cpu/cpu.cfs_quota_us": "100000\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "memory/memory.limit_in_bytes": "1000000\n",
    "memory/memory.usage_in_bytes": "400000\n",
    "memory/memory.stat": "cache 310000\ninactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 100000\n",
}


def _write(cgroup: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (cgroup / name).parent.mkdir(exist_ok=True)
        (cgroup / name).write_text(text)


@pytest.mark.parametrize("files", [VERSION_2, VERSION_1], ids=["cgroup 2", "cgroup 1"])
def test_a_containers_limits_count_where_they_are_tighter_and_cached_files_are_free(
    files: dict[str, str], tmp_path: Path
) -> None:
    _write(tmp_path, files)
    machine = look_at_machine(tmp_path)
    assert (machine.num_cores, machine.memory_bytes) == (1, 900000)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {**VERSION_2, "cpu.max": "max 100000\n", "memory.max": "max\n"},
        {**VERSION_1, "cpu/cpu.cfs_quota_us": "-1\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"},
    ],
    ids=["no files", "cgroup 2", "cgroup 1"],
)
def test_without_limits_the_machine_is_what_it_is(files: dict[str, str], tmp_path: Path) -> None:
    _write(tmp_path, files)
    machine = look_at_machine(tmp_path)
    assert machine.num_cores == look_at_machine(tmp_path / "none").num_cores
    assert machine.memory_bytes > 1_000_000
