"""A quantized checkpoint as one whose linear maps are matrices: which tensors stand for which, proven from headers.

Every stored tensor is either read for a linear map or stays a tensor of its own, which somebody has to read. What
config.json says and what is stored must agree in both directions: a module that is to be left alone is stored plain,
and a module that is stored plain is among those, wherever modules of its name in other layers are quantized.

The main path is `quantization_of`. Reads no weight; knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framefusion.console.plain_text import printable
from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.files import present
from framefusion.export.checkpoints.quantized.formats.awq import Awq
from framefusion.export.checkpoints.quantized.formats.bitsandbytes import BitsAndBytes
from framefusion.export.checkpoints.quantized.formats.compressed_tensors import CompressedTensors
from framefusion.export.checkpoints.quantized.formats.fp8 import Fp8
from framefusion.export.checkpoints.quantized.formats.gptq import Gptq
from framefusion.export.checkpoints.quantized.formats.layout import Layout, Module
from framefusion.export.checkpoints.quantized.linear import QuantizedLinear, Stored
from framefusion.export.checkpoints.quantized.patterns import PatternError
from framefusion.export.checkpoints.quantized.setting import BEFORE, KEYS, Setting, method_of

LAYOUTS: Mapping[str, type[Layout]] = {
    "awq": Awq, "gptq": Gptq, "compressed-tensors": CompressedTensors, "fp8": Fp8, "bitsandbytes": BitsAndBytes,
}  # fmt: skip
"""What config.json calls a format -> the format."""
READ = "AWQ (gemm), GPTQ, compressed-tensors, FP8 in blocks and bitsandbytes"
MODELOPT = "hf_quant_config.json"
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|weight_shape|weight_g_idx|"
    r"input_scale|absmax|quant_map|SCB|weight_format|scales|zeros|qscales|biases|"
    r"weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*))$"
)
"""Tensors that only a quantized linear map has."""
_NARROW = ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32", "U32")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Quantization:
    """The quantized part of a checkpoint.

    Attributes:
        setting: what config.json says of it.
        title: of the format: "AWQ".
        linears: key of a matrix -> the linear map that it is of.
        hidden: stored tensors that stand for them.
    """

    setting: Setting
    title: str
    linears: Mapping[str, QuantizedLinear]
    hidden: frozenset[str]

    @property
    def descriptions(self) -> Mapping[str, int]:
        """How weights are stored -> how many linear maps are; the most frequent first."""
        counts: dict[str, int] = {}
        for linear in self.linears.values():
            counts[linear.description] = counts.get(linear.description, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def activations(self) -> str:
        """How activations are rounded, if those of any map are; "" else."""
        return next((linear.activations for linear in self.linears.values() if linear.activations), "")

    def __str__(self) -> str:
        """For people: "AWQ: 4 bits, groups of 128, with zero points in 196 linear maps"."""
        parts = [f"{text} in {count} linear maps" for text, count in self.descriptions.items()]
        rounded = f"; activations: {self.activations}" if self.activations else ""
        return f"{self.title}: {'; '.join(parts)}{rounded}"


def quantization_of(
    folder: Path, configs: Iterable[tuple[str, Mapping[str, Any]]], keys: Collection[str], stored: Stored
) -> Quantization | None:
    """What of a checkpoint is quantized, proven from its headers; None where nothing is.

    Args:
        folder: of the checkpoint.
        configs: of the model and of its parts, each with what it is called in errors.
        keys: names of its tensors, as they are stored.
        stored: the tensors.

    Raises:
        CheckpointError: the format is not read, or config.json and the tensors do not agree.
    """
    # 1. what config.json says, in one place
    setting = setting_of(folder, configs)
    if setting is None:
        _refuse_unnamed(folder, keys)
        return None
    layout = _layout(setting)
    # 2. the tensors of each module, by what stands behind its name
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        part = next((part for part in layout.parts if key.endswith(f".{part}")), None)
        if part is not None:
            modules.setdefault(key.removesuffix(f".{part}"), {})[part] = key
    # 3. each module from the headers of its tensors
    linears: dict[str, QuantizedLinear] = {}
    for name, parts in sorted(modules.items()):
        weight = f"{name}.weight"
        if stored.entry(weight) is not None:
            parts["weight"] = weight
        linear = layout.linear(Module(name, parts, stored, setting))
        if weight in parts.values() and weight not in linear.keys:
            raise setting.error(f"and {name} is stored twice, as it is ({weight}) and quantized: two models are mixed")
        linears[weight] = linear
    quantization = Quantization(
        setting, layout.title, linears, frozenset(key for linear in linears.values() for key in linear.keys)
    )
    # 4. both directions: what is left alone, and what is not
    if not linears:
        raise setting.error(f"but none of its tensors is ({', '.join(layout.parts[:3])}): config.json is another one's")
    try:
        _check_left(layout, quantization, keys, stored)
    except PatternError as error:
        raise setting.error(f"and {error}") from None
    return quantization


def setting_of(folder: Path, configs: Iterable[tuple[str, Mapping[str, Any]]]) -> Setting | None:
    """What the configurations say of a quantization; None where none does.

    Raises:
        CheckpointError: two say different things, or it is no object.
    """
    found: Setting | None = None
    for place, config in configs:
        for key in KEYS:
            values = config.get(key)
            if not values:
                continue
            here = Setting(folder, values if isinstance(values, dict) else {}, f"{key} of {place}")
            if not isinstance(values, dict):
                raise CheckpointError(
                    f"{folder} is quantized ({method_of(values)}: {here.place}), and not by an object that says how: "
                    f"{BEFORE}"
                )
            if found is not None and found.values != values:
                raise here.error(f"and {found.place} says something else: download config.json again")
            found = found or here
    if found is None and present(folder / MODELOPT):
        found = Setting(folder, {"quant_method": "modelopt"}, MODELOPT)
    return found


def _layout(setting: Setting) -> Layout:
    """The format that a setting names, with what it says of it."""
    layout = LAYOUTS.get(setting.method)
    if layout is not None:
        return layout(setting)
    if setting.method in ("modelopt", "nvfp4", "fp8_pb_wo") or setting.place == MODELOPT:
        raise CheckpointError(
            f"{setting.folder} is quantized ({method_of(setting.values)}: {setting.place}) by ModelOpt, whose layouts "
            f"(NVFP4 among them) are not read; {READ} are: {BEFORE}"
        )
    of_mlx = " (MLX writes such an object)" if not setting.method and "group_size" in setting.values else ""
    raise setting.error(f"which is not read{of_mlx}; {READ} are: {BEFORE}")


def _refuse_unnamed(folder: Path, keys: Iterable[str]) -> None:
    """Refuse tensors of a quantized model of which config.json does not say that it is one."""
    found = next((key for key in keys if _QUANTIZED.search(key)), None)
    if found is not None:
        raise CheckpointError(
            f"{folder} is quantized (its tensor {printable(found)} says so, though config.json does not): "
            f"take config.json from where the weights are from, or {BEFORE}"
        )


def _check_left(layout: Layout, quantization: Quantization, keys: Iterable[str], stored: Stored) -> None:
    """Refuse what config.json leaves alone and is quantized, and what it does not and is plain."""
    setting = layout.setting
    # 1. quantized, though config.json says that it is not
    for linear in quantization.linears.values():
        if layout.leaves(linear.module):
            raise setting.error(
                f"and {linear.module} is, though it is among the modules that are not: config.json is another one's"
            )
    kinds = {_NUMBER.sub("*", linear.module): linear.module for linear in quantization.linears.values()}
    for key in keys:
        if key in quantization.hidden:
            continue
        # 2. a part of a quantized map without the others
        name = key.removesuffix(".weight")
        entry = stored.entry(key)
        if name != key and entry is not None and entry.dtype in _NARROW:
            raise setting.error(
                f"and {key} is stored as {entry.dtype} without a scale: the checkpoint is incomplete, download it again"
            )
        if _QUANTIZED.search(key):
            raise setting.error(f"and holds {key}, which its format does not have: two models are mixed here")
        # 3. plain, though the same module of other layers is quantized
        if name != key and _NUMBER.sub("*", name) in kinds and not layout.leaves(name):
            raise setting.error(
                f"and {name} is stored plain, though {kinds[_NUMBER.sub('*', name)]} is quantized and config.json does "
                "not say that it is left: its tensors are of different models"
            )
