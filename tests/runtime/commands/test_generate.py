"""`ff-run generate`: one question as ever; several about several films, each as if alone; a bad film by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from framefusion.console.plain_text import printable
from framefusion.errors import BudgetError, BundleError, PromptError, VideoError
from framefusion.runtime.commands import generate as generate_module
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.commands.question.subjects import Subject, list_subjects
from framefusion.runtime.generation.stages import Stages
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film
from tests.wheel import ROOT

NEW = 4
QUESTIONS = ("What happens?", "Who?")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
    """A bundle takes its time to open: here it is open already."""
    monkeypatch.setattr(generate_module, "open_pipeline", lambda *_, **__: pipeline)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, film: Path, picture: Path) -> Path:
    """A folder with two films, a picture, a file that is no film though its name says so, and one that is neither."""
    folder = tmp_path_factory.mktemp("films")
    shutil.copyfile(film, folder / "b.mp4")
    write_film(folder / "c.mp4", seed=3)
    shutil.copyfile(picture, folder / "d.png")
    (folder / "a.mp4").write_bytes(b"no film")
    (folder / "notes.txt").write_text("words")
    shutil.copyfile(film, folder / ".hidden.mp4")
    return folder


def generate(bundle: Path, *flags: object) -> Result:
    return CliRunner().invoke(ff_run, ["generate", str(bundle), "-n", str(NEW), *map(str, flags)])


def test_what_one_question_prints(bundle: Path, film: Path, pipeline: Pipeline) -> None:
    """Today's --json is what it was; the answer comes with two lines of facts, or alone."""
    turn = Turn("user", (Visual.VIDEO, "What?"))
    expected = pipeline.generate([turn], [film], Request(NEW))
    shown = generate(bundle, "-v", film, "-p", "What?")
    assert shown.stdout == printable(expected.text) + "\n"
    prompt, answer = shown.stderr.splitlines()
    assert prompt.startswith(
        f"prompt: {expected.prompt_tokens} tokens, {expected.visual_tokens} of them visual: keeps "
    )
    assert answer.startswith(f"answer: {NEW} tokens, first after ")
    assert answer.endswith("cut off by --max-new-tokens")
    quiet = generate(bundle, film, "-p", "What?", "-q")
    assert (quiet.stdout, quiet.stderr) == (shown.stdout, "")
    facts = json.loads(generate(bundle, film, "-p", "What?", "--json").stdout)
    assert set(facts) == {*expected.to_dict(), "backend", "warnings"}
    assert facts["token_ids"] == list(expected.token_ids)


