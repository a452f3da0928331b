"""The flags of a question: where its text comes from, what they set, and which frames a number of them takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from framefusion.errors import PromptError, VideoError
from framefusion.runtime import families  # noqa: F401  its import makes the rules known
from framefusion.runtime.commands import generate as generate_module
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.commands.question import prompt_text
from framefusion.runtime.commands.question.prompt_text import read_prompt
from framefusion.runtime.media.frame_sampling import RULES, FrameSampling, sample_indices
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual

NEW = 8


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
    """A bundle takes its time to open: here it is open already."""
    monkeypatch.setattr(generate_module, "open_pipeline", lambda *_, **__: pipeline)


def generate(bundle: Path, *flags: object, stdin: str | None = None) -> Result:
    arguments = ["generate", bundle, "-n", NEW, *flags]
    return CliRunner().invoke(ff_run, [str(argument) for argument in arguments], input=stdin)


def facts(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


@pytest.mark.usefixtures("opened")
def test_short_flags_are_the_long_ones(bundle: Path, film: Path, picture: Path) -> None:
    short = facts(generate(bundle, "-v", film, "-i", picture, "-p", "What?", "-t", 0, "--json"))
    long = facts(
        generate(bundle, "--video", film, "--image", picture, "--prompt", "What?", "--temperature=0", "--json")
    )
    assert short["token_ids"] == long["token_ids"]
    assert len(short["token_ids"]) <= NEW


@pytest.mark.usefixtures("opened")
def test_a_question_from_standard_input(bundle: Path) -> None:
    plain = facts(generate(bundle, "-p", "What happens?", "--json"))
    piped = facts(generate(bundle, "-p", "-", "--json", stdin="What happens?\n"))
    assert (piped["prompt_tokens"], piped["token_ids"]) == (plain["prompt_tokens"], plain["token_ids"])


@pytest.mark.parametrize("content", ["What\nhappens?\n", "What\nhappens?\r\n", "\ufeffWhat\nhappens?"])
def test_a_question_from_a_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "question.txt").write_bytes(content.encode())
    assert read_prompt(f"@{tmp_path}/question.txt") == "What\nhappens?"


def test_what_a_prompt_begins_with() -> None:
    texts = {"@@home": "@home", "@@@": "@@", "-5 degrees?": "-5 degrees?", "--": "--", "a@b": "a@b", "": ""}
    assert {text: read_prompt(text) for text in texts} == texts


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (None, "cannot be read (No such file or directory): give a file, or @@"),
        (b"", "holds no question"),
        (b" \n", "holds no question"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"a" * 9, "has more than 8 bytes"),
    ],
)
def test_files_that_are_no_question(
    content: bytes | None, phrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_text, "LONGEST_PROMPT", 8)
    path = tmp_path / "q"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        read_prompt(f"@{path}")
    assert phrase in str(caught.value)


def test_standard_input_that_holds_nothing_is_refused(bundle: Path) -> None:
    result = generate(bundle, "-p", "-", stdin="")
    assert result.exit_code == PromptError.exit_code
    assert "standard input holds no question" in result.stderr


@pytest.mark.usefixtures("opened")
def test_stop_strings_and_the_penalty_are_those_of_python(bundle: Path, film: Path, pipeline: Pipeline) -> None:
    plain = facts(generate(bundle, "-v", film, "-p", "What?", "--json"))["text"]
    stop = (plain[4:6], plain[3:5])
    request = Request(NEW, stop=stop, repetition_penalty=1.7)
    expected = pipeline.generate([Turn("user", (Visual.VIDEO, "What?"))], [film], request)
    flags = ("--stop", stop[0], "--stop", stop[1], "--repetition-penalty", 1.7, "--json")
    given = facts(generate(bundle, "-v", film, "-p", "What?", *flags))
    assert (given["text"], given["token_ids"]) == (expected.text, list(expected.token_ids))
    stopped = facts(generate(bundle, "-v", film, "-p", "What?", *flags[:4], "--json"))
    assert stopped["text"] == plain[: min(plain.find(text) for text in stop)]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("flags", "phrase"), [(("--stop", ""), "stop is"), (("--repetition-penalty", 0), "between 0.01 and 100")]
)
def test_values_out_of_range_are_refused(bundle: Path, flags: tuple[object, ...], phrase: str) -> None:
    result = generate(bundle, "-p", "What?", *flags)
    assert result.exit_code == PromptError.exit_code
    assert phrase in result.stderr


@pytest.mark.usefixtures("opened")
def test_a_number_of_frames_is_taken(bundle: Path, film: Path, pipeline: Pipeline) -> None:
    given = facts(generate(bundle, "-v", film, "-p", "What?", "--num-frames", 6, "--json"))
    assert given["videos"][0]["sampled_frames"] == 6
    both = generate(bundle, "-v", film, "-p", "What?", "--num-frames", 6, "--fps", 1)
    assert both.exit_code == 2
    assert "leave one out" in both.stderr


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("total", [64, 300, 90_000])
def test_every_rule_spreads_a_number_of_frames(rule: str, force: bool, total: int) -> None:
    """Whatever rate the checkpoint has, and however long the film is."""
    base = FrameSampling(rule, fps=0.5, min_frames=2, max_frames=768, force=force)
    indices = sample_indices(total, 30.0, base.spread(8))
    assert indices.size == 8
    gaps = np.diff(indices)
    assert gaps.max() - gaps.min() <= 2
    assert total * 6 / 8 <= indices[-1] - indices[0] < total
    with pytest.raises(VideoError, match="give 4 or more"):
        replace(base, frame_factor=4).spread(2)
