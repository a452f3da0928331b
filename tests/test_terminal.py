"""The commands on a terminal: whoever waits sees that something moves, from the first second to the last."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.terminal import record
from tests.wheel import ROOT

if sys.platform == "win32":
    pytest.skip("there are no pseudo-terminals", allow_module_level=True)

CHECKPOINT = ROOT / "tests" / "models" / "tiny_qwen2_vl"
DRAWN_OVER = "\x1b[2K"


def longest_silence() -> float:
    """Seconds in which nothing may move. While libraries are loaded nothing of Python does, which on a quiet machine
    takes under a second; a busy one needs what it needs now."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, transformers, onnxruntime"], check=True)
    spent: float = time.monotonic() - start
    return 3.0 + 2 * spent


@pytest.mark.slow
def test_a_build_and_an_evaluation_are_never_silent(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    built = record(["ff-export", "build", str(CHECKPOINT), "-o", str(bundle)])
    assert built.exit_code == 0, built.text
    assert built.silences()[0][0] < longest_silence(), built.silences()[:3]
    assert DRAWN_OVER in built.text
    clips = ("-m", "tools.tiny.make_clips", "--out", str(tmp_path / "clips"), "--count", "2")
    subprocess.run((sys.executable, *clips), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    questions = ["--questions", str(tmp_path / "clips" / "questions.jsonl"), "--cost", "0.3"]
    for model in (bundle, CHECKPOINT):
        evaluated = record(["ff-export", "eval", str(model), *questions])
        assert evaluated.exit_code == 0, evaluated.text
        assert evaluated.silences()[0][0] < longest_silence(), (model, evaluated.silences()[:3])
    shallow = ["--num-decoder-layer", "2", "--depth", "0", "--cost", "0.6", "--no-check", "--weights", "int4"]
    calibrated = ["ff-export", "build", str(CHECKPOINT), "-o", str(tmp_path / "calibrated"), *shallow]
    chosen = record([*calibrated, "--calibrate", questions[1]])
    assert chosen.exit_code == 0, chosen.text
    assert re.search(r"choosing codes by \d+ prompts: (answer|layer) \d+ of \d+", chosen.text)
    plain = record(["ff-export", "check", str(bundle)], TERM="dumb")
    assert plain.exit_code == 0, plain.text
    assert "\x1b" not in plain.text
