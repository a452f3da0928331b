"""`ff-run bench`: what it counts, what it compares with, and when a difference is none."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from framefusion.errors import BudgetError, StorageError, VideoError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.commands.measure.bench import STAGES, faster, render, timed, ways_of
from framefusion.runtime.commands.measure.picture import BAR, BARS, check_picture, picture
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared

QUESTION = "What happens?"
NEW = 4


def bench(bundle: Path, film: Path, *flags: object) -> str:
    arguments = ["bench", bundle, "--video", film, "--prompt", QUESTION, "--max-new-tokens", NEW, *flags]
    result = CliRunner().invoke(ff_run, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_figures_are_those_of_the_answers(bundle: Path, film: Path, pipeline: Pipeline) -> None:
    facts = json.loads(bench(bundle, film, "--cost", "1,0.5,0.4", "--rounds", 2, "--json"))
    assert facts["rounds"] == 2
    assert [way["name"] for way in facts["ways"]] == ["cost 1", "cost 0.5", "cost 0.4"]
    turn = Turn("user", (Visual.VIDEO, QUESTION))
    for way, cost in zip(facts["ways"], (1.0, 0.5, 0.4), strict=True):
        answer = pipeline.generate([turn], [film], Request(NEW, cost=cost))
        assert way["text"] == answer.text
        assert way["cost"] == answer.cost
        assert way["visual_tokens_kept"] == answer.kv_lengths[-1] - (answer.prompt_tokens - answer.visual_tokens)
        assert way["same_answer"] == (answer.text == facts["ways"][0]["text"])
        first = way["first_token"]
        assert first["min_s"] <= first["median_s"] <= first["max_s"]
        waited = sum(way["stages"][stage]["min_s"] for stage in STAGES[:-1] if stage in way["stages"])
        assert first["max_s"] >= waited > 0
    kept = [way["visual_tokens_kept"] for way in facts["ways"]]
    assert facts["visual_tokens"] == kept[0] > kept[1] > kept[2]
    caches = [way["kv_bytes"] for way in facts["ways"]]
    assert caches == sorted(caches, reverse=True)
    assert facts["peak_resident_bytes"] > 10**7


def test_a_platform_that_does_not_tell_its_memory_is_measured_all_the_same(
    bundle: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    flags = ("--cost", 1, "--rounds", 1)
    assert json.loads(bench(bundle, film, *flags, "--json"))["peak_resident_bytes"] is None
    assert "peak memory" not in bench(bundle, film, *flags)


def test_the_table_fits_a_terminal(bundle: Path, film: Path) -> None:
    shown = bench(bundle, film, "--rounds", 1).splitlines()
    assert shown[0].split() == ["cost", "1", "cost", "0.5", "cost", "0.3"]
    assert max(len(line) for line in shown[:-1]) <= 100
    assert {line.split(",")[0].split("  ")[0] for line in shown} >= {"prefill", "decode", "KV cache", "tokens a second"}


def test_a_built_in_cost_is_compared_with_every_token(film: Path) -> None:
    flags = ("--rounds", 1, "--reducer", "framefusion", "--max-film-frames", 10**5)
    facts = json.loads(bench(shared("fixed-gqa"), film, *flags, "--json"))
    dense, built = facts["ways"]
    assert facts["visual_tokens"] == dense["visual_tokens_kept"] > built["visual_tokens_kept"]
    assert facts["backend"].startswith("backend: onnxruntime on ")


def test_the_limits_of_files_hold_without_a_reduction(film: Path) -> None:
    with Pipeline(Bundle(shared("fixed-gqa"), verify=False), threads=1) as fixed:
        fixed.limits = MediaLimits(film_frames=2)
        for way in ways_of(fixed, Request(NEW, reducer=fixed.manifest.reduction.reducer), ()):
            with pytest.raises(VideoError, match="frames"):
                timed(way, (Turn("user", (Visual.VIDEO, QUESTION)),), [film], fixed.manifest.sampling)


def test_costs_that_cannot_be_are_refused(bundle: Path, film: Path) -> None:
    arguments = ["bench", bundle, "--video", film, "--prompt", QUESTION, "--cost", "1,0"]
    result = CliRunner().invoke(ff_run, [str(argument) for argument in arguments])
    assert result.exit_code == BudgetError.exit_code
    assert "outside (0, 1]" in result.stderr


@pytest.mark.parametrize(
    ("least", "most", "said"), [(0.10, 0.20, "2.00x"), (0.10, 0.31, "no difference"), (0.35, 0.39, "no difference")]
)
def test_a_difference_within_the_spread_is_none(least: float, most: float, said: str) -> None:
    base = {"name": "cost 1", "first_token": {"min_s": 0.3, "median_s": 0.35, "max_s": 0.4}, "speed_up": 1.0}
    way = {"name": "cost 0.3", "first_token": {"min_s": least, "median_s": 0.15, "max_s": most}, "speed_up": 2.0}
    assert faster(way, base) == said
    assert faster(base, base) == "1.00x"


def test_a_stage_that_one_way_lacks_is_a_dash() -> None:
    spread = {"median_s": 1.0, "min_s": 1.0, "max_s": 1.0}
    way = {
        "name": "cost 1", "visual_tokens_kept": 0, "stages": {"prefill": spread}, "first_token": spread,
        "speed_up": 1.0, "tokens_per_second": None, "kv_bytes": 0, "same_answer": True,
    }  # fmt: skip
    other = way | {"name": "cost 0.3", "stages": {"prefill": spread, "reduction": spread}}
    facts = {
        "ways": [way, other], "rounds": 1, "prompt_tokens": 1, "visual_tokens": 0, "peak_resident_bytes": 1,
        "backend": None,
    }  # fmt: skip
    row = next(line for line in render(facts).splitlines() if line.startswith("reduction"))
    assert row.split() == ["reduction,", "s", "-", "1.000"]


def measured(**changes: object) -> dict[str, Any]:
    """What `measure` gives, of two ways; `changes` are of the second."""
    seconds = {"median_s": 2.0, "min_s": 1.9, "max_s": 2.2}
    stages = {"video": {"median_s": 0.5}, "prefill": {"median_s": 1.2}, "decode": {"median_s": 9.0}}
    way = {"name": "cost 1", "first_token": seconds, "stages": stages, "visual_tokens_kept": 256, "same_answer": True}
    other = way | {"name": "<cost & 0.3>", "visual_tokens_kept": 77, "speed_up": 1.0} | changes
    counts = {"rounds": 3, "prompt_tokens": 285, "visual_tokens": 256, "backend": "backend: onnxruntime on cpu; not x"}
    return counts | {"ways": [way | {"speed_up": 1.0}, other]}


def bars(svg: str) -> list[list[tuple[str, float, float]]]:
    """(stage, start, width) of each segment, by bar."""
    rows: dict[float, list[tuple[str, float, float]]] = {}
    for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        if element.get("height") == str(BAR):
            segment = (element.attrib["class"], float(element.attrib["x"]), float(element.attrib["width"]))
            rows.setdefault(float(element.attrib["y"]), []).append(segment)
    return list(rows.values())


def test_bars_of_the_picture_are_stages_side_by_side_up_to_the_first_token() -> None:
    quick = {"median_s": 1.0, "min_s": 0.9, "max_s": 1.0}
    dense, reduced = bars(picture(measured(first_token=quick, same_answer=False)))
    assert [stage for stage, _, _ in dense] == ["video", "prefill", "rest"]
    assert [stage for stage, _, _ in reduced] == ["video", "prefill"]  # their medians alone are more than the whole
    for bar in (dense, reduced):
        for (_, start, width), (_, following, _) in pairwise(bar):
            assert following == pytest.approx(start + width, abs=0.11)
    lengths = [sum(width for _, _, width in bar) for bar in (dense, reduced)]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.3)
    assert lengths[0] == pytest.approx(2.0 / 2.2 * BARS, abs=0.3)


def test_the_picture_says_its_figures_and_escapes_names() -> None:
    svg = picture(measured(same_answer=False))
    words = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"<cost & 0.3>", "2 s, no difference", "77 tokens kept, another answer"} <= set(words)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
def test_a_picture_replaces_a_picture_and_nothing_else(bundle: Path, film: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.svg"
    for _ in range(2):
        facts = json.loads(bench(bundle, film, "--cost", 1, "--rounds", 1, "--picture", path, "--json"))
    assert facts["picture"] == str(path)
    ElementTree.parse(path)
    (tmp_path / "mine.svg").write_text("<svg/>")
    for name in ("mine.svg", "bench.png", "missing/bench.svg", "."):
        with pytest.raises(StorageError):
            check_picture(tmp_path / name)
    assert (tmp_path / "mine.svg").read_text() == "<svg/>"
