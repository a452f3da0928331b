"""`lmms-eval --model framefusion`: requests read and refused; then lmms-eval itself, run on films of its own.

lmms-eval and what it imports stay out of the development environment (it holds PyAV below 16): the slow tests put them
into an environment of their own that sees this one's packages behind its own. No hub is asked.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framefusion.errors import EvaluationError
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.evaluate.lmms_eval.requests import TaskQuestion, decoding_of, question_of
from framefusion.export.options import BuildOptions
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.media.sources import as_image
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.conftest import made_once
from tests.runtime.server.conftest import serving
from tests.wheel import ROOT, build_wheel
from tools.tiny import clips

TRAINED = ROOT / "tests" / "models" / "tiny_qwen2_vl"
MOST, QUESTIONS = 8, 40
FRAMES = 16
COST = (
    0.1  # at which some answers are wrong: uniform sampling by a bundle, FrameFusion live with transformers' positions
)


# --- Requests -------------------------------------------------------------------------------------------------------


def message(role: str, *contents: tuple[str, Any]) -> Any:
    parts = [
        SimpleNamespace(type=kind, text=content, url=content, start_time=None, end_time=None)
        for kind, content in contents
    ]
    return SimpleNamespace(role=role, content=parts)


def question(*contents: tuple[str, Any]) -> TaskQuestion:
    return question_of("films/test/3", [message("user", *contents)])


def test_a_conversation_as_the_answerers_take_it(film: Path) -> None:
    picture, frames = Image.new("L", (30, 20), 7), np.zeros((4, 28, 28, 3), np.uint8)
    begun = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Yes?"))
    said = [message(role, ("text", text)) for role, text in begun]
    shown = [
        ("video", str(film)),
        ("image", picture),
        ("text", "One"),
        ("video", {"path": str(film)}),
        ("video", frames),
    ]
    question = question_of("films/test/3", [*said, message("user", *shown, ("text", "Two?"))])
    parts = (Visual.VIDEO, Visual.IMAGE, "One", Visual.VIDEO, Visual.VIDEO, "Two?")
    turns = [Turn("user", ("Hello.",)), Turn("assistant", ("Yes?",)), Turn("user", parts)]
    assert question.turns() == [Turn("system", ("Be brief.",)), *turns]
    assert question.turns("Another.") == [Turn("system", ("Another.",)), *turns]
    files: list[Any] = question.files
    assert [files[0], files[2]] == [film, film]
    assert as_image(files[1]).shape == (20, 30, 3)
    assert files[3] is frames
    other = question_of("films/test/4", [message("user", *shown, ("text", "Two?"))])
    assert (
        question.key == question_of("films/test/3", [*said, message("user", *shown, ("text", "Two?"))]).key != other.key
    )


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ([("audio", "a.wav")], "holds audio"),
        ([("video", "gone.mp4")], r"films/test/3 shows gone\.mp4, which is no file"),
        ([("video", 7)], "shows a int"),
        ([("video", {"path": "a.mp4", "video_start": 2.0})], "part of a film"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(contents: list[tuple[str, Any]], problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem):
        question(*contents)


def test_conversations_that_cannot_be_answered_are_refused_by_name(film: Path) -> None:
    shown = message("user", ("video", str(film)), ("text", "What?"))
    with pytest.raises(EvaluationError, match="num_fewshot 0"):
        question_of("films/test/3", [shown, message("assistant", ("text", "That.")), shown])
    for messages in ([], [shown, message("assistant", ("text", "That."))]):
        with pytest.raises(EvaluationError, match="does not end with a message of the user"):
            question_of("films/test/3", messages)


@pytest.mark.parametrize(
    ("generation_kwargs", "most", "cut"),
    [
        ({}, 99, "a.b\nc"),
        ({"max_new_tokens": 5, "until": "\n", "do_sample": False, "temperature": 0.7}, 5, "a.b"),
        ({"until": ["", "x", "."], "temperature": 0, "top_p": 1.0, "num_beams": 1}, 99, "a"),
    ],
)
def test_generation_kwargs(generation_kwargs: dict[str, Any], most: int, cut: str) -> None:
    decoding = decoding_of(generation_kwargs, 99)
    assert decoding.max_new_tokens == most
    assert decoding.cut("a.b\nc") == cut


@pytest.mark.parametrize("generation_kwargs", [{"do_sample": True}, {"temperature": 0.2}, {"num_beams": 3}])
def test_sampling_is_refused_by_name(generation_kwargs: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="--gen_kwargs do_sample=False"):
        decoding_of(generation_kwargs, 99)


# --- lmms-eval itself -----------------------------------------------------------------------------------------------

PINNED = "lmms-eval==0.7.3"
IMPORTED = (
    "datasets",
    "evaluate",
    "sacrebleu",
    "pytablewriter",
    "loguru",
    "tenacity",
    "pytz",
    "aiohttp",
    "requests",
    "filelock<4",
    "python-dotenv",
)
"""What it imports for a task like ours, of the sixty packages it asks for."""
KEPT = ("torch", "transformers", "huggingface-hub", "tokenizers", "numpy", "av", "pillow")
SCHEMAS = """\
import torch

declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""torchvision's index holds builds for CUDA, whose compiled operators do not load beside torch's build for the CPU, and
without their schemas it cannot be imported. transformers' video processors use none of them."""

EXAMPLE = ROOT / "examples" / "lmms_eval"  # the task that docs/evaluation.md shows
CHOICES = """\
task: drawn_choices
include: drawn_clips.yaml
output_type: multiple_choice
doc_to_choice: ["red", "blue"]
metric_list:
  - metric: acc
"""


def python(home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(home / "bin" / "python"), *map(str, arguments)]
    environment = alone | offline | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)


def pip(home: Path, *arguments: object) -> str | None:
    """Install; returns what pip said where the index cannot be reached."""
    done = python(home, "-m", "pip", "install", "--no-input", "--retries", "1", "--timeout", "20", *arguments)
    log = done.stdout + done.stderr
    if done.returncode and ("from versions: none" in log or "connection" in log.lower()):
        return log
    assert done.returncode == 0, log
    return None


def make_home(home: Path) -> None:
    """An environment with lmms-eval and the wheel of this tree; everything else is seen through a path file."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "development.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (home / "kept.txt").write_text("".join(f"{name}=={importlib.metadata.version(name)}\n" for name in KEPT))
    missing = pip(home, "--no-deps", PINNED) or pip(home, "-c", home / "kept.txt", *IMPORTED, "torchvision")
    if missing is not None:
        (home / "missing").write_text(missing)
        return
    if "torchvision::nms does not exist" in python(home, "-c", "import torchvision").stderr:
        (site / "sitecustomize.py").write_text(SCHEMAS)
    (home / "wheel").mkdir()
    assert pip(home, "--no-deps", "--no-index", build_wheel(home / "wheel")) is None


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_once(tmp_path_factory, "lmms-eval", make_home)
    if (folder / "missing").exists():
        said = (folder / "missing").read_text().strip().splitlines()[-1]
        pytest.skip(f"the package index cannot be reached, so lmms-eval was not run: {said}")
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task, its questions, one a line, and their films."""
    return made_once(tmp_path_factory, "drawn-clips", write_task)


