"""The checkpoints of published shapes that the export's benchmark writes: what their files and their model are."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from tests.patience import PATIENCE
from tools.bench import big_checkpoint
from tools.bench.big_checkpoint import BIG_SHAPES, shards_of, tensors_of, write_big_checkpoint

ROOT = Path(__file__).parents[1]
TINY = BIG_SHAPES["tiny"]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(big_checkpoint, "SHARD", 300_000)
    monkeypatch.setattr(big_checkpoint, "PIECE", 1000)
    return write_big_checkpoint(TINY, tmp_path / "tiny")


def test_safetensors_reads_what_was_written(written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    shards = sorted(written.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
    tensors = {key: tensor for path in shards for key, tensor in load_file(path).items()}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == tensors_of(TINY)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for key, tensor in tensors.items():
        if tensor.ndim > 1:  # sums over the inputs of a matrix have a variance of about 1
            assert 0.5 < float(tensor.float().std()) * math.sqrt(tensor[0].numel()) < 1.1, key
        elif "norm" in key and key.endswith("weight"):
            assert torch.all(tensor == 1), key
    matrices = [tensor.flatten()[:64].tolist() for tensor in tensors.values() if tensor.ndim > 1]
    assert len({tuple(numbers) for numbers in matrices}) == len(matrices)


def test_headers_alone_are_those_of_the_whole(written: Path, tmp_path: Path) -> None:
    hollow = write_big_checkpoint(TINY, tmp_path / "hollow", headers_only=True)
    for path in written.iterdir():
        other = hollow / path.name
        assert other.stat().st_size == path.stat().st_size
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else None
        assert other.read_bytes()[:length] == path.read_bytes()[:length]


@pytest.mark.parametrize(("name", "parameters"), [("7b", 8.29e9), ("72b", 73.4e9)])
def test_parameters_are_those_of_the_published_model(name: str, parameters: float) -> None:
    sizes = tensors_of(BIG_SHAPES[name])
    assert sum(map(math.prod, sizes.values())) == pytest.approx(parameters, rel=0.01)
    assert all(2 * sum(map(math.prod, shard.values())) <= big_checkpoint.SHARD for shard in shards_of(sizes))


@pytest.mark.slow
def test_transformers_loads_it_and_a_bundle_of_it_is_checked_against_it(written: Path, tmp_path: Path) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration
    _, report = model.from_pretrained(written, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    options = BuildOptions(depth=1, max_input_len=512, max_pixels=112 * 112)
    check = build(Checkpoint(written), tmp_path / "bundle", options).manifest.check
    assert check["passed"]
    assert check["reference"] == "transformers Qwen2VLForConditionalGeneration"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_watches_a_build(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench.export_memory", "--shape", "tiny", "--folder", str(tmp_path)]
    done = subprocess.run(
        [*command, "--modes", "adaptive"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    run = figures["adaptive"]
    assert list(run["phases"])[:4] == ["start", "tokenizer", "embedding", "vision"]
    assert sum(phase["seconds"] for phase in run["phases"].values()) <= run["seconds"] + 1
    assert 0.1 < run["anonymous_gb"] < run["high_water_gb"] < 2
    assert figures["copy"]["written_gb"] == figures["checkpoint_gb"]
    assert not list(tmp_path.iterdir())
