"""Which linear maps of a decoder are in 4 or 8 bits, in which format, and where their codes come from.

    made    options say so: every linear map of every layer, from a checkpoint of floats
    read    the checkpoint holds codes: these linear maps, in the checkpoint's formats

Head, embedding table and vision tower stay floats. Reads configuration and headers alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, LatestBlocks, QuantizedPart, Recipe, Source
from framefusion.export.graphs.decoder import LINEARS
from framefusion.export.graphs.segments import SegmentPlan
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.options import AS_STORED, DEQUANTIZED, BuildOptions
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.recipes import CodeReader, Made, Stored
from framefusion.export.quantization.search import search
from framefusion.runtime.format.manifest import QuantizationRecord, WeightFormatRecord

BLOCKS = {"int8": 128, "int4": 32}
"""Weights -> inputs that share a scale, where the option does not say."""
METHOD = "search of scales"
_OPTION = re.compile(r"(int8|int4)(?::(\d{1,4}))?(\+zero)?")


def parse_weights(text: str | None) -> BlockFormat | None:
    """The format that `BuildOptions.weights` names; None where no codes are to be chosen.

    Raises:
        BudgetError: it names none.
        CheckpointError: no kernel has blocks of that size.
    """
    if text in (None, AS_STORED, DEQUANTIZED):
        return None
    found = _OPTION.fullmatch(text)
    if found is None:
        raise BudgetError(
            f"--weights {text}: int8 or int4 is expected, with the size of a block (int4:64) and +zero for zero "
            f"points; {AS_STORED} or {DEQUANTIZED} for a quantized checkpoint"
        )
    name, block, zero = found.groups()
    return BlockFormat(int(name.removeprefix("int")), int(block or BLOCKS[name]), symmetric=not zero)


def check_quantized(segments: Sequence[SegmentPlan], dialect: Dialect, options: BuildOptions) -> None:
    """Refuse what cannot run weights in these formats.

    Raises:
        BudgetError: the dialect or the engines cannot.
    """
    if not any(block.formats for plan in segments for block in plan.blocks):
        return
    if "matmul_nbits" not in dialect.translations:
        raise BudgetError(f"weights in 4 or 8 bits have no form in dialect {dialect.name}: build with --dialect gqa")
    if options.backend is not None:
        raise BudgetError(f"{options.backend} engines are not compiled of weights in 4 or 8 bits: leave --backend out")


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """How the linear maps of a decoder are stored.

    Attributes:
        checkpoint: where floats or codes are.
        chosen: the format that codes are chosen in; None: the checkpoint's own, where it holds any, or floats.
        dtype: of the bundle.
        signed: see `BlockFormat.signed`: the dialect's packing.
        latest: see `LatestBlocks`.
    """

    checkpoint: Checkpoint
    chosen: BlockFormat | None
    dtype: torch.dtype
    signed: bool
    latest: LatestBlocks
    keeps_codes: bool = True
    """A quantized checkpoint's own codes are taken where kernels have such; else all of them become floats first."""

    def record(self, segments: Sequence[SegmentPlan]) -> QuantizationRecord | None:
        """The manifest's part on the weights of these segments; None where all are floats."""
        blocks = [block for plan in segments for block in plan.blocks]
        counts = Counter(form for block in blocks for _, form in block.formats)
        if not counts:
            return None
        linears = sum(len(LINEARS[block.kind]) for block in blocks)
        formats = tuple(WeightFormatRecord(f.bits, f.block, f.symmetric, count) for f, count in counts.items())
        method = "as the checkpoint holds them" if self.chosen is None else METHOD
        return QuantizationRecord(method, self.chosen is None, formats, linears - sum(counts.values()))

    def formatted(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> SegmentPlan:
        """A segment with the formats of its weights.

        Args:
            plan: of the segment.
            sources: of its parameters if all of them were floats.
        """
        blocks = []
        for index, block in enumerate(plan.blocks):
            pairs = ((part, self._recipe(sources[f"blocks.{index}.{part}.weight"])) for part in LINEARS[block.kind])
            formats = tuple((part, recipe.form) for part, recipe in pairs if recipe is not None)
            blocks.append(replace(block, formats=formats))
        return replace(plan, blocks=tuple(blocks))

    def sources(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> dict[str, AnySource]:
        """Where the parameters of a segment are, those of quantized linear maps among them; arguments as above."""
        found = dict(sources)
        for index, block in enumerate(plan.blocks):
            for part in LINEARS[block.kind]:
                name = f"blocks.{index}.{part}"
                recipe = self._recipe(sources[f"{name}.weight"])
                if recipe is not None:
                    shapes = recipe.form.shapes(1, 1)
                    found |= {f"{name}.{kind}": QuantizedPart(recipe, kind, self.latest) for kind in shapes}
        return found

    def quantized_keys(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> tuple[set[str], set[str]]:
        """The checkpoint's quantized matrices of a segment: those whose codes it gets, and those that become floats.

        Arguments as of `formatted`.
        """
        coded: set[str] = set()
        floats: set[str] = set()
        for index, block in enumerate(plan.blocks):
            for part in LINEARS[block.kind]:
                source = sources[f"blocks.{index}.{part}.weight"]
                recipe = self._recipe(source)
                chosen = coded if isinstance(recipe, Stored) else floats
                chosen |= {key for key in source.keys if self.checkpoint.is_quantized(key)}
        return coded, floats

    def _recipe(self, source: AnySource) -> Recipe | None:
        """Where the codes of a linear map come from; None: it stays floats."""
        # 1. the checkpoint's own codes go to the graph as they are
        checkpoint = self.checkpoint
        if self.keeps_codes and isinstance(source, Source) and isinstance(checkpoint, CodeReader):
            form = checkpoint.quantized_format(source.key)
            if form is not None:
                return Stored(source.key, checkpoint, replace(form, signed=self.signed), source.rows)
        # 2. else those that are chosen for its floats, if that is wanted
        if self.chosen is None:
            return None
        form = replace(self.chosen, signed=self.signed)
        return Made(source, form, self.dtype, partial(search, dtype=self.dtype))
