"""A watched answer and its page: the answer of an unwatched run, its own numbers, nothing from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framefusion.errors import BudgetError, CheckpointError, StorageError, VideoError
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.view import view
from framefusion.runtime.view.page import page
from framefusion.runtime.view.timing import Timings, headline, timing_facts
from framefusion.runtime.view.view import SIDES, Watched, facts, fates, stored_size, watch
from tests.commands import assert_refused, export, run
from tests.films import write_film
from tests.patience import PATIENCE
from tests.tiers import in_tiers
from tests.versions import needs_torch

REQUEST = Request(max_new_tokens=4, cost=0.4, similarity_lower_bound=0.97)
QUESTION = "What happens? </script><b>&"
TURNS = [Turn("user", (Visual.VIDEO, Visual.IMAGE, QUESTION))]


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)

    @property
    def facts(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.scripts[0])
        return told


@pytest.fixture(scope="module")
def watched(pipeline: Pipeline, film: Path, picture: Path) -> Watched:
    return watch(pipeline, TURNS, [film, picture], REQUEST, compare=True)


@pytest.fixture(scope="module")
def told(watched: Watched, pipeline: Pipeline) -> dict[str, Any]:
    return facts(watched, pipeline, "tiny <b>")


# --- What is watched ------------------------------------------------------------------------------------------------


def test_watching_changes_nothing(watched: Watched, pipeline: Pipeline, film: Path, picture: Path) -> None:
    plain = pipeline.generate(TURNS, [film, picture], REQUEST)
    for field in dataclasses.fields(plain):
        if field.name not in ("seconds", "shown"):  # thumbnails are for who shows an answer without this page
            assert getattr(watched.answer, field.name) == getattr(plain, field.name), field.name
    dense = pipeline.generate(TURNS, [film, picture], dataclasses.replace(REQUEST, cost=1.0))
    assert watched.dense is not None
    assert watched.dense.token_ids == dense.token_ids
    assert watched.dense.kv_lengths == dense.kv_lengths


def test_without_an_observer_nothing_is_taken_down(pipeline: Pipeline, film: Path) -> None:
    prompt, rows = pipeline.read([Turn("user", (Visual.VIDEO, "What?"))], [film])
    reduction = pipeline.reduction(prompt, REQUEST)
    assert reduction is not None
    assert reduction.observer is None
    prefill(pipeline.segments, rows, reduction, 1, Stopwatch())
    assert not [name for name, value in vars(reduction).items() if isinstance(value, np.ndarray) and name != "labels"]


def test_fates_are_those_of_the_kept_tokens(watched: Watched) -> None:
    left, steps = fates(watched)
    assert {step["kind"] for step in steps} >= {"merge", "prune"}, "ask for bounds at which both happen"
    assert np.flatnonzero(left < 0).tolist() == watched.kept.tolist()
    visual = watched.prompt.labels >= 0
    for number, (step, record) in enumerate(zip(steps, watched.answer.reduction, strict=False)):
        assert np.count_nonzero(visual & ((left < 0) | (left > number))) == record.visual_after == step["visual_after"]


@needs_torch
@pytest.mark.slow
def test_the_static_graph_tells_what_is_left(checkpoint: Path, film: Path, tmp_path: Path) -> None:
    from framefusion.export.options import BuildOptions
    from tests.families.eager import eager_pipeline

    options = BuildOptions(reduction="fixed", cost=0.4, merge_shares=(0.3,), prune_layer=1, max_frames=8)
    fixed = eager_pipeline(checkpoint, tmp_path / "fixed", options)
    watched = watch(fixed, [Turn("user", (Visual.VIDEO, "What?"))], [film], Request(max_new_tokens=2), compare=True)
    left, (step,) = fates(watched)
    assert (step["kind"], step["calls"]) == ("static", [0, 2])
    assert np.flatnonzero(left < 0).tolist() == watched.kept.tolist()
    assert np.count_nonzero(left < 0) == watched.answer.kv_lengths[-1]
    assert watched.dense is not None
    assert set(watched.dense.kv_lengths) == {watched.prompt.token_ids.size}
    told = facts(watched, fixed, "fixed")
    assert told["histograms"] == []
    assert told["settings"]["schedule"]["prune_layer"] == 1


def test_nothing_to_compare_is_refused(pipeline: Pipeline, film: Path) -> None:
    with pytest.raises(BudgetError, match=r"cost 1\.0 keeps all"):
        watch(pipeline, TURNS[:1], [film], Request(cost=1.0), compare=True)


# --- What is told ---------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_answer(watched: Watched, told: dict[str, Any], pipeline: Pipeline) -> None:
    page_facts, answer = Page(page(told)).facts, watched.answer
    assert page_facts == json.loads(json.dumps(told))
    own, model = page_facts["reduced"], pipeline.manifest.model
    assert "layers" not in own  # `Generation.kept` reads it; the page has the steps
    for field in dataclasses.fields(answer):
        if field.name in ("layers", "shown"):
            continue
        value = getattr(answer, field.name)
        plain = [dataclasses.asdict(one) for one in value] if field.name in ("reduction", "videos") else value
        assert own[field.name] == (list(plain) if isinstance(plain, tuple) else plain), field.name
    caches = pipeline.prefill(*pipeline_inputs(watched, pipeline), watched.request, Stopwatch()).caches
    used = sum(
        length * (key.dtype.itemsize * 2 * model.num_kv_heads * model.head_dim)
        for cache in caches
        for length, key in zip(cache.lengths.tolist(), cache.keys, strict=True)
    )
    assert own["kv_bytes"] == used
    assert own["cost"] == answer.cost
    assert 0 < own["flops_kept"] < 1
    assert page_facts["dense"]["flops_kept"] == 1
    assert len(page_facts["left"]) == watched.prompt.row_places.size


def pipeline_inputs(watched: Watched, pipeline: Pipeline) -> tuple[Any, Any]:
    visuals = pipeline.preprocess(watched.media, Stopwatch())
    return watched.prompt, pipeline.embed(watched.prompt, [pipeline.encode_visual(visual) for visual in visuals])


def test_histograms_count_every_pair(watched: Watched, told: dict[str, Any]) -> None:
    assert told["histograms"]
    for one, decision in zip(told["histograms"], watched.decisions, strict=False):
        assert decision.similarity is not None
        pairs = decision.similarity[decision.similarity >= -1]
        assert sum(one["counts"]) == pairs.size
        assert one["median"] == pytest.approx(float(np.median(pairs)))
        low, high = one["edges"]
        edges = np.linspace(low, high, len(one["counts"]) + 1)
        for edge in edges[1:-1]:  # edges fall between floats: compare counts from each edge on
            above = sum(n for n, left in zip(one["counts"], edges, strict=False) if left >= edge - 1e-12)
            assert np.count_nonzero(pairs >= edge + 1e-6) <= above <= np.count_nonzero(pairs >= edge - 1e-6)


def test_every_row_has_a_box_on_a_stored_picture(watched: Watched, told: dict[str, Any]) -> None:
    boxes = [told["boxes"][panel["boxes"]] for visual in told["visuals"] for panel in visual["panels"]]
    assert sum(map(len, boxes)) == len(told["left"])
    for visual in told["visuals"]:
        for url in visual["pictures"]:
            kind, data = url.split(",", 1)
            assert kind == "data:image/webp;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == tuple(visual["stored"])
        assert {frame for panel in visual["panels"] for frame in panel["frames"]} == set(range(len(visual["pictures"])))


@pytest.mark.parametrize("count", [1, 8, 64, 128])
def test_pictures_of_a_page_have_the_same_pixels_together(count: int) -> None:
    width, height = stored_size(1920, 1080, count)
    assert SIDES[0] <= width <= SIDES[1]
    assert abs(width / height - 16 / 9) < 0.03
    assert count * width * height < 3.8e6
    assert stored_size(90, 60, count) == (90, 60)


def test_a_page_of_64_frames_is_below_two_megabytes(pipeline: Pipeline) -> None:
    """Noise is the worst that a film can be: JPEG-like codecs find nothing to leave out."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 180, 320, 3), np.uint8)
    smooth = np.repeat(np.repeat(noise[:, ::8, ::8], 8, axis=1), 8, axis=2)  # a block is as hard as a film gets
    assert sum(len(view.stored_picture(frame, 64)) for frame in smooth) < 2e6


