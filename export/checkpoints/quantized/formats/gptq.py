"""GPTQ as AutoGPTQ and GPTQModel write it, formats `gptq` and `gptq_v2`, without act order.

qweight   int32 [in * bits / 32, out]      inputs one after the other, lowest bits first
qzeros    int32 [groups, out * bits / 32]  outputs likewise; `gptq` stores the zero point less one
scales    float [groups, out]
g_idx     int32 [in]                       the group of each input: k // group, or the map is refused

weight[n, k] = (code - zero) * scale, computed in the type of the scales (float16)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.quantized.formats.layout import FLOATS, Layout, Module, groups_of
from framefusion.export.checkpoints.quantized.linear import GroupedLinear, QuantizedLinear, Stored, unpacked
from framefusion.export.checkpoints.quantized.patterns import REGULAR, ModuleNames
from framefusion.export.checkpoints.quantized.setting import BEFORE, Setting

FORMATS = ("gptq", "gptq_v2")
OVERRIDES = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class GptqLinear(GroupedLinear):
    """A linear map in GPTQ's layout.

    Attributes:
        less_one: zero points are stored less one (`gptq`), not as they are (`gptq_v2`).
    """

    less_one: bool

    def opened(self, stored: Stored) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor | None]:
        """See `GroupedLinear`."""
        packed = stored.read(f"{self.module}.qweight")
        scales = self.checked_scales(f"{self.module}.scales", stored.read(f"{self.module}.scales"))
        key = f"{self.module}.qzeros"
        zeros = unpacked(stored.read(key), self.bits)[:, : self.shape[0]]
        if self.less_one:
            if bool((zeros == (1 << self.bits) - 1).any()):
                raise CheckpointError(
                    f"{key} holds {(1 << self.bits) - 1} in the format gptq, which stores zero points less one: some "
                    "loaders take it for 0, others for a number of too many bits; give the checkpoint in the format "
                    "gptq_v2"
                )
            zeros = zeros + 1

        def codes(first: int, last: int) -> Tensor:
            return unpacked(packed[:, first:last].T, self.bits)[:, : self.shape[1]]

        return codes, scales.T, self.checked_zeros(key, zeros.T)


class Gptq(Layout):
    """See the module."""

    title = "GPTQ"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        stored_as = {setting.text(key, known=("", *FORMATS)) for key in ("checkpoint_format", "format")} - {""}
        if len(stored_as) > 1:
            raise setting.error("and checkpoint_format and format name different ones: download config.json again")
        self._less_one = stored_as != {"gptq_v2"}
        setting.text("pack_dtype", "int32", known=("int32",))
        if setting.flag("is_marlin_format", False):
            raise setting.error(f"and in Marlin's layout, which is not read: {BEFORE}")
        self._scheme(setting)  # refuses what no module could have, before any is looked at
        self._head = setting.flag("lm_head", False)
        self._rules = self._overrides()

    def linear(self, module: Module) -> QuantizedLinear:
        """See `Layout`."""
        setting = self._overridden(module.name) or self.setting
        bits, group, symmetric = self._scheme(setting)
        in_word = 32 // bits
        packed, outputs = module.entry("qweight", ("I32",)).shape
        inputs = packed * in_word
        group = inputs if group == -1 else group
        count = groups_of(inputs, group)
        scales = module.entry("scales", FLOATS, (count, outputs))
        module.entry("qzeros", ("I32",), (count, groups_of(outputs, in_word)))
        if setting.flag("desc_act", False) and "g_idx" not in module.parts:
            raise module.error("has no g_idx though desc_act is true: the checkpoint is incomplete")
        module.check_order("g_idx", inputs, group)
        return GptqLinear(
            module.name,
            module.keys(*self.parts),
            (outputs, inputs),
            scales.dtype,
            "",
            bits=bits,
            group=group,
            symmetric=symmetric,
            less_one=self._less_one,
        )

    def leaves(self, module: str) -> bool:
        """See `Layout`."""
        if module.rpartition(".")[2] == "lm_head" and not self._head:
            return True
        return self._overridden(module) is None

    def _scheme(self, setting: Setting) -> tuple[int, int, bool]:
        """Bits, group and whether there are no zero points."""
        group = setting.integer("group_size", -1)
        if group == 0:
            raise setting.error("and group_size is 0: download config.json again")
        return setting.integer("bits", known=(4, 8)), group, setting.flag("sym", True)

    def _overrides(self) -> list[tuple[ModuleNames, Setting | None]]:
        """Rules of `dynamic`: modules of a pattern -> their setting; None: they are not quantized."""
        dynamic = self.setting.section("dynamic")
        rules: list[tuple[ModuleNames, Setting | None]] = []
        for pattern, values in (dynamic.values if dynamic is not None else {}).items():
            modules = self.names([REGULAR + pattern.removeprefix("+:").removeprefix("-:")])
            if pattern.startswith("-:"):
                rules.append((modules, None))
                continue
            if not isinstance(values, dict) or not values.keys() <= set(OVERRIDES):
                raise self.setting.error(
                    f"and dynamic says {values!r:.60} of {pattern!r:.60}, which is not read: {BEFORE}"
                )
            changed = Setting(self.setting.folder, {**self.setting.values, **values}, self.setting.place)
            self._scheme(changed)
            rules.append((modules, changed))
        return rules

    def _overridden(self, module: str) -> Setting | None:
        """What the first rule that matches says of a module; None: it is not quantized."""
        return next((setting for modules, setting in self._rules if modules.match(module)), self.setting)
