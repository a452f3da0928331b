"""compressed-tensors, as llm-compressor writes it: weights of 4 or 8 bits, whole numbers or floats.

    pack-quantized    weight_packed int32 [out, in * bits / 32], inputs one after the other, lowest bits first;
                      weight_shape int64 [2]; weight_zero_point int32 [out * bits / 32, groups]; all codes shifted by
                      2^(bits - 1)
    int-quantized     weight int8 [out, in]; weight_zero_point int8 [out, groups]
    float-quantized   weight float8 e4m3 [out, in]

    weight_scale      float [out, groups], [out, 1] or [1]; of blocks [out / rows, in / columns]

    weight[n, k] = (code - zero) * scale, computed in the type of the scales (bfloat16)

A group of config.json says which modules it is of, how their weights are stored, and how activations are rounded where
they are; that rounding is no part of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from framefusion.export.checkpoints.quantized.formats.layout import FLOATS, Layout, Module, groups_of
from framefusion.export.checkpoints.quantized.linear import (
    FloatLinear,
    GroupedLinear,
    QuantizedLinear,
    Stored,
    unpacked,
)
from framefusion.export.checkpoints.quantized.patterns import ModuleNames
from framefusion.export.checkpoints.quantized.setting import BEFORE, Setting

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"
ACTIVATIONS = ("input_scale", "input_zero_point")
"""Scales of activations, where they are fixed; they are no part of a weight."""


@dataclass(frozen=True)
class Scheme:
    """What one group of config.json says of its modules' weights.

    Attributes:
        form: pack-quantized, or one of PLAIN.
        kind: "int" or "float".
        bits, symmetric: of a code.
        strategy: "tensor", "channel", "group" or "block".
        group: inputs that share a scale (group).
        block: rows and columns that do (block).
        activations: how they are rounded, for people; "": not at all.
        by_token: they are, to floats of 8 bits, each token by its own scale.
    """

    form: str
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int]
    activations: str
    by_token: bool


@dataclass(frozen=True)
class CompressedLinear(GroupedLinear):
    """Whole numbers, in words of 32 bits or a byte each.

    Attributes:
        packed: `weight_packed` has the codes, not `weight`.
        zeros: a tensor of zero points is stored, packed if `zeros_packed`.
    """

    packed: bool
    zeros: bool
    zeros_packed: bool

    def opened(self, stored: Stored) -> tuple[Callable[[int, int], Tensor], Tensor, Tensor | None]:
        """See `GroupedLinear`."""
        key = f"{self.module}.weight_scale"
        outputs = self.shape[0]
        count = groups_of(self.shape[1], self.group)
        scales = self.checked_scales(key, stored.read(key)).reshape(-1, count).expand(outputs, -1)
        return self._codes(stored), scales, self._zero_points(stored, tuple(scales.shape))

    def _codes(self, stored: Stored) -> Callable[[int, int], Tensor]:
        middle = 1 << (self.bits - 1)

        def packed(first: int, last: int) -> Tensor:
            part = stored.read(f"{self.module}.weight_packed", slice(first, last))
            return unpacked(part, self.bits)[:, : self.shape[1]]

        def plain(first: int, last: int) -> Tensor:
            codes = stored.read(self.weight, slice(first, last)).short() + middle
            if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2 * middle):
                raise self.damaged(f"{self.weight} holds numbers of more than {self.bits} bits")
            return codes.to(torch.uint8)

        return packed if self.packed else plain

    def _zero_points(self, stored: Stored, shape: tuple[int, ...]) -> Tensor | None:
        if not self.zeros:
            return None
        key = f"{self.module}.weight_zero_point"
        found = stored.read(key)
        if self.zeros_packed:
            return self.checked_zeros(key, unpacked(found.T, self.bits)[:, : shape[0]].T)
        middle = 1 << (self.bits - 1)
        shifted = found.reshape(-1, 1 if shape[1] == 1 else shape[1]).short().expand(shape) + middle
        if int(shifted.min()) < 0 or int(shifted.max()) >= 2 * middle:
            raise self.damaged(f"{key} holds numbers of more than {self.bits} bits")
        return self.checked_zeros(key, shifted.to(torch.uint8))


class CompressedTensors(Layout):
    """See the module."""

    title = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", *ACTIVATIONS)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # older writers call it frozen; what is stored proves itself below
        setting.text("quantization_status", "compressed", known=("compressed", "frozen"))
        if setting.values.get("kv_cache_scheme"):
            raise setting.error(f"and its KV cache too (kv_cache_scheme), whose scales are not read: {BEFORE}")
        for key in ("sparsity_config", "transform_config"):
            section = setting.section(key)
            if section is not None and section.values and section.values.get("format") != "dense":
                raise setting.error(f"and {key} changes the weights further, which is not read: {BEFORE}")
        self._format = setting.text("format")
        groups = setting.section("config_groups")
        if groups is None or not groups.values:
            raise setting.error("and config_groups are missing: download config.json again")
        self._groups = [self._group(groups, name) for name in groups.values]
        self._left = self.names(setting.names("ignore"))

    def linear(self, module: Module) -> QuantizedLinear:
        """See `Layout`."""
        scheme = self._scheme_of(module)
        scale = module.entry("weight_scale", FLOATS, self._any_shape(module, "weight_scale"))
        if scheme.form == PACKED:
            return self._packed(module, scheme, scale.dtype, scale.shape)
        if scheme.kind == "float":
            return self._floats(module, scheme, scale.dtype, scale.shape)
        shape = module.entry("weight", ("I8",)).shape
        return self._whole(module, scheme, (shape[0], shape[1]), scale.dtype, scale.shape, packed=False)

    def leaves(self, module: str) -> bool:
        """See `Layout`."""
        return self._left.match(module)

    def _packed(self, module: Module, scheme: Scheme, dtype: str, scale: tuple[int, ...]) -> QuantizedLinear:
        """A map of `weight_packed`, whose words leave the row's length open: `weight_shape` has it."""
        outputs, width = module.entry("weight_packed", ("I32",)).shape
        module.entry("weight_shape", ("I64", "I32"), (2,))
        shape = tuple(module.read("weight_shape").tolist())
        if shape[0] != outputs or shape[1] < 1 or groups_of(shape[1] * scheme.bits, 32) != width:
            raise module.error(
                f"has weight_shape {shape} and weight_packed {(outputs, width)} of {scheme.bits} bits: one of the two "
                "is of another model"
            )
        return self._whole(module, scheme, (shape[0], shape[1]), dtype, scale, packed=True)

    def _whole(
        self,
        module: Module,
        scheme: Scheme,
        shape: tuple[int, int],
        dtype: str,
        scale: tuple[int, ...],
        *,
        packed: bool,
    ) -> QuantizedLinear:
        """A map of whole numbers: scales and zero points against its shape."""
        outputs, inputs = shape
        group = scheme.group if scheme.strategy == "group" else inputs
        count = groups_of(inputs, group)
        known: dict[str, list[tuple[int, ...]]] = {
            "tensor": [(1,), ()], "channel": [(outputs, 1), (outputs,)], "group": [(outputs, count)]
        }  # fmt: skip
        if scale not in known.get(scheme.strategy, []) or inputs % group:
            raise module.error(
                f"has weight_scale {scale} for a matrix {shape}, which is no scale a {scheme.strategy} "
                f"{f'of {group}' if scheme.strategy == 'group' else ''}: config.json and the tensors are of different "
                "models"
            )
        module.check_order("weight_g_idx", inputs, group)
        stored = "weight_zero_point" in module.parts
        if not stored and not scheme.symmetric:
            raise module.error("has no weight_zero_point though config.json says that it has them: it is incomplete")
        zeros_packed = False
        if stored:
            zeros_packed = (
                module.entry("weight_zero_point", ("I8", "I32"), self._any_shape(module, "weight_zero_point")).dtype
                == "I32"
            )
            expected = (groups_of(outputs * scheme.bits, 32), count) if zeros_packed else scale
            module.entry("weight_zero_point", ("I8", "I32"), expected)
        return CompressedLinear(
            module.name,
            module.keys(*self.parts) if packed else module.keys("weight", *self.parts[1:3], *self.parts[4:]),
            shape,
            dtype,
            scheme.activations,
            bits=scheme.bits,
            group=group,
            symmetric=scheme.symmetric,
            packed=packed,
            zeros=stored,
            zeros_packed=zeros_packed,
        )

    def _floats(self, module: Module, scheme: Scheme, dtype: str, scale: tuple[int, ...]) -> QuantizedLinear:
        """A map of floats of 8 bits."""
        outputs, inputs = module.entry("weight", ("F8_E4M3",)).shape
        height, width = scheme.block
        known: dict[str, tuple[list[tuple[int, ...]], tuple[int, int]]] = {
            "tensor": ([(1,), ()], (outputs, inputs)),
            "channel": ([(outputs, 1), (outputs,)], (1, inputs)),
            "group": ([(outputs, groups_of(inputs, scheme.group or 1))], (1, scheme.group)),
            "block": ([(groups_of(outputs, height or 1), groups_of(inputs, width or 1))], scheme.block),
        }
        shapes, block = known[scheme.strategy]
        if scale not in shapes:
            raise module.error(
                f"has weight_scale {scale} for a matrix {(outputs, inputs)}, which is no scale a {scheme.strategy}: "
                "config.json and the tensors are of different models"
            )
        return FloatLinear(
            module.name,
            module.keys("weight", "weight_scale", *ACTIVATIONS),
            (outputs, inputs),
            dtype,
            scheme.activations,
            block=block,
            scale=module.parts["weight_scale"],
            by_token=scheme.by_token,
        )

    def _any_shape(self, module: Module, part: str) -> tuple[int, ...]:
        """The shape that a tensor has, for where several are right."""
        found = module.stored.entry(module.parts[part]) if part in module.parts else None
        return () if found is None else found.shape

    def _scheme_of(self, module: Module) -> Scheme:
        """The scheme of the group whose targets name a module: by its name, by an expression, else every linear map."""
        by_name = [scheme for names, _, scheme in self._groups if names.match(module.name)]
        by_class = [scheme for _, classes, scheme in self._groups if "Linear" in classes]
        found = [*by_name, *by_class]
        if not found:
            raise module.error("is stored quantized, and no group of config_groups is of it: two models are mixed here")
        return found[0]

    def _group(self, groups: Setting, name: str) -> tuple[ModuleNames, list[str], Scheme]:
        """Targets that are names, targets that are classes, and the scheme of a group."""
        group = groups.section(name)
        if group is None:
            raise groups.error(f"and {name} is null: download config.json again")
        targets = group.names("targets")
        classes = [target for target in targets if "." not in target and target[:1].isupper()]
        names = self.names([target for target in targets if target not in classes])
        return names, classes, self._scheme(group)

    def _scheme(self, group: Setting) -> Scheme:
        weights = group.section("weights")
        if weights is None:
            raise group.error("and it quantizes no weights, which is not read: give the checkpoint before")
        kind = weights.text("type", "int", known=("int", "float"))
        form = group.text("format") or self._format
        if self._format not in (form, MIXED):
            raise group.error(f"in the format {form!r:.40}, and the whole in {self._format!r:.40}: one is another's")
        fitting = (PACKED, *PLAIN) if kind == "int" else PLAIN[1:]
        if form not in fitting or (kind == "int" and form == PLAIN[1]):
            raise group.error(f"in the format {form!r:.40} for {kind}s, which is not read: {BEFORE}")
        strategy = weights.text("strategy", self._usual(weights), known=("tensor", "channel", "group", "block"))
        size = weights.integer("group_size", -1)
        if strategy == "group" and size < 1:
            raise weights.error(f"and group_size is {size}: download config.json again")
        if kind == "int" and strategy == "block":
            raise weights.error(f"and in blocks of whole numbers, which are not read: {BEFORE}")
        order = weights.values.get("actorder")
        if order not in (None, False, "weight", "static", "group", "dynamic"):
            raise weights.error(f"and actorder is {order!r:.40}: download config.json again")
        return Scheme(
            form=form,
            kind=kind,
            bits=weights.integer("num_bits", 8, known=(4, 8) if kind == "int" else (8,)),
            symmetric=weights.flag("symmetric", True),
            strategy=strategy,
            group=size,
            block=self._block(weights) if strategy == "block" else (0, 0),
            activations=self._activations(group),
            by_token=self._by_token(group),
        )

    def _usual(self, weights: Setting) -> str:
        """The strategy where none is named, as the format has it."""
        size = weights.values.get("group_size")
        return "tensor" if size is None else "channel" if size == -1 else "group"

    def _block(self, weights: Setting) -> tuple[int, int]:
        found = weights.values.get("block_structure")
        if isinstance(found, str):
            found = [int(side) if side.isdecimal() and len(side) < 8 else 0 for side in found.split("x")]
        if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 1 for n in found):
            raise weights.error("and block_structure is not two whole numbers: download config.json again")
        return found[0], found[1]

    def _by_token(self, group: Setting) -> bool:
        """Whether activations are rounded as graphs can: see `Float8Format.rounds`."""
        inputs = group.section("input_activations")
        if inputs is None:
            return False
        wanted = {"type": "float", "strategy": "token", "dynamic": True, "num_bits": 8}
        return inputs.flag("symmetric", True) and all(inputs.values.get(key) == value for key, value in wanted.items())

    def _activations(self, group: Setting) -> str:
        """How activations are rounded, for people."""
        if group.values.get("output_activations"):
            raise group.error(f"and the results of its maps too (output_activations), which is not read: {BEFORE}")
        inputs = group.section("input_activations")
        if inputs is None:
            return ""
        kind = "floats" if inputs.text("type", "int") == "float" else "whole numbers"
        fixed = "as they come" if inputs.values.get("dynamic") else "with fixed scales"
        return f"{kind} of {inputs.integer('num_bits', 8)} bits, {fixed}"
