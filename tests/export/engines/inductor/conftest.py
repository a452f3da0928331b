"""Bundles with engines by inductor, compiled once for all tests of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.engines.compile import compile_bundle
from framefusion.export.engines.inductor import build as inductor
from framefusion.export.options import BuildOptions, EngineOptions, Resources
from framefusion.export.plan.build_plan import replan
from framefusion.runtime.bundle import Bundle
from tests.conftest import made_once


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the whole session."""
    return made_once(tmp_path_factory, "inductor-engines", Path.mkdir)


@pytest.fixture
def compiled(checkpoint: Path, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bundle]:
    if not torch.cuda.is_available():  # the tiny model is too small for a difference that is none of noise
        monkeypatch.setattr(inductor, "choose", lambda _: "split")

    def make(device: Any = "cpu", steps: bool = False, **options: Any) -> Bundle:
        if not steps:  # as before there were any, and in half the time
            monkeypatch.setattr(inductor, "BATCHED", ())
        source, folder = Checkpoint(checkpoint), tmp_path / "bundle"
        manifest = build(source, folder, BuildOptions(**options), verify=False).manifest
        wanted = EngineOptions("inductor", device=device)
        compile_bundle(folder, wanted, Resources(cache=engines), plan=replan(folder, manifest, source))
        return Bundle(folder)

    return make