def write_task(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for index in range(QUESTIONS):
        seed, kind = clips.HELD_OUT + 800_000 + index, clips.KINDS[index % len(clips.KINDS)]
        clip, film = clips.draw_clip(seed, kind=kind), folder / f"{index}.mp4"
        clips.write_mp4(film, clips.scene_for(seed, kind))
        rows.append({"video": str(film), "question": clip.question, "answer": clip.answer, "type": kind})
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = (EXAMPLE / "my_films.yaml").read_text(encoding="utf-8")
    for shown, ours in (
        ("task: my_films", "task: drawn_clips"),
        ("test: questions.jsonl", f"test: {questions}"),
        ("max_new_tokens: 16", f"max_new_tokens: {MOST}"),
    ):
        assert task.count(shown) == 1
        task = task.replace(shown, ours)
    (folder / "drawn_clips.yaml").write_text(task)
    (folder / "drawn_choices.yaml").write_text(CHOICES)
    shutil.copy(EXAMPLE / "shown.py", folder)


@pytest.fixture(scope="module")
def trained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "trained-bundle", lambda folder: build(Checkpoint(TRAINED), folder, BuildOptions())
    )


def lmms_eval(home: Path, task: Path, *arguments: object, name: str = "drawn_clips", model: str = "framefusion") -> str:
    """The command, as the documentation has it; returns what it said."""
    common = ("--include_path", task, "--tasks", name, "--batch_size", "1")
    done = python(home, home / "bin" / "lmms-eval", "eval", "--model", model, *common, *arguments)
    return done.stdout + done.stderr


def score(home: Path, task: Path, output: Path, model_args: str) -> int:
    """Right answers by lmms-eval's own report."""
    log = lmms_eval(home, task, "--model_args", model_args, "--output_path", output)
    reports = list(output.rglob("*_results.json"))
    assert len(reports) == 1, log
    assert f"{QUESTIONS} answers: keeps " in log
    assert "|drawn_clips|" in log
    found: float = QUESTIONS * json.loads(reports[0].read_text())["results"]["drawn_clips"]["exact_match,none"]
    assert found == pytest.approx(round(found), abs=1e-6)
    return round(found)


