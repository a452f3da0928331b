"""Quantized checkpoints written here from the published layouts, of a checkpoint of floats: codes by nearest rounding.

The formats' own libraries wrote tests/goldens/quantized; a whole checkpoint in any format comes from here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
SINGLE = "model.safetensors"
LINEAR = re.compile(r".*layers\.\d+\.(self_attn|mlp|attention|feed_forward)\.\w+\.weight")
Tensors = dict[str, Tensor]


def grouped(weight: Tensor, bits: int, *, symmetric: bool, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and zero points [out, groups]."""
    blocks = weight.float().reshape(len(weight), -1, group)
    most = (1 << bits) - 1
    if symmetric:
        scales = blocks.abs().amax(-1) / (most // 2)
        zeros = torch.full_like(scales, 1 << (bits - 1))
    else:
        low = blocks.amin(-1).clamp(max=0)
        scales = (blocks.amax(-1).clamp(min=0) - low) / most
        zeros = (-low / scales).round().clamp(1, most)
    scales = scales.half().float()
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, most)
    return codes.flatten(1).int(), scales, zeros.int()


def int32_codes(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [m, n] as int32 [m, n * bits / 32]; `order` is which code each place of a word has."""
    count = 32 // bits
    parts = codes.long().reshape(len(codes), -1, count)
    if order is not None:
        parts = parts[..., list(order)]
    packed = sum(parts[..., place] << (bits * place) for place in range(count))
    assert isinstance(packed, Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def awq(name: str, weight: Tensor, group: int = GROUP) -> Tensors:
    """AutoAWQ's gemm layout."""
    codes, scales, zeros = grouped(weight, 4, symmetric=False, group=group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{name}.qweight": int32_codes(codes.T, 4, order),
        f"{name}.qzeros": int32_codes(zeros.T, 4, order),
        f"{name}.scales": scales.T.half(),
    }


def gptq(name: str, weight: Tensor, bits: int = 4, *, symmetric: bool = True, group: int = GROUP) -> Tensors:
    """GPTQ's layout, format `gptq`."""
    codes, scales, zeros = grouped(weight, bits, symmetric=symmetric, group=group)
    return {
        f"{name}.qweight": int32_codes(codes, bits).T,
        f"{name}.qzeros": int32_codes(zeros.T - 1, bits),
        f"{name}.scales": scales.T.half(),
        f"{name}.g_idx": torch.arange(weight.shape[1]).int() // group,
    }


def packed(name: str, weight: Tensor) -> Tensors:
    """compressed-tensors' pack-quantized, 4 bits."""
    codes, scales, _ = grouped(weight, 4, symmetric=True)
    return {
        f"{name}.weight_packed": int32_codes(codes, 4),
        f"{name}.weight_scale": scales.bfloat16(),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def whole(name: str, weight: Tensor) -> Tensors:
    """compressed-tensors' int-quantized, 8 bits and a scale a row."""
    codes, scales, _ = grouped(weight, 8, symmetric=True, group=weight.shape[1])
    return {f"{name}.weight": (codes - 128).to(torch.int8), f"{name}.weight_scale": scales.bfloat16()}


def fp8(name: str, weight: Tensor) -> Tensors:
    """FP8 in blocks of 16 x 16."""
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows // GROUP, GROUP, columns // GROUP, GROUP)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    return {
        f"{name}.weight": (blocks / scales).reshape(weight.shape).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_inv": scales.reshape(rows // GROUP, columns // GROUP),
    }


def fp8_rows(name: str, weight: Tensor) -> Tensors:
    """compressed-tensors' float-quantized, a scale a row."""
    scales = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    values = (weight.float() / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {f"{name}.weight": values, f"{name}.weight_scale": scales}


def int8(name: str, weight: Tensor) -> Tensors:
    """bitsandbytes' LLM.int8()."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() / largest[:, None] * 127).round().to(torch.int8)
    return {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": torch.tensor(0).byte()}


def _compressed(form: str, weights: Mapping[str, Any], activations: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*visual.*"],
    }  # fmt: skip


_LEFT = {"modules_to_not_convert": ["visual"]}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FORMATS: dict[str, tuple[Callable[[str, Tensor], Tensors], dict[str, Any]]] = {
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm", **_LEFT},
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "gptq8": (
        lambda name, weight: gptq(name, weight, 8, symmetric=False),
        {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "sym": False, "checkpoint_format": "gptq"},
    ),
    "w4a16": (
        packed,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
    ),
    "w8a8": (whole, _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, _TOKENS)),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP], **_LEFT}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["visual"]}),
}
"""Format -> how a linear map is written, and what config.json says."""
FP8_DYNAMIC = (
    fp8_rows,
    _compressed(
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _TOKENS | {"type": "float"}
    ),
)
"""The scheme that is published as FP8-dynamic: each token of activations by its own scale."""


def quantized(source: Path, folder: Path, name: str) -> Path:
    """A copy of a checkpoint whose linear maps of layers are quantized in one of `FORMATS`."""
    return written(source, folder, *FORMATS[name])


def written(source: Path, folder: Path, write: Callable[[str, Tensor], Tensors], setting: Mapping[str, Any]) -> Path:
    """A copy of a checkpoint whose linear maps of layers `write` quantizes if groups divide their sides.

    Args:
        source: of floats.
        folder: of the copy.
        write: name and matrix of a linear map -> its tensors.
        setting: what config.json says.
    """
    shutil.copytree(source, folder)
    for path in folder.rglob(SINGLE):
        tensors: Tensors = {}
        for key, tensor in load_file(path).items():
            linear = LINEAR.fullmatch(key)
            fits = tensor.ndim == 2 and not any(side % GROUP for side in tensor.shape)
            plain = linear is None or not fits or "visual" in key
            tensors |= {key: tensor} if plain else write(key.removesuffix(".weight"), tensor)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
    configured(folder, setting)
    return folder


def configured(folder: Path, setting: Mapping[str, Any] | None) -> None:
    """Let config.json say this of the quantization; None: nothing."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(
        json.dumps(config if setting is None else {**config, "quantization_config": setting})
    )
