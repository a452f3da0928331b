"""Without what Python lacks on Windows a bundle answers all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Libraries look once which system they are on, and would take this for a broken Linux: they are loaded before.
WITHOUT = """
import os, signal, sys
import av, click, numpy, onnxruntime, PIL.Image, tokenizers
import multiprocessing, platform, shutil, subprocess, tempfile
platform.uname()
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "getuid", "geteuid", "fchmod", "fork", "mkfifo",
             "pread", "sched_getaffinity", "sysconf", "statvfs", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGALRM", "SIGHUP", "SIGPIPE", "SIGKILL", "SIGQUIT", "SIGTSTP"):
    delattr(signal, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp", "readline"):
    sys.modules[name] = None
from framefusion import start
program, *sys.argv = sys.argv[1:]
getattr(start, program)()
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-c", WITHOUT, program, program.replace("_", "-"), *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_bundle_answers_and_a_build_is_refused_by_name(bundle: Path, film: Path) -> None:
    answered = run("ff_run", "generate", bundle, "--video", film, "--prompt", "What?", "--max-new-tokens", 2)
    assert answered.returncode == 0, answered.stderr
    assert "keeps" in answered.stderr
    checked = run("ff_run", "check", bundle)
    assert checked.returncode == 0, checked.stderr
    refused = run("ff_export", "build", bundle, "-o", film.with_name("out"))
    assert refused.returncode == 18, refused.stderr
    assert "build on Linux, or on Windows in WSL" in refused.stderr
    assert "pip install" not in refused.stderr
