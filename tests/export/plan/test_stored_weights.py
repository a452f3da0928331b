"""What a build makes of quantized weights: their codes where graphs can have them, nothing else without an option."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framefusion.errors import BackendError, BudgetError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import QuantizedPart
from framefusion.export.evaluate.live_answering import load_model
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.stored_weights import eager_options
from framefusion.export.quantization.float8 import Float8Format
from framefusion.export.quantization.recipes import Stored
from tests.quantized_checkpoints import (
    FORMATS,
    FP8_DYNAMIC,
    SINGLE,
    configured,
    grouped,
    int32_codes,
    quantized,
    written,
)


def coded(plan: BuildPlan) -> set[str]:
    """Keys of the matrices whose codes the graphs get."""
    sources = [source for graph in plan.graphs for source in graph.sources.values()]
    recipes = [getattr(source, "recipe", None) for source in sources]
    return {recipe.key for recipe in recipes if isinstance(recipe, Stored)}


def forms(plan: BuildPlan) -> set[object]:
    """Formats of the layers' linear maps."""
    return {form for part in plan.segments for block in part.blocks for _, form in block.formats}


def test_codes_go_to_the_graphs_by_default(checkpoint: Path, tmp_path: Path) -> None:
    folder = quantized(checkpoint, tmp_path / "w4", "w4a16")
    plan = BuildPlan(Checkpoint(folder), BuildOptions())
    assert len(coded(plan)) == 28
    assert plan.stored_weights == (
        "compressed-tensors: 4 bits, groups of 16, symmetric in 28 linear maps; taken as they are stored"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_is_planned_or_asks_for_an_option(checkpoint: Path, tmp_path: Path, name: str) -> None:
    source = Checkpoint(quantized(checkpoint, tmp_path / name, name))
    exact = name in ("awq", "gptq", "gptq8", "w4a16")
    if exact:
        assert len(coded(BuildPlan(source, BuildOptions()))) == 28
    else:
        with pytest.raises(BudgetError, match=r"--weights dequantized.*--weights int8 or int4"):
            BuildPlan(source, BuildOptions())
    if name == "fp8":
        with pytest.raises(BudgetError, match=r"dialect gqa have no floats of 8 bits.*--dialect portable --weights st"):
            BuildPlan(source, BuildOptions(weights="stored"))
    else:
        assert len(coded(BuildPlan(source, BuildOptions(weights="stored")))) == 28
    dequantized = BuildPlan(source, BuildOptions(weights="dequantized"))
    assert coded(dequantized) == set()
    assert not any(block.formats for plan in dequantized.segments for block in plan.blocks)
    again = BuildPlan(source, BuildOptions(weights="int8"))
    assert coded(again) == set()
    assert again.stored_weights.endswith("; quantized again, int8")


@pytest.mark.slow
def test_what_runs_in_eager_torch_takes_floats(checkpoint: Path, tmp_path: Path) -> None:
    """An evaluation of a checkpoint builds nothing, so no option is asked for."""
    source = Checkpoint(quantized(checkpoint, tmp_path / "fp8", "fp8"))
    assert coded(BuildPlan(source, eager_options(source))) == set()
    assert eager_options(Checkpoint(checkpoint)) == BuildOptions()


@pytest.mark.slow
def test_packages_that_transformers_wants_are_named(checkpoint: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("gptqmodel"):
        pytest.skip("it is installed: transformers loads such checkpoints")
    folder = quantized(checkpoint, tmp_path / "awq", "awq")
    with pytest.raises(BackendError, match=r"transformers cannot load .*gptqmodel"):
        load_model(folder)


@pytest.mark.slow
def test_graphs_without_zero_points_ask_for_an_option(checkpoint: Path, tmp_path: Path) -> None:
    """TensorRT's graphs take what is symmetric as it is stored, and nothing else without a word."""
    source = Checkpoint(quantized(checkpoint, tmp_path / "awq", "awq"))
    with pytest.raises(BudgetError, match=r"dialect portable have no zero points.*--weights dequantized.*int8 or int4"):
        BuildPlan(source, BuildOptions(dialect="portable"))
    BuildPlan(source, BuildOptions(dialect="portable", weights="dequantized"))
    symmetric = Checkpoint(quantized(checkpoint, tmp_path / "gptq", "gptq"))
    assert len(coded(BuildPlan(symmetric, BuildOptions(dialect="portable")))) == 28


@pytest.mark.slow
def test_floats_of_8_bits_go_to_graphs_that_have_them(checkpoint: Path, tmp_path: Path) -> None:
    """Activations are rounded where the format says so and a graph can, and not at all if that is wanted."""
    portable = BuildOptions(dialect="portable")
    # 1. a scale a row, and of a token
    dynamic = Checkpoint(written(checkpoint, tmp_path / "dynamic", *FP8_DYNAMIC))
    plan = BuildPlan(dynamic, portable)
    assert len(coded(plan)) == 28
    assert plan.stored_weights.endswith("taken as they are stored, activations rounded likewise")
    assert forms(plan) == {Float8Format(rounds=True)}
    unrounded = BuildPlan(dynamic, replace(portable, weights="stored"))
    assert unrounded.stored_weights.endswith("taken as they are stored, activations not rounded")
    assert forms(unrounded) == {Float8Format()}
    # 2. blocks of a matrix: their activations have blocks, too, which no graph has
    blocks = Checkpoint(quantized(checkpoint, tmp_path / "blocks", "fp8"))
    with pytest.raises(BudgetError, match=r"rounds activations as well.*--weights stored.*--weights fp8"):
        BuildPlan(blocks, portable)
    assert forms(BuildPlan(blocks, replace(portable, weights="stored"))) == {Float8Format(16)}
    again = BuildPlan(blocks, replace(portable, weights="fp8"))
    assert forms(again) == {Float8Format()}
    assert coded(again) == set()


@pytest.mark.slow
def test_scales_that_a_type_cannot_hold_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    folder = written(checkpoint, tmp_path / "dynamic", *FP8_DYNAMIC)
    tensors = load_file(folder / SINGLE)
    key = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.weight_scale"))
    tensors[key][3] = 1e-7
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    for dtype in ("float16", "bfloat16", "float32"):
        plan = BuildPlan(Checkpoint(folder), BuildOptions(dialect="portable", dtype=dtype))
        parts = [part for graph in plan.graphs for part in graph.sources.values() if isinstance(part, QuantizedPart)]
        sources = [part for part in parts if key.startswith(part.keys[0])]
        assert len(sources) == 2
        if dtype == "float16":
            with pytest.raises(CheckpointError, match=r"up_proj.weight has a scale of 1e-07, which float16 cannot"):
                sources[0].make(plan.checkpoint)
        else:
            assert sources[0].make(plan.checkpoint).dtype == torch.uint8


@pytest.mark.slow
def test_engines_without_such_weights_ask_for_floats(checkpoint: Path, tmp_path: Path) -> None:
    source = Checkpoint(quantized(checkpoint, tmp_path / "gptq", "gptq"))
    with pytest.raises(BudgetError, match=r"inductor engines are not compiled of such weights") as error:
        BuildPlan(source, BuildOptions(backend="inductor"))
    assert "int4" not in str(error.value)


@pytest.mark.slow
def test_groups_without_a_kernel_ask_for_an_option(checkpoint: Path, tmp_path: Path) -> None:
    """Groups of 8, which no kernel has."""
    folder = quantized(checkpoint, tmp_path / "gptq", "gptq")
    tensors = load_file(folder / SINGLE)
    codes, scales, zeros = grouped(torch.randn(64, 32), 4, symmetric=True, group=8)
    stem = next(key for key in tensors if key.endswith("layers.1.mlp.up_proj.qweight")).removesuffix("qweight")
    tensors |= {
        f"{stem}qweight": int32_codes(codes, 4).T.contiguous(),
        f"{stem}qzeros": int32_codes(zeros.T - 1, 4).contiguous(),
        f"{stem}scales": scales.T.half().contiguous(),
        f"{stem}g_idx": torch.arange(32).int() // 8,
    }
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    configured(folder, FORMATS["gptq"][1] | {"dynamic": {r"+:.*layers\.1\.mlp\.up_proj": {"group_size": 8}}})
    with pytest.raises(BudgetError, match=r"layers.1.mlp.up_proj .4 bits, groups of 8, symmetric. has no form"):
        BuildPlan(Checkpoint(folder), BuildOptions())


def test_options_for_quantized_weights_need_some(checkpoint: Path) -> None:
    for weights in ("stored", "dequantized"):
        with pytest.raises(BudgetError, match=f"holds floats: --weights {weights} is for quantized weights"):
            BuildPlan(Checkpoint(checkpoint), BuildOptions(weights=weights))


@pytest.mark.slow
def test_nobody_reads_a_matrix_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    """What is quantized and read by no part of the model is refused, as a tensor of floats is."""
    folder = quantized(checkpoint, tmp_path / "awq", "awq")
    tensors = load_file(folder / SINGLE)
    stray = {
        key.replace("layers.1.mlp.up_proj", "layers.1.mlp.extra_proj"): tensor.clone()
        for key, tensor in tensors.items()
        if "layers.1.mlp.up_proj" in key
    }
    save_file(tensors | stray, folder / SINGLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no part of this model reads .*extra_proj.weight"):
        BuildPlan(Checkpoint(folder), BuildOptions())
