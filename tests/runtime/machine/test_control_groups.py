"""Cores that a container's limits leave a process, from the files of both versions of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from framefusion.runtime.machine import control_groups, cpu


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of eight cores with two threads each, whose kernel's files are in a folder."""
    monkeypatch.setattr(control_groups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(cpu, "physical_cores", lambda: min(8, len(os.sched_getaffinity(0))))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_1(folder: Path, quota: int, period: int = 100_000) -> None:
    write(folder / "cpu.cfs_quota_us", f"{quota}\n")
    write(folder / "cpu.cfs_period_us", f"{period}\n")


def test_without_limits_cores_are_those_of_the_machine(system: Path) -> None:
    assert control_groups.cores_of_quota() is None  # no control groups at all
    write(system / "proc/self/cgroup", "4:memory:/a\n1:cpu,cpuacct:/a\n0::/a\n")
    write(system / "groups/a/cpu.max", "max 100000\n")
    version_1(system / "groups/cpu/a", -1)
    assert control_groups.cores_of_quota() is None
    assert (cpu.available_cores(), cpu.default_threads()) == (16, 0)


@pytest.mark.parametrize(
    ("quota", "cores", "threads"),
    [("50000", 1, 1), ("150000", 2, 2), ("200000", 2, 2), ("1200000", 12, 8), ("1600000", 16, 0)],
)
def test_a_quota_counts_in_whole_cores(system: Path, quota: str, cores: int, threads: int) -> None:
    """A thread for each, and no more than for each physical core; one of the whole machine leaves it to the library."""
    write(system / "proc/self/cgroup", "0::/ours\n")
    write(system / "groups/ours/cpu.max", f"{quota} 100000\n")
    assert (cpu.available_cores(), cpu.default_threads()) == (cores, threads)


def test_the_least_of_a_group_and_those_above_it_counts(system: Path) -> None:
    write(system / "proc/self/cgroup", "3:cpu:/above/ours\n")
    version_1(system / "groups/cpu/above/ours", 400_000)
    version_1(system / "groups/cpu/above", 150_000, 50_000)
    assert control_groups.cores_of_quota() == 3


def test_version_2_beside_version_1_and_controllers_under_all_their_names(system: Path) -> None:
    write(system / "proc/self/cgroup", "2:cpu,cpuacct:/ours\n0::/ours\n")
    write(system / "groups/unified/ours/cpu.max", "300000 100000\n")
    assert cpu.available_cores() == 3
    version_1(system / "groups/cpu,cpuacct/ours", 200_000)
    assert cpu.available_cores() == 2


@pytest.mark.parametrize("lines", ["", "nothing\n", "0::\n", ":::\n"])
def test_lines_that_say_nothing_limit_nothing(system: Path, lines: str) -> None:
    write(system / "proc/self/cgroup", lines)
    assert cpu.available_cores() == 16


def test_a_container_is_the_root_that_it_sees(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/docker/0a1b\n")
    write(system / "groups/cpu.max", "200000 100000\n")
    assert cpu.available_cores() == 2


@pytest.mark.parametrize("content", ["", "fast 100000\n", "100000\n", "100000 0\n", "0 100000\n"])
def test_a_file_that_says_nothing_limits_nothing(system: Path, content: str) -> None:
    write(system / "proc/self/cgroup", "0::/ours\n")
    write(system / "groups/ours/cpu.max", content)
    assert control_groups.cores_of_quota() is None


def test_a_process_that_is_pinned_has_the_cores_that_it_is_pinned_to(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docker run --cpuset-cpus`, taskset."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert (cpu.available_cores(), cpu.default_threads()) == (3, 3)
    write(system / "proc/self/cgroup", "0::/ours\n")
    write(system / "groups/ours/cpu.max", "200000 100000\n")
    assert (cpu.available_cores(), cpu.default_threads()) == (2, 2)


@pytest.mark.usefixtures("system")
def test_an_engine_takes_no_more_threads_than_there_are_cores(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert OnnxRuntimeBackend(bundle).host_threads == 2
    assert OnnxRuntimeBackend(bundle, threads=5).host_threads == 5  # whoever names a number gets it
