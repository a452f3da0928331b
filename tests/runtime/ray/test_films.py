"""The actor of a cluster by itself: it needs no Ray to answer rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.ray import FilmAnswers
from tests.bundles import shared
from tests.films import write_film

pytestmark = pytest.mark.slow


def test_rows_are_answered_and_bad_ones_cost_no_more(tmp_path: Path) -> None:
    films = [str(write_film(tmp_path / f"{number}.mp4", seed=number, frames=8)) for number in range(3)]
    videos = np.array([films[0], str(tmp_path / "none.mp4"), films[1], films[2]], object)
    request = Request(5, cost=0.4)
    answered = FilmAnswers(str(shared("bundle")), "What happens?", request, decoders=2, threads=1)({"video": videos})
    assert [error.partition(":")[0] for error in answered["error"]] == ["", "RequestError", "", ""]
    assert (answered["text"][1], answered["cost"][1]) == ("", 0.0)
    with Pipeline(shared("bundle"), threads=1) as pipeline:
        for number, path in zip((0, 2, 3), films, strict=True):
            alone = pipeline.generate("What happens?", [path], request)
            assert answered["text"][number] == alone.text
            assert answered["kept_tokens"][number] == alone.kept(-1, visual=True).size