def test_every_merged_row_says_who_took_it(watched: Watched, told: dict[str, Any]) -> None:
    left, into, similar, took = (np.array(told[name], float) for name in ("left", "into", "similar", "took"))
    merges = [step for step, about in enumerate(told["steps"]) if about["kind"] == "merge"]
    assert merges
    merged = np.isin(left, merges)
    assert (into[merged] >= 0).all(), "all visual rows of a film merge into rows"
    assert (into[~merged] == -1).all()
    assert np.isfinite(similar[merged]).all()
    assert REQUEST.similarity_lower_bound is not None
    assert (similar[merged] >= REQUEST.similarity_lower_bound - 1e-4).all()
    for row in np.flatnonzero(merged):  # whoever takes a token is there after that call, and so is what it stands for
        taker = int(into[row])
        assert left[taker] < 0 or left[taker] > left[row]
    stays = left < 0
    gone = np.isin(left, [step for step in range(len(told["steps"])) if step not in merges])
    assert took[stays].sum() + took[gone].sum() + gone.sum() + stays.sum() == left.size


# --- What the page begins with --------------------------------------------------------------------------------------


def runs(*seconds: float) -> list[Mapping[str, float]]:
    return [{"prefill": spent, "reduction": 0.0} for spent in seconds]


@pytest.mark.parametrize(
    ("reduced", "dense", "begins"),
    [
        (runs(1.0, 1.1, 0.9), runs(4.0, 4.2, 3.9), "2.5x faster first token"),
        (runs(1.0, 1.1, 4.0), runs(4.0, 4.2, 3.9), "First token as soon as with every token"),
        (runs(1.0, 1.0, 1.0), runs(1.04, 1.04, 1.04), "First token as soon as with every token"),
        (runs(4.0, 4.0, 4.0), runs(1.0, 1.0, 1.0), "First token 2.5x slower"),
        (runs(1.0), runs(4.0), "2.5x faster first token, timed once"),
    ],
)
def test_nothing_is_claimed_that_noise_explains(
    watched: Watched, reduced: list[Mapping[str, float]], dense: list[Mapping[str, float]], begins: str
) -> None:
    assert watched.dense is not None
    timing = timing_facts(Timings({"video": 0.6, "vision": 0.4}, reduced, dense), watched.answer, watched.dense)
    claim = headline(timing, watched.answer, watched.dense)[0]
    assert claim["text"] == begins
    assert claim["strong"] == begins.endswith("faster first token")