@pytest.mark.slow
def test_the_score_of_a_bundle_is_ours(home: Path, task: Path, trained_bundle: Path, tmp_path: Path) -> None:
    """lmms-eval's count of right answers is that of the pipeline, which is asked here without any of it."""
    pipeline = Pipeline(Bundle(trained_bundle), threads=1)
    rows = [json.loads(line) for line in (task / "questions.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        prompt, rows_of_film = pipeline.read([Turn("user", (Visual.VIDEO, row["question"]))], [Path(row["video"])])
        request = Request(MOST, COST, reducer="uniform")
        right += pipeline.answer(prompt, rows_of_film, request).text.strip() == row["answer"]
    assert 0.5 * QUESTIONS < right < QUESTIONS, "answers mean something, and not all are right"
    settings = f"pretrained={trained_bundle},reducer=uniform,cost={COST},threads=1"
    assert score(home, task, tmp_path / "report", settings) == right


@pytest.mark.slow
def test_the_score_of_a_live_model_is_ours(home: Path, task: Path, tmp_path: Path) -> None:
    """transformers' own model under apply_framefusion, against `ff-export eval` on the same lines."""
    condition = ("--reducer", "framefusion", "--cost", COST, "--max-new-tokens", MOST, "--threads", 1, "--json")
    ours = python(
        home, home / "bin" / "ff-export", "eval", TRAINED, "--questions", task / "questions.jsonl",
        "--live", "transformers", *condition,
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    (row,) = json.loads(ours.stdout)["accuracy"]
    assert 0.5 * QUESTIONS < row["right"] < QUESTIONS
    settings = f"pretrained={TRAINED},live=transformers,threads=1,cost={COST},reducer=framefusion"
    assert score(home, task, tmp_path / "report", settings) == row["right"]


@pytest.mark.slow
def test_the_score_of_a_server_is_ours(home: Path, task: Path, trained_bundle: Path, tmp_path: Path) -> None:
    """lmms-eval's own client of OpenAI's protocol, which asks a server that reduces."""
    condition = Request(MOST, COST, temperature=0)
    rows = [json.loads(line) for line in (task / "questions.jsonl").read_text().splitlines()]
    with Pipeline(trained_bundle, threads=1) as pipeline:
        sampling = pipeline.manifest.sampling.spread(FRAMES)
        right = [
            pipeline.generate(row["question"], [row["video"]], condition, sampling=sampling).text.strip()
            == row["answer"]
            for row in rows
        ]
    flags = ("--allowed-local-media-path", task, "--cost", COST, "--max-waiting", QUESTIONS)
    with serving(tmp_path, *flags, bundle=trained_bundle) as server:
        settings = (
            f"model_version=tiny,base_url={server.url}/v1,api_key=none,pass_video_url=True,max_frames_num={FRAMES}"
        )
        report = tmp_path / "report"
        log = lmms_eval(home, task, "--model_args", settings, "--output_path", report, model="openai")
    reports = list(report.rglob("*_results.json"))
    assert len(reports) == 1, log
    score = json.loads(reports[0].read_text())["results"]["drawn_clips"]["exact_match,none"]
    assert score == pytest.approx(sum(right) / QUESTIONS, abs=1e-6)
    assert 0.5 * QUESTIONS < sum(right) < QUESTIONS


REFUSED = {
    "pretrained={bundle},const=0.3": "model_args const=0.3 is unknown: known are cost,",
    "pretrained={bundle},device=cuda": "device=cuda and dtype=float32 are for a live checkpoint",
    "pretrained={bundle},reducer=none,cost=0.3": "reducer none drops nothing",
    "pretrained={bundle},batch_size=4": "--batch_size 4: requests are answered one by one",
    "pretrained={trained},live=transformers,dtype=int8": "dtype=int8 is unknown: known are float32",
    "pretrained={trained},live=transformers,device=nowhere": "device=nowhere cannot be had",
    "pretrained={bundle},cost=0.3": "choose the task's variant of output_type generate_until",
    "pretrained={trained},live=transformers,device=cpu,dtype=bfloat16": "(transformers ",
}
ASKED = """\
import json, sys
from framefusion.errors import EvaluationError
from framefusion.export.evaluate.lmms_eval.model import FrameFusionModel
from framefusion.export.evaluate.lmms_eval.requests import decoding_of, question_of
from lmms_eval.models import get_model, list_available_models
from lmms_eval.protocol import ChatMessages

assert "framefusion" in list_available_models()
assert get_model("framefusion") is FrameFusionModel
said = {}
for settings in json.loads(sys.argv[1]):
    try:
        model = FrameFusionModel.create_from_arg_string(settings)
        if "dtype" in settings:
            contents = [{"type": "video", "url": sys.argv[2]}, {"type": "text", "text": "What moves?"}]
            question = question_of("a/b/1", ChatMessages(messages=[{"role": "user", "content": contents}]).messages)
            answer = model._answer(question, decoding_of({}, 4))
            assert answer.text and answer.reached < 1, answer
            said[settings] = model.answerer.engine
        else:
            model.loglikelihood([])
    except EvaluationError as error:
        said[settings] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_the_model_as_lmms_eval_finds_it(home: Path, task: Path, trained_bundle: Path) -> None:
    """Registered by the entry point; what it cannot do is refused by name; in bfloat16 it answers."""
    expected = {args.format(bundle=trained_bundle, trained=TRAINED): phrase for args, phrase in REFUSED.items()}
    done = python(home, "-c", ASKED, json.dumps(list(expected)), task / "0.mp4")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for settings, phrase in expected.items():
        assert phrase in said[settings]
    assert said[next(reversed(expected))].endswith("on cpu in bfloat16")


@pytest.mark.slow
def test_lmms_eval_stops_where_the_model_cannot_answer(home: Path, task: Path, trained_bundle: Path) -> None:
    """A task that compares likelihoods: lmms-eval itself refuses it for models of its chat protocol."""
    log = lmms_eval(home, task, "--model_args", f"pretrained={trained_bundle}", name="drawn_choices")
    assert "messages is used for generation only" in log
    assert "answers: keeps" not in log
