"""The simulation of a batch on many GPUs, where what comes out can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")  # the benchmarks' common part draws checkpoints with it
from framefusion.runtime.batch.run import AHEAD
from tools.bench.fleet import Film, read_answers, simulate, simulate_part


@pytest.mark.parametrize("decoders", [1, 3])
def test_the_slower_stage_is_the_limit(decoders: int) -> None:
    count = 60
    # 1. The engine is: it waits for the first film alone.
    assert simulate_part([Film(0.1, 1.0)] * count, decoders) == pytest.approx(0.1 + count)
    # 2. Decoding is: all decoders work all the time, and the last film is answered behind it.
    assert simulate_part([Film(3.0, 0.01)] * count, decoders) == pytest.approx(3.0 * count / decoders + 0.01, rel=0.02)
    assert simulate_part([], decoders) == 0.0


def test_no_more_is_decoded_ahead_than_a_batch_does() -> None:
    """A long answer first: while it is written, decoders fill the places there are, and then wait."""
    ahead = 1 + AHEAD
    films = [Film(1.0, 100.0), *[Film(1.0, 0.0)] * 10]
    # The first answer ends at 101; by then as many films as places, less its own, are decoded.
    left = len(films) - ahead
    assert simulate_part(films, 1) == pytest.approx(101.0 + left)


def test_gpus_share_the_films() -> None:
    one = simulate([Film(0.0, 1.0)], 1000, 1, 1)
    many = simulate([Film(0.0, 1.0)], 1000, 10, 1)
    assert one.seconds == pytest.approx(1000)
    assert one.busy == pytest.approx(1)
    assert many.busy == pytest.approx(100 / many.seconds)
    assert 100 <= many.seconds < 140  # ids fall by chance: the largest part is the end


def test_what_a_run_wrote(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    rows = [{"id": "a", "seconds": {"media": 2.0, "prefill": 0.5, "decode": 0.25}}, {"id": "b", "error": {}}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_answers(answers) == ([Film(2.0, 0.75)], 2.0)
    assert read_answers(answers, engine=0.1)[0] == [Film(2.0, 0.1)]
    answers.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(SystemExit, match="no answer with seconds"):
        read_answers(answers)
