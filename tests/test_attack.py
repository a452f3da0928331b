"""A small part of `make attack`: the user's files, killed builds and odd flags, in processes forked from this one."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.commands import export
from tests.conftest import made_once
from tests.patience import PATIENCE
from tools.attack import foreign, killed
from tools.attack.endings import Ending, run_until
from tools.attack.harness import Fault, World, attack, in_child
from tools.attack.kinds import KINDS
from tools.attack.world import import_everything

WRITES = 120  # of a build of the tiny checkpoint, about


@pytest.fixture
def world(checkpoint: Path, instant_traces: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    import_everything()  # the processes forked from this one have seconds

    def build(folder: Path) -> None:
        result = export("build", checkpoint, "-o", folder, "--no-check")
        assert result.exit_code == 0, result.output

    reference = made_once(tmp_path_factory, "untraced-bundle", build)
    return World(checkpoint, reference, reference, WRITES, None, None, Path("/no/film"), Path("/no/picture"))


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
@settings(
    max_examples=8, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_every_foreign_byte_stands(world: World, tmp_path: Path, rng: random.Random) -> None:
    folder = tmp_path / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    assert foreign.attack(rng, world, folder) is None


@pytest.mark.slow
def test_killed_builds_end_in_the_same_bundle(world: World, tmp_path: Path) -> None:
    for trial in range(2):
        folder = tmp_path / str(trial)
        folder.mkdir()
        assert killed.attack(random.Random(trial), world, folder) is None


@pytest.mark.slow
@pytest.mark.usefixtures("instant_traces")
def test_a_bundle_has_its_name_at_any_moment(checkpoint: Path, world: World, tmp_path: Path) -> None:
    """Killed at each of the last writes: at them the bundle is replaced."""
    from framefusion.export.writing.journal import valid_manifest
    from tools.attack.command import call

    build = ["build", str(checkpoint), "-o", str(tmp_path / "o"), "--no-check", "--force"]
    shutil.copytree(world.reference, tmp_path / "o")
    statuses = set()
    for at in range(WRITES - 20, WRITES + 20, 10):
        end = run_until(lambda: call("ff-export", build), Ending("kill", at), PATIENCE)
        assert valid_manifest(tmp_path / "o") is not None
        statuses.add(end.status)
    assert run_until(lambda: call("ff-export", build), Ending("end"), PATIENCE).result[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert -9 in statuses


def test_the_harness_sees_what_goes_wrong(world: World, tmp_path: Path) -> None:
    """A trial that loses a file, fails, hangs, or eats memory is counted as that."""
    from tools.attack import harness
    from tools.attack.harness import Kind

    def lose(rng: random.Random, _: World, folder: Path) -> Fault | None:
        (folder / "letter").write_bytes(b"Dear")
        before = foreign.snapshot(folder)
        (folder / "letter").write_bytes(b"Deer")
        return Fault("lost", str(foreign.missing(before, foreign.snapshot(folder))))

    def fail(*_: object) -> Fault | None:
        raise RuntimeError("a bug")

    kinds = [Kind("lose", "", lose), Kind("fail", "", fail)]
    tallies = attack(kinds, world, tmp_path, trials=4, seed=0)
    assert {name: dict(tally.faults) for name, tally in tallies.items()} == {
        "lose": {"lost": 2},
        "fail": {"traceback": 2},
    }
    assert "a bug" in tallies["fail"].first[0]["what"]
    hanging = in_child(lambda: [os.read(os.pipe()[0], 1)], seconds=0.2)
    assert hanging.status is None
    assert hanging.seconds < PATIENCE
    assert in_child(lambda: len(bytearray(b"x" * (64 << 20)))).memory > 64 << 20
    assert harness.FAULTS[0] == "lost"


class EndsAnotherProcess:
    """Garbage that only the process that made it can collect, as a film's scaler with its threads."""

    def __init__(self) -> None:
        self.itself = self
        self.process = os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(7)


def test_a_forked_trial_leaves_its_parents_garbage_alone() -> None:
    gc.disable()
    try:
        EndsAnotherProcess()
        assert in_child(gc.collect).status == 0
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_minute_of_all_attacks() -> None:
    command = (sys.executable, "-m", "tools.attack", "--trials", "120", "--seed", "3", "--minutes", "0.5")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(kind.name in done.stdout for kind in KINDS)