def test_the_beginning_says_whether_the_answers_are_the_same(watched: Watched, told: dict[str, Any]) -> None:
    assert watched.dense is not None
    assert [len(watched.timings.reduced), len(watched.timings.dense)] == [3, 3]
    same = watched.answer.text == watched.dense.text
    assert told["headline"][1] == {"text": "same answer" if same else "another answer", "strong": same}
    other = dataclasses.replace(watched.answer, token_ids=(*watched.answer.token_ids[:-1], 0))
    assert headline(told["timing"], watched.answer, other)[1]["text"] == "another answer", "the tokens count"
    assert headline(told["timing"], watched.answer, watched.answer)[1]["text"] == "same answer"
    text = watched.answer.prompt_tokens - watched.answer.visual_tokens
    share = (watched.answer.kv_lengths[-1] - text) / watched.answer.visual_tokens
    assert told["headline"][2]["text"].startswith(f"{share:.0%} of" if share >= 0.0995 else f"{share:.1%} of")


# --- The page -------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(told: dict[str, Any]) -> None:
    text = page(told)
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "action", "data", "poster", "srcset"} & set(attributes), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    code = text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", code)


def test_the_page_is_written_for_people_with_and_without_a_screen(told: dict[str, Any]) -> None:
    text = page(told)
    names = dict(Page(text).tags)
    assert names["html"]["lang"] == "en"
    assert "width=device-width" in (next(a for t, a in Page(text).tags if a.get("name") == "viewport")["content"] or "")
    assert "prefers-color-scheme: dark" in text
    assert "aria-live" in text
    assert {"main", "noscript", "title"} <= set(names)


def test_what_is_said_cannot_leave_its_place(told: dict[str, Any]) -> None:
    parsed = Page(page(told))
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert "b" not in [tag for tag, _ in parsed.tags]
    assert parsed.facts["turns"][-1]["parts"][-1] == {"text": QUESTION}
    assert parsed.facts["name"] == "tiny <b>"


