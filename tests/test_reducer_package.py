"""A package of someone else's, installed as a user would: its reducer live and in a bundle, by name alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = Path(__file__).parent / "reducer_package"

LIVE = """
import sys, torch
from transformers import Qwen2VLForConditionalGeneration
from framefusion.interface import apply_framefusion
model = Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
handle = apply_framefusion(model, 0.4, reducer="norm")
ids = torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(0))
labels = torch.tensor([-1] * 4 + list(range(8)) * 4 + [-1] * 4)
with torch.inference_mode(), handle.labels(labels):
    model(input_ids=ids)
norms = model.get_input_embeddings()(ids)[0, 4:36].norm(dim=1)
expected = sorted((4 + norms.topk(round(0.4 * 32)).indices).tolist())
kept = [place for place in handle.last[0].kept[0].tolist() if 4 <= place < 36]
assert kept == expected, (kept, expected)
print(handle.last[0].cost)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package; nothing is written beside the repository's own files."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"
    source.mkdir()
    for file in PACKAGE.glob("*.*"):  # setuptools writes into the folder that it builds
        (source / file.name).write_bytes(file.read_bytes())
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    done = subprocess.run((*pip, "--target", str(folder / "site"), str(source)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}


def python(environment: dict[str, str], *arguments: object) -> str:
    command = (sys.executable, *map(str, arguments))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(name: str, floor: str) -> tuple[str, str]:
    return "-c", f"import sys; sys.argv[0] = {name!r}; from framefusion.{floor}.commands.cli import main; main()"


RUN, EXPORT = command("ff-run", "runtime"), command("ff-export", "export")


@pytest.mark.slow
def test_an_installed_reducer_works_by_name(
    installed: dict[str, str], bundle: Path, checkpoint: Path, film: Path, tmp_path: Path
) -> None:
    listed = json.loads(python(installed, *RUN, "reducers", "--json"))["reducers"]
    assert listed[-1] | {"paper": ""} == {
        "name": "norm", "paper": "", "merges": False, "query_agnostic": True, "static": True, "inputs": ["features"],
        "origin": "framefusion-norm 0.3",
    }  # fmt: skip
    question = ("--video", film, "--prompt", "What?", "--max-new-tokens", 2, "--json")
    other = json.loads(python(installed, *RUN, "generate", bundle, *question, "--reducer", "norm", "--cost", 0.5))
    assert other["cost"]["reached"] == 0.5
    built = ("build", checkpoint, "-o", tmp_path / "own", "--reducer", "norm", "--cost", 0.5, "--max-input-len", 512)
    assert json.loads(python(installed, *EXPORT, *built, "--json"))["check"]["passed"]
    answer = json.loads(python(installed, *RUN, "generate", tmp_path / "own", *question))
    for name in ("text", "kv_lengths", "reduction"):
        assert answer[name][:1] == other[name][:1]
    assert answer["cost"] == other["cost"]
    assert float(python(installed, "-c", LIVE, checkpoint)) == pytest.approx(0.4, abs=1 / 32)
