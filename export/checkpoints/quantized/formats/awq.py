"""AWQ in the layout `gemm`: AutoAWQ's, the one of the published Qwen-VL checkpoints.

qweight   int32 [in, out / 8]      eight outputs of 4 bits a word, in the order 0 2 4 6 1 3 5 7, lowest bits first
qzeros    int32 [groups, out / 8]  the same
scales    float [groups, out]

weight[n, k] = (code - zero) * scale, computed in the type of the scales (float16)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from framefusion.export.checkpoints.quantized.formats.layout import FLOATS, Layout, Module, groups_of
from framefusion.export.checkpoints.quantized.linear import GroupedLinear, QuantizedLinear, Stored, unpacked
from framefusion.export.checkpoints.quantized.setting import Setting

BITS = 4
IN_WORD = 32 // BITS
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word are output 0, 1, 2, ...: the reverse of the order in which they are packed."""


@dataclass(frozen=True)
class AwqLinear(GroupedLinear):
    """A linear map in AWQ's gemm layout."""

    def opened(self, stored: Stored) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor | None]:
        """See `GroupedLinear`."""
        packed = stored.read(f"{self.module}.qweight")
        scales = self.checked_scales(f"{self.module}.scales", stored.read(f"{self.module}.scales"))
        zeros = unpacked(stored.read(f"{self.module}.qzeros"), BITS, ORDER)

        def codes(first: int, last: int) -> Tensor:
            begin = first // IN_WORD
            columns = unpacked(packed[:, begin : groups_of(last, IN_WORD)], BITS, ORDER)
            return columns[:, first - begin * IN_WORD : last - begin * IN_WORD].T

        return codes, scales.T, self.checked_zeros(f"{self.module}.qzeros", zeros.T)


class Awq(Layout):
    """See the module."""

    title = "AWQ"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        setting.integer("bits" if "bits" in setting.values else "w_bit", known=(BITS,))
        for key in ("version", "checkpoint_format", "format"):  # the latter two are GPTQModel's
            setting.text(key, "gemm", known=("gemm",))
        self._group = setting.integer("group_size" if "group_size" in setting.values else "q_group_size")
        self._symmetric = not setting.flag("zero_point", True)
        self._left = self.names(setting.names("modules_to_not_convert"), within=True)

    def linear(self, module: Module) -> QuantizedLinear:
        """See `Layout`."""
        inputs, packed = module.entry("qweight", ("I32",)).shape
        outputs = packed * IN_WORD
        group = inputs if self._group == -1 else self._group
        if group < 1:
            raise self.setting.error(f"and group_size is {group}: download config.json again")
        count = groups_of(inputs, group)
        scales = module.entry("scales", FLOATS, (count, outputs))
        module.entry("qzeros", ("I32",), (count, packed))
        keys = module.keys(*self.parts)
        return AwqLinear(
            module.name, keys, (outputs, inputs), scales.dtype, "", bits=BITS, group=group, symmetric=self._symmetric
        )

    def leaves(self, module: str) -> bool:
        """See `Layout`."""
        return self._left.match(module)
