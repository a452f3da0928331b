"""Codes chosen by films: the same films give the same codes, the check proves them, the manifest names the films."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from framefusion.errors import BudgetError, CheckpointError, StorageError, VideoError
from framefusion.export.build import build, check_again
from framefusion.export.check.verify import weight_report
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.calibration import prompts as prompts_module
from framefusion.export.eager.calibration.codes import calibrated_codes, folder_of_codes
from framefusion.export.eager.calibration.held_out import Repeated
from framefusion.export.eager.calibration.prompts import answered_rows, read_prompts
from framefusion.export.eager.pipeline import eager_loaders, in_fp32, uncompiled_bundle
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan, replan
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.code_store import CodeStore
from framefusion.export.quantization.search import search
from framefusion.export.report.inspection import weight_facts
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch
from tests.commands import assert_refused, export, run
from tests.films import write_film

TRAINED = Path(__file__).parents[3] / "models" / "tiny_qwen2_vl"
LAYERS = 2
OPTIONS = BuildOptions(weights="int4:64", num_decoder_layer=LAYERS, depth=0, cost=0.6)


@pytest.fixture(scope="module", name="films")
def two_films(four: list[Path]) -> list[Path]:
    return four[:2]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """As many as it takes for one to be held out."""
    folder = tmp_path_factory.mktemp("films")
    return [write_film(folder / f"{seed}.mp4", frames=8, size=112, seed=seed) for seed in range(4)]


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
    assert "error feedback over calibration films (2 files, " in result.output
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


@pytest.mark.slow
def test_codes_that_are_further_from_floats_than_the_searchs_are_left(four: list[Path], tmp_path: Path) -> None:
    """The fourth prompt is held out; codes that negate every second row are further from floats than any search's."""
    prompts = read_prompts(four)
    checkpoint = Checkpoint(TRAINED)
    folders = [tmp_path / "good", tmp_path / "bad"]
    for folder in folders:
        folder.mkdir()
    # 1. error feedback is nearer
    named, good = calibrated_codes(checkpoint, OPTIONS, prompts, folders[0])
    assert named.calibrated_by == (*good.films, good.texts)
    assert (good.taken, good.held_out, good.prompts) == (True, 1, 4)
    assert good.divergence is not None
    assert good.search_divergence is not None
    assert good.divergence <= good.search_divergence
    # 2. worse codes are left, and the build searches
    named, bad = calibrated_codes(checkpoint, OPTIONS, prompts, folders[1], choose=lambda *_: negated)
    assert named.calibrated_by is None
    assert not bad.taken
    assert bad.search_divergence == good.search_divergence
    built = build(checkpoint, tmp_path / "bundle", named, codes=bad, verify=False)
    record = built.manifest.quantization
    assert record is not None
    assert record.method == "search of scales"
    assert record.calibration is not None
    assert not record.calibration.taken
    text = weight_facts(built.manifest)["text"]
    assert "films were given" in text
    assert "their codes left" in text
    again = check_again(built.folder, checkpoint)  # all codes are chosen once more, which takes no film
    assert again["passed"], again["failures"]


def negated(weight: Tensor, form: BlockFormat) -> BlockQuantized:
    weight = weight.clone()
    weight[::2] *= -1
    return search(weight, form)


@pytest.mark.slow
def test_what_is_judged_are_the_models_of_both_codes(
    four: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergences in lockstep, beside those of whole models with these codes; of an answer's first token."""
    monkeypatch.setattr(prompts_module, "ANSWER", 1)
    checkpoint = Checkpoint(TRAINED)
    prompts = read_prompts(four)
    (tmp_path / "codes").mkdir()
    named, store = calibrated_codes(checkpoint, OPTIONS, prompts, tmp_path / "codes")
    floats = BuildPlan(checkpoint, OPTIONS).in_floats
    assert floats is not None
    bundle = in_fp32(uncompiled_bundle(floats, tmp_path / "parts"), floats)
    (fit, item) = answered_rows(floats, bundle, prompts[-2:], lambda _: None, [1])
    assert (len(fit.logits), len(item.logits)) == (0, 1)  # those of a prompt that is not judged would only take memory
    theirs = torch.from_numpy(item.logits[0]).double().log_softmax(0)
    found = []
    for plan in (
        BuildPlan(checkpoint, replace(named, calibrated_by=store.films), store),
        BuildPlan(checkpoint, OPTIONS),
    ):
        pipeline = Pipeline(bundle, EagerBackend(eager_loaders(plan)))
        state = Repeated(item.prompt.labels, item.decisions, item.answer)
        prefilled = prefill(pipeline.segments, item.rows, state, 1, Stopwatch())
        assert prefilled.kept[-1].size < item.prompt.token_ids.size
        ours = torch.from_numpy(np.array(prefilled.logits)).double().log_softmax(0)
        found.append(float((theirs.exp() * (theirs - ours)).sum()))
    assert [store.divergence, store.search_divergence] == pytest.approx(found, rel=1e-3)
    assert store.held_out == 1


def test_codes_of_a_build_are_not_another_builds_to_replace(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    left = tmp_path / ".bundle.calibration" / "codes" / "0.q.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a build that was killed")
    with folder_of_codes(output) as folder:
        assert not any(folder.iterdir())
        (folder / "0.q.safetensors").write_bytes(b"codes")
        with pytest.raises(StorageError, match="another build is writing"), folder_of_codes(output):
            pass
        assert (folder / "0.q.safetensors").read_bytes() == b"codes"
    assert not any(tmp_path.iterdir())
    # a link is nobody's place for codes
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".bundle.calibration").symlink_to(elsewhere)
    with folder_of_codes(output):
        assert not any(elsewhere.iterdir())
    assert elsewhere.is_dir()
