"""Memory that a build may take: of the machine, within the limits of containers and of the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from framefusion.export import machine
from framefusion.runtime.machine import control_groups

resource = pytest.importorskip("resource")  # not on every system
MB = 1 << 20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 800 MB, whose kernel's files are in a folder."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path / "groups")
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 9999 kB\nMemAvailable:   {800 * 1024} kB\nHugePages_Total: 0\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(folder: Path, most: str, used: int, cached: int) -> None:
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{used * MB}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {cached * MB // 4}\nactive_file {cached * MB * 3 // 4}\n")


def version_1(folder: Path, most: int, used: int, cached: int) -> None:
    write(folder / "memory.limit_in_bytes", f"{most}\n")
    write(folder / "memory.usage_in_bytes", f"{used * MB}\n")
    write(folder / "memory.stat", f"inactive_file 7\ntotal_inactive_file {cached * MB}\ntotal_active_file 0\n")


def test_without_limits_it_is_what_the_machine_has(system: Path) -> None:
    assert machine.available_memory() == 800 * MB
    write(system / "proc" / "self" / "cgroup", "3:cpu,cpuacct:/a\n0::/a\n")
    version_2(system / "groups" / "a", "max", 100, 0)
    assert machine.available_memory() == 800 * MB


def test_a_group_counts_with_those_above_it(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "0::/above/ours\n")
    version_2(system / "groups" / "above" / "ours", str(700 * MB), 100, 50)
    assert machine.available_memory() == 650 * MB  # files in the cache are given back
    version_2(system / "groups" / "above", str(300 * MB), 250, 0)
    assert machine.available_memory() == 50 * MB
    version_2(system / "groups" / "above", str(300 * MB), 310, 0)
    assert machine.available_memory() == 0


def test_version_1_has_files_of_other_names(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "9:name=systemd:/\n4:memory:/ours\n0::/\n")
    version_1(system / "groups" / "memory", 9223372036854771712, 900, 0)  # no limit
    version_1(system / "groups" / "memory" / "ours", 500 * MB, 200, 20)
    assert machine.available_memory() == 320 * MB


def test_a_container_is_the_root_that_it_sees(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "4:memory:/docker/0a1b\n")
    version_1(system / "groups" / "memory", 400 * MB, 100, 0)
    assert machine.available_memory() == 300 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("limit", "kind"), [("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")])
def test_limits_of_the_process_count(limit: str, kind: str) -> None:
    number = getattr(resource, limit)
    before = resource.getrlimit(number)
    status = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))
    try:
        resource.setrlimit(number, (used + 300 * MB, before[1]))
        assert 200 * MB < machine.available_memory() <= 300 * MB
    finally:
        resource.setrlimit(number, before)
