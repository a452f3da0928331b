"""Pages of a mapped file that are given back, and what was written to them, which is not."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from framefusion.runtime.machine.pages import give_back

SIZE = 8 << 20


def mapped(path: Path) -> np.memmap:
    """A file as a runtime maps it: privately, and all of it in memory."""
    return np.memmap(path, np.uint8, "c")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_files_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    for name in ("weights.bin", "other.bin"):
        content.tofile(tmp_path / name)
    ours = mapped(tmp_path / "weights.bin")
    other = mapped(tmp_path / "other.bin")
    assert (ours == other).all()
    (tmp_path / "link").symlink_to(tmp_path)
    assert give_back(tmp_path / "link" / "weights.bin") == SIZE
    assert give_back(tmp_path / "weights.bin") == 0  # nothing is left
    assert (ours == content).all()
    assert give_back(tmp_path / "other.bin") == SIZE  # the first call left it alone


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_written_stays(tmp_path: Path) -> None:
    np.zeros(SIZE, np.uint8).tofile(tmp_path / "weights.bin")
    written = mapped(tmp_path / "weights.bin")
    written[5] = 1
    behind = mmap.mmap(-1, SIZE)  # a mapping of no file, which nothing was written to
    assert give_back(tmp_path / "weights.bin") == 0
    assert written[5] == 1
    assert len(behind) == SIZE


def test_a_file_that_nobody_maps_has_nothing_to_give(tmp_path: Path) -> None:
    assert give_back(tmp_path / "weights.bin") == 0
