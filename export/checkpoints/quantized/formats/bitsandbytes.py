"""bitsandbytes as transformers saves it: LLM.int8() and NF4.

8 bits   weight          int8 [out, in]
         SCB             float32 [out], the largest magnitude of a row; weight_format says nothing else than rows
         weight[n, k] = code * SCB / 127, computed in float32
4 bits   weight          uint8 [out * in / 2, 1], two codes a byte, the first in the upper half
         weight.absmax   of each run of `blocksize` weights: float32, or uint8 by `nested_quant_map`, `nested_absmax`
         weight.quant_state.bitsandbytes__nf4    JSON: shape, blocksize, type
         weight = table[code] * absmax, computed in float32, in the type that the JSON says
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framefusion.export.checkpoints.quantized.formats.layout import Layout, Module, groups_of
from framefusion.export.checkpoints.quantized.linear import GroupedLinear, QuantizedLinear, Stored, row_blocks
from framefusion.export.checkpoints.quantized.setting import BEFORE, Setting

INVERSE_127 = 7.874015718698502e-3
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen numbers of NF4: quantiles of a normal distribution."""
STATE = "weight.quant_state.bitsandbytes__nf4"
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Int8Linear(GroupedLinear):
    """A linear map of LLM.int8()."""

    def opened(self, stored: Stored) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor | None]:
        """See `GroupedLinear`."""
        scales = self._largest(stored) * INVERSE_127

        def codes(first: int, last: int) -> Tensor:
            return (stored.read(self.weight, slice(first, last)).short() + 128).to(torch.uint8)

        return codes, scales[:, None], None

    def rows(self, stored: Stored, first: int, last: int) -> Iterator[Tensor]:
        """See `QuantizedLinear`: in the order of the library's products."""
        scales = self._largest(stored)
        for start, end in row_blocks(first, last, self.shape[1]):
            yield stored.read(self.weight, slice(start, end)).float() * scales[start:end, None] * INVERSE_127

    def _largest(self, stored: Stored) -> Tensor:
        return self.checked_scales(f"{self.module}.SCB", stored.read(f"{self.module}.SCB"))


@dataclass(frozen=True)
class Nf4Linear(QuantizedLinear):
    """A linear map of NF4.

    Attributes:
        block: weights that share a magnitude.
        nested: (weights of that share theirs, what is added to each); None: magnitudes are stored as floats.
    """

    block: int
    nested: tuple[int, float] | None

    @property
    def description(self) -> str:
        """See `QuantizedLinear`."""
        return f"NF4, blocks of {self.block}{'' if self.nested is None else ', scales quantized again'}"

    def rows(self, stored: Stored, first: int, last: int) -> Iterator[Tensor]:
        """See `QuantizedLinear`."""
        table = torch.tensor(NF4)
        scales = self._magnitudes(stored)
        width = self.shape[1]
        for start, end in row_blocks(first, last, width):
            octets = stored.read(self.weight, slice(start * width // 2, end * width // 2)).flatten()
            codes = torch.stack((octets >> 4, octets & 15), -1).flatten()
            shared = torch.arange(start * width, end * width) // self.block
            yield (table[codes.int()] * scales[shared]).reshape(-1, width)

    def _magnitudes(self, stored: Stored) -> Tensor:
        key = f"{self.weight}.absmax"
        found = stored.read(key)
        if self.nested is None:
            return self.checked_scales(key, found)
        block, offset = self.nested
        outer = stored.read(f"{self.weight}.nested_absmax")
        table = stored.read(f"{self.weight}.nested_quant_map")
        return self.checked_scales(key, table[found.int()] * outer[torch.arange(len(found)) // block] + offset)


class BitsAndBytes(Layout):
    """See the module."""

    title = "bitsandbytes"
    parts = ("SCB", "weight_format", "weight.absmax", "weight.quant_map", STATE, *NESTED)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._eight = setting.flag("load_in_8bit", False) or setting.flag("_load_in_8bit", False)
        four = setting.flag("load_in_4bit", False) or setting.flag("_load_in_4bit", False)
        if self._eight == four:
            raise setting.error("and does not say whether in 8 or in 4 bits: download config.json again")
        if four:
            setting.text("bnb_4bit_quant_type", "fp4", known=("nf4",))
        self._left = self.names(setting.names("llm_int8_skip_modules", "modules_to_not_convert"), within=True)

    def linear(self, module: Module) -> QuantizedLinear:
        """See `Layout`."""
        return self._int8(module) if self._eight else self._nf4(module)

    def leaves(self, module: str) -> bool:
        """See `Layout`."""
        return self._left.match(module)

    def _int8(self, module: Module) -> QuantizedLinear:
        outputs, inputs = module.entry("weight", ("I8",)).shape
        module.entry("SCB", ("F32",), (outputs,))
        if "weight_format" in module.parts:
            module.entry("weight_format", ("U8",), ())
            if int(module.read("weight_format")) != 0:
                raise module.error(f"is in an order for one kind of GPU (weight_format), which is not read: {BEFORE}")
        keys = module.keys("weight", "SCB", "weight_format")
        rounding = "whole numbers of 8 bits, as they come, large ones apart"
        shape = (outputs, inputs)
        return Int8Linear(module.name, keys, shape, "F32", rounding, bits=8, group=inputs, symmetric=True)

    def _nf4(self, module: Module) -> QuantizedLinear:
        # 1. the shape stands in the JSON: it must be that of the bytes
        state = self._state(module)
        outputs, inputs = state["shape"]
        block = state["blocksize"]
        if inputs % 2:
            raise module.error(f"has rows of {inputs} weights, an odd number, which is not read: {BEFORE}")
        module.entry("weight", ("U8",), (outputs * inputs // 2, 1))
        # 2. the table is the format's own
        module.entry("weight.quant_map", ("F32",), (16,))
        if not torch.equal(module.read("weight.quant_map"), torch.tensor(NF4)):
            raise module.error("has a quant_map that is not NF4's: config.json is of another model")
        # 3. the magnitudes, perhaps quantized themselves
        count = groups_of(outputs * inputs, block)
        nested: tuple[int, float] | None = None
        if NESTED[0] in module.parts:
            nested = (state["nested_blocksize"], state["nested_offset"])
            module.entry(NESTED[0], ("F32",), (groups_of(count, nested[0]),))
            module.entry(NESTED[1], ("F32",), (256,))
        module.entry("weight.absmax", ("F32",) if nested is None else ("U8",), (count,))
        keys = module.keys("weight", *self.parts[2:])
        return Nf4Linear(module.name, keys, (outputs, inputs), TYPES[state["dtype"]], "", block=block, nested=nested)

    def _state(self, module: Module) -> Mapping[str, Any]:
        """The JSON of a map, its values of the types that they must have."""
        entry = module.stored.entry(module.parts[STATE]) if STATE in module.parts else None
        module.entry(STATE, ("U8",), (entry.shape[0],) if entry is not None and entry.shape else (1,))
        try:
            state = json.loads(bytes(module.read(STATE).tolist()))
            shape = state["shape"]
            sizes = [state["blocksize"], state.get("nested_blocksize", 1), *shape]
            right = len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in sizes)
            right = right and state["dtype"] in TYPES and math.isfinite(float(state.get("nested_offset", 0)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            right = False
        if not right:
            raise module.error("has a quant_state that cannot be read: download the checkpoint again")
        return {"nested_blocksize": 1, **state, "nested_offset": float(state.get("nested_offset", 0))}
