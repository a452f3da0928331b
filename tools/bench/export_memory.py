"""What exporting a checkpoint that does not fit in memory takes: peak memory, time, and bytes on the disk, by phase.

    python -m tools.bench.export_memory --folder /a/disk/with/50GB --write
    python -m tools.bench.export_memory --modes checked --folder /a/disk/with/50GB --write

A Qwen2-VL of the true 7B shape with random weights (big_checkpoint.py) becomes float16 segments, once adaptive and once
fixed, each by `ff-export build` in a process of its own; beside it stands `cp` of the same checkpoint to the same disk,
in the same run. Each begins with the checkpoint out of the page cache and ends when its bytes are on the disk (fsync).

Of the process: `anonymous` is its own memory (RssAnon), sampled every 50 ms; `high_water` is the kernel's VmHWM, which
counts mapped files as well and is set back at the beginning of each phase. `read` and `written` are what reached the
disk (/proc/PID/io). The check is left out, but for the mode `checked`, whose file is results/export_check.json: all
layers against transformers' class and the bundle itself, weights read from the disk as they are used. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.bench.big_checkpoint import BIG_SHAPES, write_big_checkpoint
from tools.bench.setting import report

INTERVAL = 0.05  # seconds between samples
MODES = {
    "adaptive": ["--no-check", "--reduction", "adaptive"],
    "fixed": ["--no-check", "--reduction", "fixed", "--merge-shares", "0.4,0.1", "--prune-layer", "2", "--cost", "0.3"],
    "checked": ["--reduction", "adaptive"],
}
UNCHECKED = ("adaptive", "fixed")
PART = re.compile(r"^(\S+): .* before it$")  # how a build says on a log that a part begins
COMMAND = [sys.executable, "-c", "from framefusion.export.commands.cli import main; main()"]


def main() -> None:
    arguments = parse()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "framefusion-export"
    checkpoint = folder / f"{arguments.shape}-checkpoint"
    if not (checkpoint / "config.json").is_file():
        write_big_checkpoint(BIG_SHAPES[arguments.shape], checkpoint)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    runs = {"copy": copy(checkpoint, folder / "copy")}
    for mode in arguments.modes:
        runs[mode] = build(checkpoint, folder / mode, [*MODES[mode], "--dtype", "float16", *arguments.options])
        runs[mode]["times_the_copy"] = round(runs[mode]["seconds"] / runs["copy"]["seconds"], 2)
    if not arguments.keep:
        shutil.rmtree(checkpoint)
    figures = {"shape": arguments.shape, "checkpoint_gb": gigabytes(size)} | runs
    file = "export_check" if arguments.modes == ["checked"] else None
    report("export_memory", figures, write=arguments.write, file=file)


def copy(source: Path, target: Path) -> dict[str, Any]:
    """The bytes once through the page cache to the disk."""
    with removed(target):
        forget(source)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        written = synced(target)
        seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 3), "written_gb": gigabytes(written), "mb_per_s": round(written / seconds / 1e6)}


def build(checkpoint: Path, target: Path, options: list[str]) -> dict[str, Any]:
    """One build, watched from outside."""
    with removed(target), removed(target.with_name(target.name + ".partial")):
        forget(checkpoint)
        start = time.perf_counter()
        command = [*COMMAND, "build", str(checkpoint), "-o", str(target), "--json", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watch = Watch(process)
        result = json.loads(process.stdout.read() if process.stdout else "{}")
        if process.wait() or "error" in result:
            raise SystemExit(f"the build failed: {result}")
        phases = watch.phases()
        written = synced(target)
        seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 3),
        "high_water_gb": max(phase["high_water_gb"] for phase in phases.values()),
        "anonymous_gb": max(phase["anonymous_gb"] for phase in phases.values()),
        "bundle_gb": gigabytes(written),
        "phases": phases,
    } | ({"check": result["check"]} if result["check"] else {})


class Watch:
    """Samples a process until it ends; a phase begins with each part that it announces on stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._proc = Path(f"/proc/{process.pid}")
        self._phases: dict[str, dict[str, float]] = {}
        self._phase = ""
        self._begin("start")
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._sample)]
        for thread in self._threads:
            thread.start()

    def phases(self) -> dict[str, Any]:
        """What each phase took, in its order."""
        for thread in self._threads:
            thread.join()
        ends = [*[phase["begun"] for phase in self._phases.values()][1:], time.perf_counter()]
        return {
            name: {
                "seconds": round(end - phase["begun"], 1),
                "high_water_gb": gigabytes(phase.get("VmHWM", 0)),
                "anonymous_gb": gigabytes(phase.get("RssAnon", 0)),
                "read_gb": gigabytes(phase["read_bytes"] - phase["read_before"]),
                "written_gb": gigabytes(phase["write_bytes"] - phase["written_before"]),
            }
            for (name, phase), end in zip(self._phases.items(), ends, strict=True)
        }

    def _begin(self, name: str) -> None:
        done = self._phases.get(self._phase, {"read_bytes": 0.0, "write_bytes": 0.0})
        read = done["read_bytes"]
        written = done["write_bytes"]
        self._phases[name] = {
            "begun": time.perf_counter(), "read_bytes": read, "write_bytes": written,
            "read_before": read, "written_before": written,
        }  # fmt: skip
        self._phase = name
        try:
            (self._proc / "clear_refs").write_text("5")  # sets the high-water mark back to what is there now
        except OSError:
            return  # it has ended

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            part = PART.match(line)
            if part:
                self._begin(part[1])
            print(line, end="", file=sys.stderr)

    def _sample(self) -> None:
        while self._process.poll() is None:
            phase = self._phases[self._phase]
            for name, unit, wanted in (
                ("status", 1024, ("VmHWM", "RssAnon")),
                ("io", 1, ("read_bytes", "write_bytes")),
            ):
                for key, value in self._numbers(name).items():
                    if key in wanted:
                        phase[key] = max(phase.get(key, 0), value * unit)
            time.sleep(INTERVAL)

    def _numbers(self, name: str) -> dict[str, int]:
        try:
            lines = (self._proc / name).read_text().splitlines()
        except OSError:
            return {}
        found = (re.match(r"(\w+):\s+(\d+)", line) for line in lines)
        return {match[1]: int(match[2]) for match in found if match}


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    """Room on the disk before and after."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forget(folder: Path) -> None:
    """Put a folder's files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def synced(folder: Path) -> int:
    """Wait until a folder's bytes are on the disk, and count them."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                size += os.fstat(file.fileno()).st_size
    return size


def gigabytes(size: float) -> float:
    return round(size / 1e9, 3)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=BIG_SHAPES, default="7b")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(UNCHECKED))
    parser.add_argument("--folder", type=Path, help="where; default: in the system's folder for temporary files")
    parser.add_argument("--keep", action="store_true", help="do not remove the checkpoint")
    parser.add_argument("--options", type=str.split, default=[], help="more options of the build, in quotes")
    parser.add_argument("--write", action="store_true", help="write results/export_memory.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
