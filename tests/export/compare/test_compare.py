"""`ff-export compare`: like against like, each way in a process of its own, and what cannot be compared is refused."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError, VideoError
from framefusion.export.compare.compare import _exchange, compare, render, require_memory, ways_of
from framefusion.export.compare.worker import TRANSFORMERS, Task, Way, opened
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.commands import export
from tests.families import CASES
from tests.films import write_film

QUESTION = "What happens?"


def task(bundle: Path, checkpoint: Path, *films: Path, new_tokens: int = 6) -> Task:
    turns = (Turn("user", (*(Visual.VIDEO for _ in films), QUESTION)),)
    return Task(checkpoint, bundle, turns, films, None, None, new_tokens, 1)


def facts(**changes: Any) -> dict[str, Any]:
    way = {
        "engine": "transformers",
        "way": "transformers",
        "cost": 1.0,
        "visual_tokens_kept": 13472,
        "first_token": {"median_s": 12.3456, "min_s": 11.0, "max_s": 13.0},
        "speed_up": 1.0,
        "read_s": 0.5,
        "tokens_per_second": 123.4,
        "peak_resident_bytes": 31_400_000_000,
        "token_ids": [1, 2],
        "same_answer": True,
    }
    other = way | {"engine": "tensorrt-rtx", "cost": 0.35, "first_token": way["first_token"], "same_answer": False}
    common = {"rounds": 5, "threads": 2, "dtype": "float32", "prompt_tokens": 13494, "visual_tokens": 13472}
    return common | {"ways": [way, other | changes]}


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    lines = render(facts()).splitlines()
    assert max(map(len, lines[:4])) <= 80
    assert "no difference" in lines[3]
    assert lines[3].endswith("other")
    assert "-" in render(facts(tokens_per_second=None, peak_resident_bytes=None)).splitlines()[3]


def test_every_way_is_dense_and_at_each_cost_once(bundle: Path) -> None:
    ways = ways_of(Bundle(bundle), (0.3, 1.0, 0.3))
    assert ways == [Way(engine, cost) for engine in (TRANSFORMERS, "onnxruntime") for cost in (1.0, 0.3)]


def test_a_bundle_that_decides_at_build_time_is_refused() -> None:
    manifest = Bundle(shared("bundle")).manifest
    fixed = Bundle(shared("bundle")).with_manifest(reduction=replace(manifest.reduction, mode="none"))
    with pytest.raises(BackendError, match="adaptive"):
        ways_of(fixed, (0.3,))


def test_more_processes_than_memory_holds_are_refused(bundle: Path) -> None:
    require_memory(Bundle(bundle), [Way(TRANSFORMERS, 1.0)] * 4)
    with pytest.raises(BackendError, match="give one --cost"):
        require_memory(Bundle(bundle), [Way(TRANSFORMERS, 1.0)] * 10**7)


@pytest.mark.parametrize("sent", [None, VideoError("no film")], ids=["killed", "failed"])
def test_a_process_that_ended_since_its_last_answer_is_named(sent: VideoError | None) -> None:
    """A pipe that broke is the process's, not that of standard output."""
    connection, other = multiprocessing.Pipe()
    if sent is not None:
        other.send(sent)
    other.close()
    expected = (
        (BackendError, r"the process of onnxruntime at cost 0\.3 ended") if sent is None else (VideoError, "film")
    )
    with pytest.raises(expected[0], match=expected[1]):
        _exchange(connection, Way("onnxruntime", 0.3), "answer")


@pytest.mark.parametrize(
    ("flags", "code", "phrase"),
    [
        (("--cost", "0.5,1.5"), 10, "cost 1.5 is outside"),
        (("-v", "none.mp4"), 11, "none.mp4"),
        ((), 2, "--video"),
    ],
    ids=["cost", "no such film", "no film"],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_built(
    flags: tuple[str, ...], code: int, phrase: str, tmp_path: Path
) -> None:
    """The checkpoint is an empty folder: whoever opened it first would say that."""
    film = ("-v", tmp_path / "film.mp4") if "--cost" in flags else ()
    result = export("compare", tmp_path, *film, "-p", QUESTION, *flags)
    assert (result.exit_code, phrase in result.output) == (code, True), result.output


@pytest.mark.slow
def test_all_ways_answer_the_same_tokens_dense_and_keep_as_many_reduced(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mp4")
    bundle = shared("bundle")
    flags = ("--cost", "0.5", "--rounds", 1, "--max-new-tokens", 6, "--threads", 1, "--json")
    result = export("compare", shared("checkpoint"), "--bundle", bundle, "-v", film, "-p", QUESTION, *flags)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    ways = {(way["engine"], way["cost"]): way for way in report["ways"]}
    assert len(ways) == 4
    for cost in (1.0, 0.5):
        theirs = ways[TRANSFORMERS, cost]
        ours = ways["onnxruntime", cost]
        assert theirs["token_ids"] == ours["token_ids"]
        assert len(ours["token_ids"]) > 1
        assert theirs["visual_tokens_kept"] == ours["visual_tokens_kept"]
    assert ways[TRANSFORMERS, 0.5]["visual_tokens_kept"] < ways[TRANSFORMERS, 1.0]["visual_tokens_kept"]
    assert all(way["first_token"]["median_s"] > way["read_s"] > 0 for way in report["ways"])
    # torch is in the processes of transformers alone
    assert ways["onnxruntime", 1.0]["peak_resident_bytes"] < 0.6 * ways[TRANSFORMERS, 1.0]["peak_resident_bytes"]


@pytest.mark.slow
def test_an_error_of_a_process_is_raised_here(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no film")
    question = task(shared("bundle"), shared("checkpoint"), tmp_path / "film.mp4")
    with pytest.raises(VideoError, match=r"film\.mp4"):
        compare([Way("onnxruntime", 1.0)], question, rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.family == "nvila"], ids=lambda case: case.family)
def test_a_family_without_a_class_is_refused_by_name(case: Any, tmp_path: Path) -> None:
    case.write(tmp_path, case.variants[0])
    with pytest.raises(BackendError, match="no class that takes a whole prompt"):
        opened(Way(TRANSFORMERS, 1.0), task(shared("bundle"), tmp_path))
