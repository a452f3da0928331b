"""FP8 as transformers' `fp8` has it, the format of Qwen's and DeepSeek's releases: blocks, or a scale a matrix.

weight             float8 e4m3 [out, in]
weight_scale_inv   float [out / rows, in / columns], the factor and not its inverse; of a matrix [] or [1]
input_scale,       float, of activations where they are fixed (static); no part of the matrix
activation_scale

weight[n, k] = value[n, k] * scale, computed in float32
"""

from __future__ import annotations

from framefusion.export.checkpoints.quantized.formats.layout import FLOATS, Layout, Module, groups_of
from framefusion.export.checkpoints.quantized.linear import FloatLinear, QuantizedLinear
from framefusion.export.checkpoints.quantized.setting import Setting

SCALES = ("weight_scale_inv", "weight_scale")
DTYPE = "F32"


class Fp8(Layout):
    """See the module."""

    title = "FP8"
    parts = (*SCALES, "input_scale", "activation_scale")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        setting.text("fmt", "e4m3", known=("e4m3", "float8_e4m3fn"))
        setting.text("scale_fmt", "float", known=("", "float"))
        scheme = setting.text("activation_scheme", "dynamic", known=("dynamic", "static"))
        self._fixed = scheme == "static"
        self._block = self._sides()
        self._left = self.names(setting.names("modules_to_not_convert", "ignored_layers"), within=True)

    def linear(self, module: Module) -> QuantizedLinear:
        """See `Layout`."""
        outputs, inputs = module.entry("weight", ("F8_E4M3",)).shape
        present = [name for name in SCALES if name in module.parts]
        if len(present) > 1:
            raise module.error(f"has {' and '.join(present)}: two models are mixed here")
        scale = (present or SCALES)[0]
        if self._block is None:
            found = module.stored.entry(module.parts[scale]) if present else None
            module.entry(scale, FLOATS, (1,) if found is not None and found.shape == (1,) else ())
            block = (outputs, inputs)
        else:
            block = self._block
            module.entry(scale, FLOATS, (groups_of(outputs, block[0]), groups_of(inputs, block[1])))
        keys = module.keys(*self.parts, "weight")
        rounding = f"floats of 8 bits, {'with fixed scales' if self._fixed else 'as they come'}"
        shape = (outputs, inputs)
        return FloatLinear(module.name, keys, shape, DTYPE, rounding, block=block, scale=module.parts[scale])

    def leaves(self, module: str) -> bool:
        """See `Layout`."""
        return self._left.match(module)

    def _sides(self) -> tuple[int, int] | None:
        """Rows and columns of a block; None: one scale for a matrix."""
        found = self.setting.values.get("weight_block_size")
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
            raise self.setting.error(
                f"and weight_block_size is {found!r:.40}, two whole numbers are expected: download config.json again"
            )
        return found[0], found[1]
