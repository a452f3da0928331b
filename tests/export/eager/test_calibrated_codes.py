"""Codes chosen by films: the same films give the same codes, the check proves them, the manifest names the films."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from framefusion.errors import BudgetError, CheckpointError, VideoError
from framefusion.export.build import check_again
from framefusion.export.check.verify import weight_report
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.calibrated_codes import calibrated_codes
from framefusion.export.eager.calibration_prompts import read_prompts
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan, replan
from framefusion.export.quantization.code_store import CodeStore
from framefusion.runtime.bundle import Bundle
from tests.commands import assert_refused, export, run
from tests.films import write_film

TRAINED = Path(__file__).parents[2] / "models" / "tiny_qwen2_vl"
LAYERS = 2
OPTIONS = BuildOptions(weights="int4:64", num_decoder_layer=LAYERS, depth=0, cost=0.6)


@pytest.fixture(scope="module", name="films")
def two_films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("films")
    return [write_film(folder / f"{seed}.mp4", frames=8, size=112, seed=seed) for seed in range(2)]


def chosen(folder: Path, films: list[Path], options: BuildOptions = OPTIONS) -> CodeStore:
    folder.mkdir()
    return calibrated_codes(Checkpoint(TRAINED), options, read_prompts(films), folder)[1]


@pytest.mark.slow
def test_the_same_films_give_the_same_codes(films: list[Path], tmp_path: Path) -> None:
    first = chosen(tmp_path / "first", films)
    second = chosen(tmp_path / "second", films)
    assert first.rows == second.rows > 20
    names = sorted(path.name for path in first.folder.iterdir())
    assert len(names) == 7 * LAYERS
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    # other films, and a schedule's policy, give other ones
    other = chosen(tmp_path / "other", films[:1])
    assert (other.folder / names[-1]).read_bytes() != (first.folder / names[-1]).read_bytes()
    fixed = replace(OPTIONS, reduction="fixed", merge_shares=(0.3,), prune_layer=0, depth=None)
    assert chosen(tmp_path / "fixed", films, fixed).rows > 20


@pytest.mark.slow
def test_a_bundle_by_films_is_built_checked_and_checked_again(films: list[Path], tmp_path: Path) -> None:
    flags = [flag for film in films for flag in ("--calibrate", film)]
    geometry = ("--num-decoder-layer", LAYERS, "--depth", 0, "--cost", 0.6)
    bundle = tmp_path / "bundle"
    result = export("build", TRAINED, "-o", bundle, "--weights", "int4:64", *geometry, *flags)
    assert result.exit_code == 0, result.output
    assert "error feedback over calibration films (2 of them, " in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]  # codes that waited are gone
    # 1. the manifest names the films
    opened = Bundle(bundle)
    record = opened.manifest.quantization
    assert record is not None
    assert record.calibration is not None
    assert record.calibration.prompts == len(films)
    assert 0 < record.calibration.answer_rows < record.calibration.rows
    assert record.calibration.films == tuple(hashlib.sha256(film.read_bytes()).hexdigest() for film in films)
    # 2. it runs
    answer = run("generate", bundle, "--video", films[0], "--prompt", "What?", "--max-new-tokens", 2)
    assert answer.exit_code == 0, answer.output
    # 3. without the films the check reads codes back and compares what they stand for
    again = check_again(bundle, Checkpoint(TRAINED))
    assert again["passed"], again["failures"]
    # 4. codes of another matrix are found
    place = bundle / "segments" / "rest" / "weights.bin"
    content = place.read_bytes()
    place.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
    plan = replan(bundle, opened.manifest, Checkpoint(TRAINED))
    assert any("is another matrix than" in what for what in weight_report(bundle, plan, all_codes=True)["differing"])


def test_what_cannot_be_calibrated_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint(TRAINED)
    with pytest.raises(BudgetError, match="0 films"):
        calibrated_codes(checkpoint, OPTIONS, [], tmp_path)
    with pytest.raises(BudgetError, match="has none to choose"):
        calibrated_codes(checkpoint, replace(OPTIONS, weights=None), read_prompts([tmp_path / "a.mp4"]), tmp_path)
    with pytest.raises(VideoError, match=r"a\.mp4 cannot be read"):
        calibrated_codes(checkpoint, OPTIONS, read_prompts([tmp_path / "a.mp4"]), tmp_path)


def test_without_the_films_there_are_shapes_and_no_codes() -> None:
    plan = BuildPlan(Checkpoint(TRAINED), replace(OPTIONS, calibrated_by=("0" * 64,)))
    assert plan.quantization is not None
    assert plan.quantization.method == "error feedback over calibration films"
    graph = plan.graphs[0]
    name = next(name for name in graph.shapes if name.endswith("packed"))
    with pytest.raises(CheckpointError, match="build with --calibrate"):
        graph.sources[name].make(plan.checkpoint)


@pytest.mark.slow
def test_a_file_that_is_no_film_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no film")
    flags = ("--weights", "int4", "--calibrate", tmp_path / "notes.txt")
    assert_refused(export("build", TRAINED, "-o", tmp_path / "bundle", *flags), VideoError, "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
