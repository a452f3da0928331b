"""What the benchmarks share: a checkpoint of random weights at a real shape, a prompt with redundancy, the machine.

Random weights are good for speed and memory, which depend on shapes and on how many tokens are kept, not on meaning.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from framefusion.export.build import build_planned
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.plan.build_plan import BuildOptions, BuildPlan
from framefusion.runtime.backends.base import Device
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.format.manifest import ModelRecord
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.gpu import find_gpu
from framefusion.runtime.media.visual_input import Grid
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.text.positions import grid_places, mrope_positions
from framefusion.runtime.text.prompt import Prompt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"
TOKENIZER = ROOT / "tests" / "models" / "tiny_qwen2_vl" / "tokenizer.json"
SEED = 0
BENCHMARKS = (
    "prefill",
    "decode",
    "backends",
    "kernels",
    "attention",
    "memory",
    "export_memory",
    "live",
    "frames",
    "cuda_core",
    "install_size",
    "kv_cache",
    "fleet",
    "quantised",
    "quantised_steps",
    "int8_linear",
    "serve",
    "overlap",
)
MODULES = {name: f"tools.bench.{name}" for name in BENCHMARKS}
MODULES |= {"overlap_server": "tools.bench.overlap"}
MODULES |= dict.fromkeys(("accuracy", "accuracy_brief"), "tools.accuracy")
MODULES |= dict.fromkeys(("quantized_accuracy", "quantized_accuracy_brief"), "tools.quantized_accuracy")
MODULES |= {"gptq_reference": "tools.gptq_reference"}
MODULES |= {"quantized_families": "tools.quantized_families", "golden_mutations": "tools.golden_mutations"}


@dataclass(frozen=True)
class Shape:
    """LLM sizes of a published model; the vision tower is a small one where it is not what is measured."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool
    tower: tuple[int, int, int] = (2, 64, 2)  # depth, width, heads


SHAPES = {
    "tiny": Shape(64, 128, 4, 4, 2, 512, True),  # to try the benchmarks themselves
    "tower": Shape(64, 128, 4, 4, 2, 512, True, (4, 384, 6)),  # where a tower is measured, and one that a CPU can run
    "qwen2-0.5b": Shape(896, 4864, 24, 14, 2, 151936, True),
    "qwen2-1.5b": Shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-7b": Shape(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-vl-7b": Shape(3584, 18944, 28, 28, 4, 152064, False, (32, 1280, 16)),
}


PIXELS = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
"""preprocessor_config.json of Qwen2-VL."""


def write_checkpoint(shape: Shape, folder: Path) -> Path:
    """A Qwen2-VL checkpoint of random bf16 weights, written once; transformers loads it too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS), encoding="utf-8")
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = special_ids()
    (depth, width, heads) = shape.tower
    half = shape.hidden_size // shape.num_heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": shape.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={"depth": depth, "embed_dim": width, "num_heads": heads, "hidden_size": shape.hidden_size},
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(SEED)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # never twice in memory
    try:
        model: Any = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return folder


def special_ids() -> dict[str, int]:
    """Ids of the special tokens in the tokenizer that the random checkpoint borrows."""
    added = json.loads(TOKENIZER.read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def open_bundle(checkpoint: Path, folder: Path, options: BuildOptions, *, golden: bool = True) -> Path:
    """Build a bundle unless it stands there already. Not checked against eager: the benchmark compares outputs.

    Args:
        checkpoint: what to read.
        folder: of the bundle.
        options: see `BuildOptions`.
        golden: let the eager model answer as well, which takes longer than all else where weights are quantized.
    """
    if not folder.exists():
        build_planned(BuildPlan(Checkpoint(checkpoint), options), folder, verify=False, golden=golden)
    return folder


@dataclass(frozen=True)
class Film:
    """A prompt of one video, as rows for the LLM.

    Attributes:
        prompt: of S tokens.
        hidden: [S, D].
        uploaded: the same on devices that have it already.
    """

    prompt: Prompt
    hidden: NDArray[np.float32]
    uploaded: WeakKeyDictionary[Device, Buffer] = field(default_factory=WeakKeyDictionary, repr=False, compare=False)

    def upload(self, device: Device) -> Buffer:
        """`hidden` on a device, where a real request's rows are, too: a vision tower leaves them there.  [S, D]"""
        if device not in self.uploaded:
            self.uploaded[device] = device.upload(HOST.typed(self.hidden, device.row_type))
        return self.uploaded[device]

    def rows(self, pipeline: Pipeline) -> TokenRows:
        """Rows as a request has them: put together on the device, with rotary tables that come from the host."""
        device = pipeline.backend.device
        there = self.upload(device)
        hidden = device.empty(self.hidden.shape, device.row_type)
        device.copy(hidden, there)
        tables = pipeline.rope(self.prompt.positions)
        cos, sin = (device.upload(HOST.typed(table, device.row_type)) for table in tables)
        return TokenRows(hidden, cos, sin, np.arange(len(self.hidden)), None, device)


def draw_film(model: ModelRecord, grid: Grid, before: int, after: int, stillness: float = 0.5) -> Film:
    """Embeddings of a film: each place is like its predecessor or not, a share `stillness` of the time.

    Args:
        model: geometry.
        grid: of tokens, after merging.
        before: text tokens in front.
        after: text tokens behind.
        stillness: share of the tokens that nearly repeat the one before them in their track.
    """
    random = np.random.default_rng(SEED)
    places = grid.height * grid.width
    frames = random.standard_normal((grid.frames, places, model.hidden_size)).astype(np.float32)
    for t in range(1, grid.frames):
        still = random.random(places) < stillness
        frames[t, still] = frames[t - 1, still] + 0.3 * frames[t, still]
    text = random.standard_normal((before + after, model.hidden_size)).astype(np.float32)
    hidden = np.concatenate([text[:before], frames.reshape(-1, model.hidden_size), text[before:]]) * np.float32(0.02)
    labels = np.full(len(hidden), -1, np.int64)
    labels[before : before + grid.size] = np.tile(np.arange(places), grid.frames)
    positions, delta = mrope_positions([before, grid_places(grid), after])
    rows = np.arange(before, before + grid.size)
    return Film(Prompt(np.zeros(len(hidden), np.int64), labels, positions, delta, rows), hidden)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def machine() -> dict[str, Any]:
    """The machine as far as it matters for a figure."""
    import onnxruntime
    import torch

    gpu = find_gpu()
    return {
        "cpu": cpu.model_name() or platform.processor(),
        "instructions": cpu.products(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "openvino": installed_version("openvino"),
        "gpu": None if gpu is None else asdict(gpu),
        "load_before": round(os.getloadavg()[0], 2),
    }


def installed_version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The commit the figures belong to."""
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def report(name: str, figures: dict[str, Any], *, write: bool, file: str | None = None) -> None:
    """Print the figures, and write them under results/ when asked, as `file` where it is not named as the benchmark."""
    command = f"python -m {MODULES[name]} " + " ".join(sys.argv[1:])
    text = json.dumps({"command": command, "commit": commit(), "machine": machine()} | figures, indent=2)
    print(text)
    if write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{file or name}.json").write_text(text + "\n")
