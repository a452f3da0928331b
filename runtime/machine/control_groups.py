"""The control groups above this process, as a container has them, and the processor's time that they leave it. Linux.

Knows the two versions of their files; where there are none, nothing is limited.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")


def groups_above(controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the groups that may limit this process, from its own to the root, and the version of their files.

    Args:
        controller: as version 1 calls it, such as "memory"; version 2 has all of them in one folder.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 is mounted below where version 1 has the root; some mount what version 1 groups under all its names.
        names = (controller, controllers) if controllers else ("unified", "")
        root = next((GROUPS / name for name in names if os.path.isdir(GROUPS / name)), GROUPS / controller)
        folder = root / path.lstrip("/")
        if not os.path.isdir(folder):  # pathlib raises where a folder above may not be read
            folder = root  # a container sees its own group as the root, under the name that the host has for it
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield group, 1 if controllers else 2


def cores_of_quota() -> float | None:
    """Seconds of processors that this process may take in a second, `docker run --cpus`; None where nothing limits it.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us) of Linux.
    """
    quotas = [_quota(group, version) for group, version in groups_above("cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path, version: int) -> float | None:
    try:
        if version == 1:
            most = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        else:
            most, period = (group / "cpu.max").read_text().split()
        microseconds = int(most)  # "max" in version 2 where there is none, -1 in version 1
        return microseconds / int(period) if microseconds > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
