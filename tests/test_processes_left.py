"""What the suite says at its end of processes that outlive their tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import processes_left
from tests.patience import FOREVER, PATIENCE


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")
def test_a_process_that_is_left_is_named_with_its_test(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = f"print('begun', flush=True); import time; time.sleep({FOREVER})"
    left = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert left.stdout is not None
    try:
        assert left.stdout.readline() == "begun\n"
        (line,) = processes_left(str(tmp_path))
        assert line.startswith(f"{left.pid} ")
        assert "test_a_process_that_is_left_is_named_with_its_test" in line
    finally:
        left.kill()
        left.wait(PATIENCE)
        left.stdout.close()
    assert processes_left(str(tmp_path)) == []
