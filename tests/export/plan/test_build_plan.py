"""What a plan says before anything is read or written: geometry, limits, records, and what it refuses by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BudgetError, BundleError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.graphs.graph_plan import meta
from framefusion.export.graphs.tower import Tower
from framefusion.export.plan.build_plan import BuildOptions, BuildPlan, identity_of, replan
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.format.manifest_file import read_manifest
from tests.bundles import COST

LAYERS = 4
FIXED = BuildOptions(
    reduction="fixed", cost=0.5, merge_shares=(0.3, 0.2), prune_layer=1, max_input_len=128, max_text_len=32
)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be changed."""
    return shutil.copytree(checkpoint, tmp_path / "tiny")


def plan(folder: Path, **options: Any) -> BuildPlan:
    return BuildPlan(Checkpoint(folder), BuildOptions(**options))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_plan_reads_no_tensor_and_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a tensor was read"))
    for options in (BuildOptions(), FIXED):
        made = BuildPlan(Checkpoint(folder), options)
        assert made.segment_records
        assert made.vision_record.weight_bytes > 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_tower_that_takes_floats_does_not_normalise_them(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(checkpoint).vision_record.input == "uint8"
    assert plan(checkpoint, tower_input="float").tower.module.levels is None
    monkeypatch.setattr(Tower, "patches", lambda _, *shape: meta(*shape))  # as another package's tower may have it
    floats = plan(checkpoint)
    assert floats.vision_record.input == "float"
    assert floats.tower.module.levels is None


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_segments_cover_every_layer_once_and_are_cut_after_each_attention_that_reduces(
    checkpoint: Path, depth: int
) -> None:
    records = plan(checkpoint, cost=COST, depth=depth).segment_records
    layers = [layer for record in records for layer in record.attention_layers]
    assert layers == list(range(LAYERS))
    assert sum(record.num_mlps for record in records) == LAYERS
    assert [record.attention_layers[-1] for record in records[:-1]] == list(range(depth + 1))
    assert [record.head for record in records] == [False] * (len(records) - 1) + [True]


def test_without_reduction_there_is_one_segment(checkpoint: Path) -> None:
    (record,) = plan(checkpoint, reduction="none").segment_records
    assert record.attention_layers == tuple(range(LAYERS))
    assert record.head


def test_the_fixed_mode_has_a_graph_for_prefill_and_one_for_decode_and_no_buckets(checkpoint: Path) -> None:
    made = BuildPlan(Checkpoint(checkpoint), FIXED)
    (record,) = made.segment_records
    assert record.decode_graph is not None
    assert (made.graph(record.graph).role, made.graph(record.decode_graph).role) == ("prefill", "decode")
    assert record.buckets is None
    assert made.buckets() is None
    assert made.fixed is not None
    assert len(made.fixed.drops) == len(made.reduction.schedule.merge_shares) + 1  # type: ignore[union-attr]


def test_options_go_over_what_the_checkpoint_says_of_films(checkpoint: Path) -> None:
    usual, chosen = plan(checkpoint), plan(checkpoint, fps=1.0, max_frames=8, max_pixels=56 * 56, min_pixels=56 * 56)
    assert (usual.sampling.fps, usual.sampling.max_frames) == (2.0, 32)
    assert (chosen.sampling.fps, chosen.sampling.max_frames) == (1.0, 8)
    pixels: list[Any] = [made.preprocessing for made in (usual, chosen)]
    assert [(rule.min_pixels, rule.max_pixels) for rule in pixels] == [(112 * 112, 112 * 112), (56 * 56, 56 * 56)]


def test_fewer_layers_are_a_smaller_bundle_of_a_whole_checkpoint(checkpoint: Path) -> None:
    """The layers that are left out are no tensors that nobody reads."""
    short, whole = (plan(checkpoint, num_decoder_layer=layers, cost=0.6, depth=0) for layers in (2, None))
    assert short.model_record().num_layers == 2
    assert [layer for record in short.segment_records for layer in record.attention_layers] == [0, 1]
    assert sum(graph.weight_bytes for graph in short.graphs) < sum(graph.weight_bytes for graph in whole.graphs)
    assert short.stored_types() == whole.stored_types() == {"F32"}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("preprocessor_config.json", lambda c: c.update(patch_size=16), "patch_size or temporal_patch_size"),
        ("preprocessor_config.json", lambda c: c.update(merge_size=4), "merge_size 4, vision_config spatial_merge_si"),
        ("config.json", lambda c: c["text_config"].update(intermediate_size=96), r"becomes .*, the graph needs .*96"),
        (
            "config.json",
            lambda c: c["text_config"].update(num_hidden_layers=5),
            "says num_hidden_layers 5, the weights are of 4",
        ),
        (
            "config.json",
            lambda c: c["text_config"].update(num_hidden_layers=3),
            "says num_hidden_layers 3, the weights are of 4",
        ),
    ],
)
def test_files_of_another_model_are_refused(
    folder: Path, file: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(folder / file, change)
    if file == "preprocessor_config.json":
        edit(folder / "video_preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=message):
        plan(folder)


def test_an_unknown_dialect_lists_the_known_ones(checkpoint: Path) -> None:
    with pytest.raises(BudgetError, match="dialect 'onnx' is unknown; known are gqa, portable"):
        plan(checkpoint, dialect="onnx")


# --- The plan of a bundle that is there -------------------------------------------------------------------------------


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def test_a_bundle_is_planned_again_from_its_manifest(bundle: Path, manifest: Manifest, checkpoint: Path) -> None:
    again = replan(bundle, manifest, Checkpoint(checkpoint))
    assert asdict(again.model_record()) == asdict(manifest.model)
    assert again.segment_records == manifest.segments
    assert again.vision_record == manifest.vision
    assert again.reduction == manifest.reduction
    assert again.limits == manifest.limits


def test_another_checkpoint_than_the_bundles_is_refused(bundle: Path, manifest: Manifest, checkpoint: Path) -> None:
    other = replace(manifest, model=replace(manifest.model, rope_theta=5e5))
    with pytest.raises(CheckpointError, match=r"has rope_theta 10000.0, the bundle was built from one with 500000.0"):
        replan(bundle, other, Checkpoint(checkpoint))


def test_a_manifest_that_does_not_say_its_options_is_refused(
    bundle: Path, manifest: Manifest, checkpoint: Path
) -> None:
    strange = replace(manifest, options={**manifest.options, "dtype": "float8"})
    with pytest.raises(BundleError, match=r"does not say how it was built \(.*float8.*\): rebuild it"):
        replan(bundle, strange, Checkpoint(checkpoint))


def test_a_checkpoint_is_another_one_once_a_file_that_decides_is_changed(folder: Path) -> None:
    first = identity_of(Checkpoint(folder))
    assert identity_of(Checkpoint(folder)) == first
    (folder / "README.md").write_text("No part of it.")
    assert identity_of(Checkpoint(folder)) == first
    seen = [first]
    for name, content in (("chat_template.jinja", "{{ messages }}"), ("generation_config.json", "{}")):
        (folder / name).write_text(content)
        seen.append(identity_of(Checkpoint(folder)))
    shutil.copyfile(folder / "model.safetensors", folder / "copy")
    (folder / "copy").replace(folder / "model.safetensors")
    seen.append(identity_of(Checkpoint(folder)))
    assert all(seen[i] != seen[j] for i in range(len(seen)) for j in range(i))