def test_a_place_that_an_answer_spells_is_not_filled_in(told: dict[str, Any]) -> None:
    turns = [{"role": "user", "parts": [{"text": "{{script}} {{name}}"}]}]
    parsed = Page(page(told | {"name": "{{facts}}", "turns": turns}))
    assert (parsed.facts["name"], parsed.facts["turns"]) == ("{{facts}}", turns)
    assert page(told | {"name": "{{facts}}"}).count("<title>{{facts}}: ") == 1


def test_text_alone_has_a_page(pipeline: Pipeline) -> None:
    watched = watch(pipeline, [Turn("user", ("What is 1 + 1?",))], [], Request(max_new_tokens=2))
    told = Page(page(facts(watched, pipeline, "tiny"))).facts
    assert (told["visuals"], told["left"], told["steps"]) == ([], [], [])


# --- The commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [run, export])
def test_a_bundle_is_viewed(command: Callable[..., Any], bundle: Path, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    asked = ("--video", film, "--prompt", "What?", "--max-new-tokens", 2, "--compare", "--json")
    result = command("view", bundle, *asked, "-o", out)
    assert result.exit_code == 0, result.output
    told, drawn = json.loads(result.stdout), Page(out.read_text(encoding="utf-8")).facts
    assert (told["page"], told["bytes"]) == (str(out), out.stat().st_size)
    for name in ("text", "token_ids", "prompt_tokens", "visual_tokens", "kv_lengths", "reduction"):
        assert told[name] == drawn["reduced"][name], name
    assert drawn["backend"] == "onnxruntime"
    assert drawn["dense"]["prompt_tokens"] == drawn["reduced"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("module", "command"), in_tiers([("runtime", "ff_run"), ("export", "ff_export")], fast=1, several=True)
)
def test_a_bundle_is_viewed_without_torch(module: str, command: str, bundle: Path, film: Path, tmp_path: Path) -> None:
    asked = ["view", str(bundle), "--video", str(film), "--prompt", "What?", "-o", str(tmp_path / "report.html")]
    code = f"""
import sys
from framefusion.{module}.commands.cli import {command}
try:
    {command}({asked})
except SystemExit as done:
    assert not done.code, done
assert not {{"torch", "transformers", "onnx"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr


@needs_torch
def test_a_checkpoint_is_viewed_as_its_bundle_is(checkpoint: Path, bundle: Path, film: Path, tmp_path: Path) -> None:
    pages: list[dict[str, Any]] = []
    for model in (checkpoint, bundle):
        out = tmp_path / f"{model.name}-{len(pages)}.html"
        asked = ("--video", film, "--prompt", "What?", "--max-new-tokens", 2, "--cost", 0.5)
        result = export("view", model, *asked, "--similarity-lower-bound", 0.9, "-o", out)
        assert result.exit_code == 0, result.output
        pages.append(Page(out.read_text(encoding="utf-8")).facts)
    eager, compiled = pages
    assert eager["backend"] == "eager"
    assert eager["reduced"]["token_ids"] == compiled["reduced"]["token_ids"]
    assert eager["visuals"] == compiled["visuals"]


def test_bad_input_is_refused(bundle: Path, film: Path, tmp_path: Path) -> None:
    asked = ("--prompt", "What?", "-o")
    missing = tmp_path / "none" / "report.html"
    assert_refused(run("view", bundle, "--video", film, *asked, missing), StorageError, str(missing))
    assert_refused(run("view", bundle, "--video", film, *asked, tmp_path), StorageError, str(tmp_path))
    gone = tmp_path / "gone.mp4"
    assert_refused(run("view", bundle, "--video", gone, *asked, tmp_path / "r.html"), VideoError, str(gone))
    assert list(tmp_path.iterdir()) == []


@needs_torch
def test_a_folder_without_a_model_is_refused(film: Path, tmp_path: Path) -> None:
    result = export("view", tmp_path, "--video", film, "--prompt", "What?", "-o", tmp_path / "r.html")
    assert_refused(result, CheckpointError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_film_of_many_frames(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    film = write_film(tmp_path / "long.mp4", frames=64, fps=2)
    watched = watch(pipeline, [Turn("user", (Visual.VIDEO, "What?"))], [film], Request(max_new_tokens=1))
    assert len(page(facts(watched, pipeline, "tiny"))) < 2e6
