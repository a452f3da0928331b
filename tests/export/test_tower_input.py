"""Towers of bytes and of floats: one answer from both, and a bundle from before there were bytes is what it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from framefusion import Bundle, Pipeline, Request, Turn, Visual
from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import replan
from framefusion.runtime.format.manifest_file import DIGEST, digest_of
from framefusion.runtime.request import Stopwatch
from tests.bundles import ADAPTIVE

pytestmark = pytest.mark.slow

TURNS = [Turn("user", (Visual.VIDEO, "What happens?"))]


def film() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Six frames of noise over something that stays."""
    random = np.random.default_rng(0)
    still = random.integers(0, 200, (1, 112, 112, 3))
    return (still + random.integers(0, 56, (6, 112, 112, 3))).astype(np.uint8)


def without_input(folder: Path) -> None:
    """The manifest as builds wrote it before towers took bytes."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["vision"].pop("input") == "float"
    manifest["options"].pop("tower_input")
    manifest.pop(DIGEST)
    path.write_text(json.dumps(manifest | {DIGEST: digest_of(manifest)}))


def test_bytes_and_floats_give_one_answer(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    # 1. The same checkpoint twice: the bundle that all tests share takes bytes.
    source = Checkpoint(checkpoint)
    options = BuildOptions(**ADAPTIVE, max_input_len=512, tower_input="float")
    build(source, tmp_path / "float", options, verify=False)
    without_input(tmp_path / "float")
    assert Bundle(bundle).manifest.vision.input == "uint8"
    older = Bundle(tmp_path / "float", verify=False)
    assert older.manifest.vision.input == "float"
    # 2. Rows of the tower agree to rounding, tokens exactly, dense and reduced.
    rows = []
    answers = []
    for opened in (Bundle(bundle), older):
        with Pipeline(opened, threads=1) as pipeline:
            (visual,) = pipeline.read_visuals(TURNS, [film()], pipeline.manifest.sampling, Stopwatch())
            rows.append(np.asarray(pipeline.backend.device.download(pipeline.encode_visual(visual))))
            costs = (None, 1.0, 0.3)
            requests = [Request(max_new_tokens=8, cost=cost) for cost in costs]
            answers.append([pipeline.generate(TURNS, [film()], request).token_ids for request in requests])
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-5 * np.abs(rows[1]).max())
    assert answers[0] == answers[1]
    # 3. What is planned anew for the older one is its own graph, not that of a build of today.
    plan = replan(older.folder, older.manifest, source)
    assert plan.vision_record.input == "float"
    assert not plan.tower.module.takes_bytes
