"""Builds that end early: full disks, Ctrl-C, failed checks. Only complete parts stay, and the next build goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from framefusion import errors
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.writing.journal import Journal
from framefusion.export.writing.staging import Staging
from tests.commands import assert_only_complete_parts, assert_refused, export
from tests.patience import PATIENCE


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may be larger: the kernel refuses to write on, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("instant_traces")
def test_a_file_that_cannot_grow(checkpoint: Path, tmp_path: Path) -> None:
    with largest_file(80_000):
        result = export("build", checkpoint, "-o", tmp_path / "bundle", "--no-check")
    assert_refused(
        result, errors.StorageError, "vision could not be written, File too large", "2 complete part(s)", "resume"
    )
    assert_only_complete_parts(tmp_path / "bundle")
    assert export("build", checkpoint, "-o", tmp_path / "bundle", "--no-check").exit_code == 0


def test_a_disk_too_small_for_the_plan(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    result = export("build", checkpoint, "-o", tmp_path / "bundle")
    assert_refused(result, errors.StorageError, "GB are free", "make room")
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("instant_traces")
def test_an_interrupted_build_resumes(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.export.writing import parts

    def interrupt(graph: GraphPlan, _: object) -> None:
        if graph.role != "vision":
            raise KeyboardInterrupt

    command = ("build", checkpoint, "-o", tmp_path / "bundle", "--no-check")
    with monkeypatch.context() as patch:
        patch.setattr(parts, "trace_graph", interrupt)
        result = export(*command)
    assert_refused(result, errors.InterruptedBuildError, "3 complete part(s)", "resume")
    assert_only_complete_parts(tmp_path / "bundle")
    before = written(tmp_path / "bundle.partial")
    assert export(*command).exit_code == 0
    after = written(tmp_path / "bundle")
    assert {name: after[name] for name in before} == before  # taken over, not written again
    assert not (tmp_path / "bundle.partial").exists()


@pytest.mark.usefixtures("instant_traces")
def test_a_killed_build_resumes_and_says_what_it_compares(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process leaves: half of a part, the scratch bundle of a check, and the journal."""
    from framefusion.console.progress import Step
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "__exit__", lambda *_: None)  # nobody tidies up after a kill
        patch.setattr(Staging, "publish", lambda _: None)
        build(Checkpoint(checkpoint), tmp_path / "bundle", BuildOptions(depth=0), verify=False)
    staged = tmp_path / "bundle.partial"
    weights = staged / "segments/rest/weights.bin"
    os.truncate(weights, weights.stat().st_size - 100)  # a part that is moved, and no longer what the journal says
    for name in ("segments/rest/weights.bin", "check-abc/bundle.partial/weights.bin"):
        (staged / ".writing" / name).parent.mkdir(parents=True)
        (staged / ".writing" / name).write_bytes(b"left")
    journal = json.loads((staged / "journal.json").read_text())["parts"]
    before, steps = written(staged), list[Step]()
    built = build(
        Checkpoint(checkpoint), tmp_path / "bundle", BuildOptions(depth=0), verify=False, progress=steps.append
    )
    after = written(built.folder)
    assert [name for name in after if after[name] != before[name]] == ["segments/rest/weights.bin"]
    assert [path.name for path in built.folder.glob(".*")] == []
    compared = [step for step in steps if step.part == "resuming"]
    assert steps[0].part == "resuming"
    whole = [record["size"] for part, named in journal.items() if part != "segments/rest" for record in named.values()]
    assert compared[-1].done == sum(whole)


def written(folder: Path) -> dict[str, int]:
    """Modification times of what builds write once."""
    names = ("*.bin", "tokenizer.json")
    files = [path for name in names for path in folder.rglob(name) if ".writing" not in path.parts]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.mark.usefixtures("instant_traces")
def test_an_interruption_in_the_check(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.export.check import check

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_bundle", interrupt)
    result = export("build", checkpoint, "-o", tmp_path / "bundle")
    assert_refused(result, errors.InterruptedBuildError, "7 complete part(s)")
    assert_only_complete_parts(tmp_path / "bundle")


@pytest.mark.usefixtures("instant_traces")
def test_a_bundle_that_fails_its_check_is_not_published(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framefusion.export.check import check

    line = {"what": "dense logits", "value": 0.5, "limit": 1e-4}
    monkeypatch.setattr(check, "check_bundle", lambda *_: {"passed": False, "lines": [line], "failures": [line]})
    result = export("build", checkpoint, "-o", tmp_path / "bundle")
    assert_refused(result, errors.CheckFailedError, "dense logits: 0.5 > 0.0001", "not published")
    assert_only_complete_parts(tmp_path / "bundle")


@pytest.mark.usefixtures("instant_traces")
def test_two_builds_of_one_output(checkpoint: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "bundle.partial").mkdir()
    with (tmp_path / "bundle.partial" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = export("build", checkpoint, "-o", tmp_path / "bundle", "--no-check")
    assert_refused(result, errors.StorageError, "another build is writing", "wait")
    assert export("build", checkpoint, "-o", tmp_path / "bundle", "--no-check").exit_code == 0


def test_outputs_that_exist(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    assert_refused(export("build", checkpoint, "-o", bundle), errors.StorageError, "exists", "--force")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("Dear")
    result = export("build", checkpoint, "-o", tmp_path / "letters", "--force")
    assert_refused(result, errors.StorageError, "is no bundle")
    assert (tmp_path / "letters" / "letter.txt").exists()


def test_a_place_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = export("build", checkpoint, "-o", tmp_path / "file" / "bundle")
    assert_refused(result, errors.StorageError, "cannot be written")


def test_ctrl_c_between_a_part_and_its_line_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def letter(name: str) -> Callable[[Path], list[str]]:
        return lambda folder: [name] if (folder / name).write_text("Dear") else []

    save = Journal.save

    def interrupted(self: Journal) -> None:
        monkeypatch.undo()
        save(self)
        raise KeyboardInterrupt

    def end_early() -> None:
        with Staging(tmp_path / "bundle", "key", force=False) as staged:
            staged.write("first", letter("first"))
            monkeypatch.setattr(Journal, "save", interrupted)
            staged.write("second", letter("second"))

    with pytest.raises(errors.InterruptedBuildError):
        end_early()
    assert_only_complete_parts(tmp_path / "bundle")
    assert not (tmp_path / "bundle.partial" / "second").exists()  # it had not moved to its place


@pytest.mark.slow
def test_ctrl_c_in_a_real_build(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from framefusion.export.commands.cli import main; main()"]
    command += ["build", str(checkpoint), "-o", str(tmp_path / "bundle"), "--no-check", "--depth", "1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "bundle.partial" / "journal.json", time.monotonic() + PATIENCE
    while not written(journal.parent) and time.monotonic() < deadline:  # the first part may have nothing that is large
        time.sleep(0.01)
    while not (journal.exists() and json.loads(journal.read_text())["parts"]) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    _, message = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130
    assert message.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in message
    assert_only_complete_parts(tmp_path / "bundle")
    before = written(tmp_path / "bundle.partial")
    assert before
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)
    after = written(tmp_path / "bundle")
    assert {name: after[name] for name in before} == before
