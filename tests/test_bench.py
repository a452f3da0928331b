"""The benchmarks run: at a tiny shape, on the CPU, where their figures say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import film_tables, numbers, quantized_tables

ROOT = Path(__file__).parents[1]
TINY = "--shape tiny --frames 6 --grid 4x4 --depth 1 --rounds 1 --threads 1 --new-tokens 4 --costs 1,0.5,0.3"
OURS = ("ours at cost 1", "ours at cost 0.5", "ours at cost 0.3")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def measured(name: str, work: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tools.bench.{name}", *TINY.split(), "--work", str(work), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_prefill(work: Path) -> None:
    figures = measured("prefill", work)
    assert figures["backend"]["name"] == "onnxruntime"
    assert figures["tokens"] == 6 * 16 + 32
    assert figures["dense_logits_relative_error"] < 1e-4  # fp32, the same products in another order
    lengths = [figures[name]["kv_lengths"] for name in OURS]
    assert lengths[0] == [figures["tokens"]] * 4
    assert sum(lengths[0]) > sum(lengths[1]) > sum(lengths[2])
    for name in OURS:
        assert set(figures["stages"][name]) == {"vision", "prefill", "reduction", "decode"}
        assert figures[name]["speed_up_over_eager"]["prefill"] > 0
        assert figures[name]["flop_limit"] >= 1
    table = numbers.on_gpu(figures)
    assert all(name in table for name in OURS)


@pytest.mark.slow
def test_backends(work: Path) -> None:
    pytest.importorskip("openvino", reason="it is not installed: pip install openvino")
    names = ("onnxruntime:float32", "openvino:float32")
    figures = measured("backends", work, "--contenders", ",".join(names))
    assert tuple(figures["contenders"]) == names
    for contender in figures["contenders"].values():
        for name in OURS:
            assert contender[name]["logits_relative_error"] < 1e-4
            assert contender[name]["kv_lengths"] == figures["contenders"][names[0]][name]["kv_lengths"]
        assert contender["memory"]["anonymous_answered_mb"] > 0
    assert all(f"`{name.partition(':')[0]}`" in numbers.backends(figures) for name in names)


@pytest.mark.slow
def test_decode(work: Path) -> None:
    figures = measured("decode", work)
    assert [figures[name]["kv_lengths"][-1] for name in OURS] == sorted(
        (figures[name]["kv_lengths"][-1] for name in OURS), reverse=True
    )
    assert all(figures[name]["gb_read_per_second"] > 0 for name in OURS)


@pytest.mark.slow
def test_overlap(work: Path) -> None:
    pytest.importorskip("av")
    server = ("--long-seconds", "2", "--long-pictures", "4")
    figures = measured("overlap", work, "--films", "2", "--seconds", "2", "--threads-of", "1,2", *server)
    for result in figures["results"].values():
        assert result["server"]["speed_up"] == result["server"]["speed_ups"][0] > 0
        assert result["speed_up"] == result["speed_ups"][0] > 0
        assert set(result["one_film_alone"]) == {"video", "preprocess", "vision"}
    assert "| 1 threads |" in film_tables.overlap(figures, "a machine")
    assert "| 1 threads, server |" in film_tables.overlap(figures, "a machine")


@pytest.mark.slow
def test_quantised(work: Path) -> None:
    """Weights run on the backend that they name, or on that of the floats."""
    pytest.importorskip("openvino", reason="it is not installed: pip install openvino")
    names = ("int8+head", "openvino:int8+head", "openvino:floats", "int8+head@int8")
    figures = measured("quantised", work, "--weights", ",".join(names), "--nearest")
    sizes = [figures[name]["bytes_of_fp16"] for name in ("floats", *names)]
    assert sizes[0] == sizes[3] == 2
    assert sizes[1] == sizes[2] < 2  # vectors weigh much at this size
    assert sizes[1] < sizes[4] < 2  # scales of the caches come on top
    assert all(figures[name][way]["decode_over_floats"] > 0 for name in names for way in OURS)
    assert all(f"`{name}`" in quantized_tables.speed(figures) for name in names)


@pytest.mark.slow
def test_quantised_steps(work: Path) -> None:
    contenders = ("onnxruntime:floats", "onnxruntime:int4+head", "onnxruntime:int4+head4")
    figures = measured("quantised_steps", work, "--contenders", ",".join(contenders), "--tokens", "40")
    (floats, int8_head, int4_head) = (figures["contenders"][name] for name in contenders)
    assert floats["llm_bytes"] > int8_head["llm_bytes"] > int4_head["llm_bytes"]
    assert all(figures["contenders"][name]["40 tokens"]["least_s"] > 0 for name in contenders)
    assert "`int4+head4`" in quantized_tables.steps([figures])


SERVE = "--shape tiny --frames 2 --grid 4x4 --costs 0.5 --clients 2 --threads 1"


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--rounds 1 --trials 1 --new-tokens 40", "--soak 0.25 --new-tokens 8"])
def test_serve(work: Path, flags: str) -> None:
    pytest.importorskip("starlette")
    command = [sys.executable, "-m", "tools.bench.serve", *SERVE.split(), *flags.split(), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    if "--soak" in flags:
        assert figures["compared"] > 5
        assert figures["wrong"] == 0, figures["wrong_answers"]
        assert figures["running_at_the_end"] == 0
        assert figures["errors_in_the_log"] == 0
        assert figures["memory"]["samples"] > 3
        return
    assert figures["room"]["requests"]["cost 0.5"]["count"] > 0
    case = figures["cost 0.5"]
    assert (case["answers"], case["wrong"]) == (8, 0)
    assert case["whole_ratio"] > 0
    assert case["decoding_ratio"] > 0
    assert "at cost 0.5" in numbers.serving(figures)
    assert case["first_token_under_a_prefill"]["first_token"]["count"] == 1
