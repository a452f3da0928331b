"""Whole checkpoints that compressed-tensors writes through transformers, and that transformers reads with it.

Names, ignored modules and configuration are the library's own; each matrix and the logits are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.decoders import llm_prefix
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from tests.export.check.test_agreement import agreement, failing

pytestmark = pytest.mark.slow
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, None),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}, TOKENS),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, TOKENS | {"type": "float"}),
}


def compressed(source: Path, folder: Path, scheme: str) -> Path:
    """A checkpoint that the library compresses and transformers saves."""
    pytest.importorskip("compressed_tensors", reason="it writes these checkpoints")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import Qwen2VLForConditionalGeneration

    form, weights, activations = SCHEMES[scheme]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head", "re:.*visual.*"], format=form)
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            args = module.quantization_scheme.weights
            blocks = module.weight.data.reshape(len(module.weight), -1, args.group_size or module.weight.shape[1])
            scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor: Any = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_matrices_and_logits_are_the_libraries(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    folder = compressed(checkpoint, tmp_path / scheme, scheme)
    assert (
        "visual.blocks.0.attn.qkv" in json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    )
    # 1. each matrix, as transformers has it after the library made floats of it
    source = Checkpoint(folder)
    plan = BuildPlan(source, BuildOptions(cost=0.5, weights="dequantized"))
    assert source.quantization is not None
    reader: Any = Qwen2VLForConditionalGeneration.config_class
    config = reader.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    theirs: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32)
    ours = llm_prefix(source, plan.family)
    assert len(source.quantization.linears) == 28
    for key in source.quantization.linears:
        expected = theirs.get_parameter(key.replace(ours, "model.language_model.", 1))
        assert torch.equal(source.tensor(key).float(), expected)
    # 2. the logits, a layer at a time, with weights that transformers' quantizer reads for itself
    found = agreement(plan, tmp_path / "bundle")
    assert failing(found) == []
    assert found.facts["weights"] == "dequantized by transformers' own quantizer (compressed-tensors)"
