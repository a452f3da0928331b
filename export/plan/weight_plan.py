"""Which linear maps of a decoder are in 4 or 8 bits, in which format, and where their codes come from.

    made    options say so: every linear map of every layer, from a checkpoint of floats
    read    the checkpoint holds codes: these linear maps, in the checkpoint's formats

Embedding table and vision tower stay floats, and so does the head unless the option says otherwise. Reads configuration
and headers alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, LatestBlocks, QuantizedPart, Recipe, Source
from framefusion.export.graphs.decoder import LINEARS
from framefusion.export.graphs.segments import SegmentPlan
from framefusion.export.options import AS_STORED, DEQUANTIZED, BuildOptions
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.code_store import Calibrated, CodeStore
from framefusion.export.quantization.recipes import CodeReader, Made, Stored
from framefusion.export.quantization.search import search
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.format.manifest import CalibrationRecord, QuantizationRecord, WeightFormatRecord

BLOCKS = {"int8": 128, "int4": 32}
"""Weights -> inputs that share a scale, where the option does not say."""
METHOD = "search of scales"
FEEDBACK = "error feedback over calibration films"
_HEAD = "head.lm_head"
HEAD = BlockFormat(8, 128)
"""Of a head in int8: its errors are those of logits, and no layer behind it makes them up."""
_OPTION = re.compile(r"(int8|int4)(?::(\d{1,4}))?(\+zero)?(\+head4?)?")


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
            f"--weights {text}: int8 or int4 is expected, with the size of a block (int4:64), +zero for zero points "
            f"and +head or +head4 for the head in int8 or int4; {AS_STORED} or {DEQUANTIZED} for a quantized checkpoint"
        )
    name, block, zero, _head = found.groups()
    return BlockFormat(int(name.removeprefix("int")), int(block or BLOCKS[name]), symmetric=not zero)


def parse_head(text: str | None) -> BlockFormat | None:
    """The format of the head that a valid `BuildOptions.weights` names; None where it stays floats."""
    layers = parse_weights(text)
    if text is None or layers is None or "+head" not in text:
        return None
    return BlockFormat(4, layers.block) if text.endswith("+head4") else HEAD


def check_quantized(segments: Sequence[SegmentPlan], options: BuildOptions) -> None:
    """Refuse what cannot run weights in these formats.

    Raises:
        BudgetError: the engines cannot.
    """
    formats = {form for plan in segments for block in plan.blocks for _, form in block.formats}
    if not formats:
        return
    if options.backend is not None and not engine_traits(options.backend).quantized:
        raise BudgetError(f"{options.backend} engines are not compiled of weights in 4 or 8 bits: leave --backend out")


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """How the linear maps of a decoder are stored.

    Attributes:
        checkpoint: where floats or codes are.
        chosen: the format that codes are chosen in; None: the checkpoint's own, where it holds any, or floats.
        head: the same for the head; None: floats.
        dtype: of the bundle.
        signed: see `BlockFormat.signed`: the dialect's packing.
        latest: see `LatestBlocks`.
    """

    checkpoint: Checkpoint
    chosen: BlockFormat | None
    head: BlockFormat | None
    dtype: torch.dtype
    signed: bool
    latest: LatestBlocks
    keeps_codes: bool = True
    """A quantized checkpoint's own codes are taken where kernels have such; else all of them become floats first."""
    calibrated: bool = False
    """Codes were chosen by films: they are in `store`, or nothing but shapes is wanted."""
    store: CodeStore | None = None
    """Of codes by films; where they are not taken, what is known of them."""

    def record(self, segments: Sequence[SegmentPlan]) -> QuantizationRecord | None:
        """The manifest's part on the weights of these segments; None where all are floats."""
        blocks = [block for plan in segments for block in plan.blocks]
        counts = Counter(form for block in blocks for _, form in block.formats)
        counts.update(plan.head_format for plan in segments if plan.head_format is not None)
        if not counts:
            return None
        linears = sum(len(LINEARS[block.kind]) for block in blocks) + sum(plan.head for plan in segments)
        formats = tuple(WeightFormatRecord(f.bits, f.block, f.symmetric, count) for f, count in counts.items())
        chosen_by = FEEDBACK if self.calibrated else METHOD
        method = "as the checkpoint holds them" if self.chosen is None else chosen_by
        record = QuantizationRecord(method, self.chosen is None, formats, linears - sum(counts.values()))
        if self.store is None:
            return record
        store = self.store
        facts = {field.name: getattr(store, field.name) for field in fields(CalibrationRecord)}
        return replace(record, calibration=CalibrationRecord(**facts))

    def formatted(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> SegmentPlan:
        """A segment with the formats of its weights.

        Args:
            plan: of the segment.
            sources: of its parameters if all of them were floats.
        """
        recipes = self._recipes(plan, sources)
        blocks = []
        for index, block in enumerate(plan.blocks):
            pairs = ((part, recipes.get(f"blocks.{index}.{part}")) for part in LINEARS[block.kind])
            formats = tuple((part, recipe.form) for part, recipe in pairs if recipe is not None)
            blocks.append(replace(block, formats=formats))
        head = recipes.get(_HEAD)
        return replace(plan, blocks=tuple(blocks), head_format=None if head is None else head.form)

    def sources(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> dict[str, AnySource]:
        """Where the parameters of a segment are, those of quantized linear maps among them; arguments as above."""
        found = dict(sources)
        for name, recipe in self._recipes(plan, sources).items():
            found |= {f"{name}.{kind}": QuantizedPart(recipe, kind, self.latest) for kind in recipe.form.parts}
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

    def _recipes(self, plan: SegmentPlan, sources: Mapping[str, AnySource]) -> dict[str, Recipe]:
        """Linear map of a segment that is quantized, by its name -> where its codes come from."""
        names = [f"blocks.{index}.{part}" for index, block in enumerate(plan.blocks) for part in LINEARS[block.kind]]
        found = {name: self._recipe(sources[f"{name}.weight"]) for name in names}
        if self.calibrated:
            layers = {f"blocks.{index}": block.layer for index, block in enumerate(plan.blocks)}
            for name, recipe in found.items():
                if isinstance(recipe, Made):
                    place, _, part = name.rpartition(".")
                    found[name] = Calibrated(recipe, f"{layers[place]}.{part}", self.store)
        if plan.head and self.head is not None:
            found[_HEAD] = self._codes_of(sources[f"{_HEAD}.weight"], self.head)
        return {name: recipe for name, recipe in found.items() if recipe is not None}

    def _recipe(self, source: AnySource) -> Recipe | None:
        """Where the codes of a linear map come from; None: it stays floats."""
        # 1. the checkpoint's own codes go to the graph as they are
        checkpoint = self.checkpoint
        if self.keeps_codes and isinstance(source, Source) and isinstance(checkpoint, CodeReader):
            form = checkpoint.quantized_format(source.key)
            if form is not None and (form.symmetric or not self.signed):
                return Stored(source.key, checkpoint, replace(form, signed=self.signed), source.rows)
        # 2. else those that are chosen for its floats, if that is wanted
        return None if self.chosen is None else self._codes_of(source, self.chosen)

    def _codes_of(self, source: AnySource, form: BlockFormat) -> Recipe:
        if self.signed and not form.symmetric:
            raise BudgetError("the portable dialect has no zero points, as TensorRT has none: leave +zero out")
        form = replace(form, signed=self.signed)
        by_rows = not any(self.checkpoint.is_quantized(key) for key in source.keys)  # else each part unpacks all
        return Made(source, form, self.dtype, partial(search, dtype=self.dtype), by_rows)
