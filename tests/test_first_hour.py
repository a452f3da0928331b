"""The first hour of a Python programmer: the notebook, the programs of examples/, and what an editor and mypy say."""

from __future__ import annotations

import json
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import framefusion
from framefusion import Pipeline
from tests.films import write_film
from tests.patience import PATIENCE
from tests.wheel import ROOT
from tools.tiny import clips

TRAINED = ROOT / "tests" / "models" / "tiny_qwen2_vl"
NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))
QUESTION = "What happens?"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a film, and a folder of films and something else."""
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    folder = tmp_path_factory.mktemp("first-hour")
    build(Checkpoint(TRAINED), folder / "bundle", BuildOptions(), verify=False)
    clips.write_mp4(folder / "clip.mp4", clips.scene_for(clips.HELD_OUT, clips.KINDS[0]))
    (folder / "films").mkdir()
    (folder / "films" / "a.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    write_film(folder / "films" / "b.mp4")
    (folder / "films" / "note.txt").write_text("no film")
    return folder


def program(home: Path, name: str, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=home, input=said, capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


# --- Programs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_question_about_a_film(home: Path) -> None:
    answer, tokens, cost = program(home, "ask.py", "bundle", "clip.mp4", QUESTION).stdout.splitlines()
    assert answer
    (visual, left) = map(int, re.findall(r"\d+", tokens))
    assert 0 < left < visual
    assert re.fullmatch(r"\d+% of their computation kept, \d+\.\d\d s", cost)


@pytest.mark.slow
def test_a_conversation_that_streams(home: Path) -> None:
    said = f"{QUESTION}\n{'x ' * 5000}\nWhat color is it?\n"
    done = program(home, "talk.py", "bundle", "clip.mp4", said=said)
    first, refused, second = done.stdout.splitlines()
    assert first
    assert second
    assert refused.startswith("error: ")
    assert "<Session of 2 messages about 1 film(s)" in done.stderr


@pytest.mark.slow
def test_a_folder_of_films_at_several_costs(home: Path) -> None:
    done = program(home, "folder.py", "bundle", "films", QUESTION, "1", "0.3")
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["film"], line["cost"]) for line in lines] == [
        ("a.mp4", 1.0), ("a.mp4", 0.3), ("b.mp4", 1.0), ("b.mp4", 0.3), ("note.txt", 1.0)
    ]  # fmt: skip
    assert "is neither a film nor a picture" in lines[-1]["error"]
    for dense, reduced in (lines[:2], lines[2:4]):
        assert dense["reached"] == 1
        assert reduced["reached"] < 0.35
        assert reduced["kv_tokens"] < dense["kv_tokens"]


def test_programs_say_how_they_are_called() -> None:
    for path in PROGRAMS:
        assert f"python examples/{path.name} bundle" in path.read_text(encoding="utf-8"), path.name


# --- The notebook ---------------------------------------------------------------------------------------------------


def test_the_notebook_is_committed_without_what_it_printed() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 8
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_draws_answers(home: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=PATIENCE, startup_timeout=PATIENCE, resources={"metadata": {"path": str(home)}}
    )
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    drawn = [
        output.data["text/html"] for cell in code for output in cell.outputs if "text/html" in output.get("data", {})
    ]
    assert len(drawn) == 2  # an answer by itself, and by show
    assert [len(re.findall("<img ", piece)) for piece in drawn] == [16, 16]
    assert all(len(piece) < 300_000 for piece in drawn)
    printed = "".join(output.text for cell in code for output in cell.outputs if output.output_type == "stream")
    assert "channels stand first" in printed
    assert "tokens from the caches" in printed
    if folder := os.environ.get("WRITE_NOTEBOOK"):  # to look at it
        nbformat.write(notebook, Path(folder) / "first_hour.ipynb")


# --- What an editor and a type checker say --------------------------------------------------------------------------


def test_help_and_completion_name_what_there_is() -> None:
    assert set(framefusion.__all__) <= set(dir(framefusion))
    text = pydoc.plain(pydoc.render_doc(Pipeline))
    for name in ("generate", "stream", "agenerate", "astream", "chat", "session", "close"):
        assert re.search(rf"^ \|  (async )?{name}\(", text, re.MULTILINE), name
    assert 'pipeline.generate("What happens?", ["clip.mp4"])' in text


SCRIPT = """\
import asyncio
from pathlib import Path

import numpy as np

from framefusion import Bundle, Generation, Pipeline, Request, Session, Step, Turn, Visual


def main(folder: str) -> str:
    pipeline = Pipeline(folder)
    reveal_type(pipeline.generate("What?", [Path("a.mp4"), b"", np.zeros((4, 8, 8, 3), np.uint8)]).text)
    turns = [Turn("user", ("Before:", Visual.IMAGE))]
    for step in pipeline.stream(turns, ["a.png"], Request(temperature=0.7, stop=("x",))):
        reveal_type(step.token_id)
    pipeline.generate([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])
    chat: Session = Pipeline(Bundle("x")).chat("a.mp4")
    reveal_type(chat.ask("Who?").kept(-1))
    return asyncio.run(later(pipeline))


async def later(pipeline: Pipeline) -> str:
    async for step in pipeline.astream("What?"):
        print(step.text)
    return (await pipeline.agenerate("What?")).text


def shorten(steps: list[Step]) -> Generation:
    return Generation.from_steps(steps[:-1])


Pipeline("x").generate(5)
Request(cost="0.3")
"""


@pytest.mark.slow
def test_a_script_of_a_user_is_checked_by_mypy(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.11", "--cache-dir", str(tmp_path / "c")]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("script.py")]
    revealed = [match[1] for line in lines if (match := re.search(r'Revealed type is "(.*)"', line))]
    assert revealed[:2] == ["builtins.str", "builtins.int | None"] or revealed[:2] == ["str", "int | None"], done.stdout
    assert "ndarray" in revealed[2]
    errors = [line for line in lines if ": error: " in line]
    assert len(errors) == 2, done.stdout
    assert 'Argument 1 to "generate" of "Pipeline"' in errors[0]
    assert 'Argument "cost" to "Request"' in errors[1]
