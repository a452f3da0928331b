"""examples/cpp: a program without Python says what the runtime says, over the pip package's library."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion import Pipeline, Request, Turn, Visual
from framefusion.errors import PromptError
from tests.bundles import FIXED, shared
from tests.films import write_film
from tests.runtime.bundle_edits import copied, edited
from tests.versions import needs_torch
from tests.wheel import ROOT

EXAMPLE = ROOT / "examples" / "cpp"
QUESTION = "What happens?"
NEW = 8
QUANTISED: dict[str, dict[str, Any]] = {
    "int4 with zero points, the head in int8, in float16": {"weights": "int4+zero+head", "dtype": "float16"},
}
MISSING = [program for program in ("cmake", "g++") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)} is not installed"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    spec = find_spec("onnxruntime")
    assert spec is not None
    assert spec.origin is not None
    library = Path(spec.origin).parent / "capi"
    configure = ("cmake", "-S", EXAMPLE, "-B", build, f"-DONNXRUNTIME={library}")
    for command in (configure, ("cmake", "--build", build)):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return build / "framefusion"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4")


def request(bundle: Path, film: Path, folder: Path) -> Path:
    command = (sys.executable, EXAMPLE / "request.py", bundle, film, QUESTION, folder, "--max-new-tokens", str(NEW))
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run((program, *map(str, arguments)), capture_output=True, text=True, check=False)


def ours(bundle: Path, film: Path) -> tuple[list[int], NDArray[np.float32]]:
    """Tokens, and logits [T, V], of the runtime."""
    turns = [Turn("user", (Visual.VIDEO, QUESTION))]
    with Pipeline(bundle) as pipeline:
        steps = [
            step
            for step in pipeline.stream(turns, [film], Request(NEW, temperature=0.0), logits=True)
            if step.kind == "token"
        ]
    return [int(step.token_id or 0) for step in steps], np.stack([np.asarray(step.logits) for step in steps])


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles whose weights are codes, by the name of `QUANTISED`."""
    folder = tmp_path_factory.mktemp("quantised")

    def built(name: str) -> Path:
        from framefusion.export.build import build
        from framefusion.export.checkpoints.checkpoint import Checkpoint
        from framefusion.export.options import BuildOptions

        options = BuildOptions(**FIXED, **QUANTISED[name], max_text_len=96, max_input_len=192)
        return build(Checkpoint(shared("checkpoint")), folder / name, options, verify=False).folder

    return built


@pytest.mark.parametrize("name", ["fixed", "fixed-gqa", *(pytest.param(name, marks=needs_torch) for name in QUANTISED)])
def test_the_program_gives_the_tokens_and_logits_of_the_runtime(
    program: Path, film: Path, name: str, quantised: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = quantised(name) if name in QUANTISED else shared(name)
    tokens, logits = ours(bundle, film)
    done = run(program, bundle, request(bundle, film, tmp_path / "request"), 1, tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tokens
    theirs = np.fromfile(tmp_path / "logits", np.float32).reshape(logits.shape)
    assert len(theirs) > 1
    assert np.abs(theirs - logits).max() <= 1e-5 * np.abs(logits).max()


def test_rows_of_the_head_behind_the_tokenizer_are_never_chosen(program: Path, film: Path, tmp_path: Path) -> None:
    """As in the runtime: the head of this checkpoint has 320 rows, its tokenizer 307 tokens."""
    bundle = shared("fixed")
    folder = request(bundle, film, tmp_path / "request")
    sizes = np.load(folder / "sizes.npy")
    assert sizes.tolist()[4::2] == [320, 307]
    scores = ours(bundle, film)[1][0]
    for known in (307, int(scores.argmax()), 1):
        sizes[6] = known
        np.save(folder / "sizes.npy", sizes)
        done = run(program, bundle, folder, 1)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[0]) == scores[:known].argmax()
    sizes[6] = 321
    np.save(folder / "sizes.npy", sizes)
    assert "asks for no token" in run(program, bundle, folder, 1).stderr


def test_a_request_says_what_the_program_passes_over(film: Path, tmp_path: Path) -> None:
    asking = {"repetition_penalty": 1.05, "do_sample": True, "min_new_tokens": 2}
    other = edited(copied(shared("fixed"), tmp_path / "bundle"), lambda plain: plain["generation"].update(asking))
    said = []
    for bundle in (shared("fixed"), other):
        command = (sys.executable, EXAMPLE / "request.py", bundle, film, QUESTION, tmp_path / "request")
        said.append(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr)
    assert said[0] == ""
    assert "asks for min_new_tokens, repetition_penalty, do_sample: answers may differ" in said[1]


def test_a_request_for_no_token_is_refused(film: Path, tmp_path: Path) -> None:
    command = (sys.executable, EXAMPLE / "request.py", shared("fixed"), film, QUESTION, tmp_path / "request")
    done = subprocess.run((*command, "--max-new-tokens", "0"), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == PromptError.exit_code
    assert "0 new tokens" in done.stderr
    assert not (tmp_path / "request").exists()


def test_what_does_not_belong_together_or_is_damaged_is_refused(program: Path, film: Path, tmp_path: Path) -> None:
    folder = request(shared("fixed"), film, tmp_path / "request")
    other = run(program, shared("fixed-gqa"), folder)
    assert (other.returncode, other.stdout) == (1, "")
    assert "another bundle" in other.stderr
    digest = (folder / "bundle.txt").read_text()
    for damaged in ("", digest[:-1]):
        (folder / "bundle.txt").write_text(damaged)
        assert "another bundle" in run(program, shared("fixed"), folder).stderr
    (folder / "bundle.txt").write_text(digest)
    places = folder / "places.npy"
    places.write_bytes(places.read_bytes()[:-8])
    cut = run(program, shared("fixed"), folder)
    assert (cut.returncode, cut.stdout) == (1, "")
    assert "truncated" in cut.stderr


def test_a_bundle_that_the_program_does_not_run_gets_no_request(bundle: Path, film: Path, tmp_path: Path) -> None:
    command = (sys.executable, EXAMPLE / "request.py", bundle, film, QUESTION, tmp_path / "request")
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 13
    assert "--reduction fixed" in done.stderr
    assert not (tmp_path / "request").exists()