@pytest.mark.usefixtures("opened")
def test_each_answer_is_as_if_it_were_alone(
    bundle: Path, films: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a film is read and encoded once for all questions about it."""
    calls: list[str] = []
    for name in ("read_media", "encode_visual"):
        method = getattr(Stages, name)

        def counted(self: Stages, *given: Any, _name: str = name, _method: Any = method, **named: Any) -> Any:
            calls.append(_name)
            return _method(self, *given, **named)

        monkeypatch.setattr(Stages, name, counted)
    shown = [films / name for name in ("b.mp4", "c.mp4", "d.png")]
    result = generate(bundle, *shown, "-p", QUESTIONS[0], "-p", QUESTIONS[1], "--jsonl")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["files"], line["prompt"]) for line in lines] == [
        ([str(path)], question) for path in shown for question in QUESTIONS
    ]
    assert sorted(calls) == ["encode_visual"] * 3 + ["read_media"] * 3
    kinds = {".mp4": Visual.VIDEO, ".png": Visual.IMAGE}
    for line in lines:
        path = Path(line["files"][0])
        alone = pipeline.generate([Turn("user", (kinds[path.suffix], line["prompt"]))], [path], Request(NEW))
        assert line["token_ids"] == list(alone.token_ids)
        assert (line["text"], line["kv_lengths"]) == (alone.text, list(alone.kv_lengths))
    assert ["video" in line["seconds"] for line in lines] == [True, False] * 3


@pytest.mark.usefixtures("opened")
def test_a_bad_film_costs_its_lines_and_no_other(bundle: Path, films: Path) -> None:
    result = generate(bundle, "-v", films, "-p", "What?", "-p", "Who?", "--jsonl")
    assert result.exit_code == VideoError.exit_code
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(line["files"][0]).name for line in lines] == ["a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.mp4", "c.mp4"]
    assert [line["error"]["kind"] for line in lines[:2]] == ["VideoError"] * 2
    assert all(len(line["token_ids"]) == NEW for line in lines[2:])
    assert result.stderr.splitlines()[-1] == "error: 2 of 6 answers are missing: see above what each needs"
    assert result.stderr.count("a.mp4 is damaged or no video") == 1


@pytest.mark.usefixtures("opened")
def test_a_question_that_is_too_long_leaves_the_others(bundle: Path) -> None:
    result = generate(bundle, "-p", "What? " * 600, "-p", "What?", "--json")
    assert result.exit_code == PromptError.exit_code
    refused, answered = json.loads(result.stdout)["answers"]
    assert refused["error"]["kind"] == "PromptError"
    assert answered["prompt"] == "What?"
    assert len(answered["token_ids"]) == NEW


def test_what_is_wrong_with_all_ends_at_once(bundle: Path, films: Path) -> None:
    result = generate(bundle, films / "b.mp4", films / "c.mp4", "-p", "What?", "--cost", 7, "--jsonl")
    assert result.exit_code == BudgetError.exit_code
    assert [list(json.loads(line)) for line in result.stdout.splitlines()] == [["error"]]
    assert generate(films, "-p", "What?", "-p", "Who?").exit_code == BundleError.exit_code


@pytest.mark.usefixtures("opened")
def test_headings_say_what_an_answer_is_about(bundle: Path, films: Path) -> None:
    flags = (films / "b.mp4", "-p", "What?\nTell me.", "-p", "Who?" * 30)
    headed = generate(bundle, *flags).stdout
    first, second = (line for line in headed.splitlines() if line.startswith("==> "))
    assert first == f"==> {films}/b.mp4: What? <=="
    assert second == f"==> {films}/b.mp4: {('Who?' * 30)[:57]}... <=="
    quiet = generate(bundle, *flags, "--quiet")
    assert (quiet.stderr, quiet.stdout.splitlines()) == ("", [headed.splitlines()[1], headed.splitlines()[4]])


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (("-q", "--verbose"), "contradict each other"),
        (("--json", "--jsonl"), "contradict each other"),
        (("-v", "{}/b.mp4", "{}/c.mp4"), "add --each"),
        (("-v", "{}", "-i", "{}/d.png"), "add --each"),
        (("is", "this?"), "there is no file is: quote a question"),
    ],
)
def test_what_could_mean_both_is_refused(bundle: Path, films: Path, flags: tuple[str, ...], phrase: str) -> None:
    result = generate(bundle, "-p", "What?", *(flag.format(films) for flag in flags))
    assert result.exit_code == 2
    assert phrase in result.stderr


def names(subjects: list[Subject]) -> list[list[str]]:
    return [[Path(name).name for name in subject.names] for subject in subjects]


def test_what_is_asked_about_together_and_what_by_itself(films: Path) -> None:
    film = ("video", films / "b.mp4")
    picture = ("image", films / "d.png")
    assert names(list_subjects([], [], each=False)) == [[]]
    assert names(list_subjects([film, picture], [], each=False)) == [["b.mp4", "d.png"]]
    assert names(list_subjects([film, picture], [], each=True)) == [["b.mp4"], ["d.png"]]
    assert names(list_subjects([], [film[1]], each=False)) == [["b.mp4"]]
    assert names(list_subjects([], [film[1], picture[1]], each=False)) == [["b.mp4"], ["d.png"]]
    assert names(list_subjects([("video", films)], [], each=False)) == [["a.mp4"], ["b.mp4"], ["c.mp4"]]
    assert names(list_subjects([], [films], each=False)) == [["a.mp4"], ["b.mp4"], ["c.mp4"], ["d.png"]]
    assert names(list_subjects([("video", films), picture], [], each=True))[-1] == ["d.png"]
    assert names(list_subjects([("video", films / "[bc].mp4")], [], each=False)) == [["b.mp4"], ["c.mp4"]]
    with pytest.raises(click.UsageError):
        list_subjects([film], [picture[1]], each=False)


def test_names_that_say_nothing_and_names_like_patterns(tmp_path: Path, film: Path) -> None:
    shutil.copyfile(film, tmp_path / "recording")
    shutil.copyfile(film, tmp_path / "clip[1].mp4")
    (tmp_path / "report").write_text("words")
    (tmp_path / "folder.mp4").mkdir()
    assert names(list_subjects([("video", tmp_path)], [], each=False)) == [["clip[1].mp4"], ["recording"]]
    assert names(list_subjects([("video", tmp_path / "clip[1].mp4")], [], each=False)) == [["clip[1].mp4"]]
    assert names(list_subjects([], [Path("a" * 300 + ".mp4")], each=False)) == [["a" * 300 + ".mp4"]]
    for nothing in (tmp_path / "folder.mp4", tmp_path / "*.png"):
        with pytest.raises(VideoError, match="holds no"):
            list_subjects([("video", nothing)], [], each=False)


def test_a_damaged_file_is_what_its_name_says(films: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    kinds = [list_subjects([], [path], each=False)[0].kinds() for path in (films / "a.mp4", tmp_path / "x.png")]
    assert kinds == [["video"], ["image"]]
    with pytest.raises(VideoError, match="neither a film nor a picture"):
        list_subjects([], [films / "notes.txt"], each=False)[0].kinds()


@pytest.mark.slow
def test_a_shells_pattern_a_pipe_and_head(bundle: Path, films: Path, tmp_path: Path) -> None:
    """As somebody types it, in a shell and a folder of its own."""
    run = f"{sys.executable} -c 'from framefusion.start import ff_run; ff_run()' generate {bundle} -n {NEW}"
    line = f"set -o pipefail; echo 'What?' | {run} {films}/[bc].mp4 -p - --jsonl | head -1; echo ${{PIPESTATUS[1]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    shown, status = done.stdout.splitlines()
    assert json.loads(shown)["files"] == [f"{films}/b.mp4"]
    assert (status in ("0", "141"), done.stderr) == (True, "")
