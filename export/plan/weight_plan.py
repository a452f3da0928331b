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
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.options import AS_STORED, DEQUANTIZED, BuildOptions
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.code_store import Calibrated, CodeStore
from framefusion.export.quantization.float8 import Float8Format, WeightFormat, search_float8
from framefusion.export.quantization.recipes import CodeReader, Made, Stored
from framefusion.export.quantization.search import search
from framefusion.runtime.backends.table import engine_traits
from framefusion.runtime.backends.tensorrt.library import float8_problem
from framefusion.runtime.format.manifest import CalibrationRecord, QuantizationRecord, WeightFormatRecord

BLOCKS = {"int8": 128, "int4": 32}
"""Weights -> inputs that share a scale, where the option does not say."""
METHOD = "search of scales"
FEEDBACK = "error feedback over calibration films"
_HEAD = "head.lm_head"
HEAD = BlockFormat(8, 128)
"""Of a head in int8: its errors are those of logits, and no layer behind it makes them up."""
_OPTION = re.compile(r"(int8|int4)(?::(\d{1,4}))?(\+zero)?(\+head4?)?")
_FLOAT8 = re.compile(r"fp8(\+activations)?(\+head)?")


def parse_weights(text: str | None) -> WeightFormat | None:
    """The format that `BuildOptions.weights` names; None where no codes are to be chosen.

    Raises:
        BudgetError: it names none.
        CheckpointError: no kernel has blocks of that size.
    """
    if text in (None, AS_STORED, DEQUANTIZED):
        return None
    found = _OPTION.fullmatch(text)
    in_floats = _FLOAT8.fullmatch(text)
    if in_floats is not None:
        return Float8Format(rounds=in_floats[1] is not None)
    if found is None:
        raise BudgetError(
            f"--weights {text}: int8 or int4 is expected, with the size of a block (int4:64), +zero for zero points "
            "and +head or +head4 for the head in int8 or int4; or fp8, with +activations for activations in fp8 and "
            f"+head for the head; {AS_STORED} or {DEQUANTIZED} for a quantized checkpoint"
        )
    name, block, zero, _head = found.groups()
    return BlockFormat(int(name.removeprefix("int")), int(block or BLOCKS[name]), symmetric=not zero)


def parse_head(text: str | None) -> WeightFormat | None:
    """The format of the head that a valid `BuildOptions.weights` names; None where it stays floats."""
    layers = parse_weights(text)
    if text is None or layers is None or "+head" not in text:
        return None
    if isinstance(layers, Float8Format):
        return Float8Format()  # what enters it is not rounded: its errors are those of logits
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
    if options.backend is not None and any(isinstance(form, Float8Format) for form in formats):
        problem = float8_problem(options.target_sm or (), options.variant)
        if problem:
            raise BudgetError(problem)


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """How the linear maps of a decoder are stored.

    Attributes:
        checkpoint: where floats or codes are.
        chosen: the format that codes are chosen in; None: the checkpoint's own, where it holds any, or floats.
        head: the same for the head; None: floats.
        dtype: of the bundle.
        dialect: of the graphs: which formats they have, and how codes are packed.
        latest: see `LatestBlocks`.
    """

    checkpoint: Checkpoint
    chosen: WeightFormat | None
    head: WeightFormat | None
    dtype: torch.dtype
    dialect: Dialect
    latest: LatestBlocks
    keeps_codes: bool = True
    """A quantized checkpoint's own codes are taken where kernels have such; else all of them become floats first."""
    rounds: bool = True
    """Activations are rounded where a checkpoint's format says so and graphs can."""
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
        formats = tuple(_record_of(form, count) for form, count in counts.items())
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
            if form is not None and fits(form, self.dialect):
                return Stored(source.key, checkpoint, self._packed(form), self.dtype, source.rows)
        # 2. else those that are chosen for its floats, if that is wanted
        return None if self.chosen is None else self._codes_of(source, self.chosen)

    def _codes_of(self, source: AnySource, form: WeightFormat) -> Recipe:
        by_rows = not any(self.checkpoint.is_quantized(key) for key in source.keys)  # else each part unpacks all
        if isinstance(form, Float8Format):
            if not self.dialect.float8:
                raise BudgetError(
                    f"the {self.dialect.name} dialect has no products with floats of 8 bits, since ONNX Runtime has "
                    "no kernel for them on a CPU: build with --backend tensorrt-rtx or --dialect portable, or with "
                    "--weights int8"
                )
            return Made(source, form, self.dtype, partial(search_float8, dtype=self.dtype), by_rows)
        if not fits(form, self.dialect):
            raise BudgetError("the portable dialect has no zero points, as TensorRT has none: leave +zero out")
        return Made(source, self._packed(form), self.dtype, partial(search, dtype=self.dtype), by_rows)

    def _packed(self, form: WeightFormat) -> WeightFormat:
        """A format as graphs of the dialect have it."""
        if isinstance(form, Float8Format):
            return replace(form, rounds=form.rounds and self.rounds)
        return replace(form, signed=self.dialect.signed_codes)


def fits(form: WeightFormat, dialect: Dialect) -> bool:
    """Whether graphs of a dialect have products with weights in a format."""
    if isinstance(form, Float8Format):
        return dialect.float8
    return form.symmetric or not dialect.signed_codes


def _record_of(form: WeightFormat, count: int) -> WeightFormatRecord:
    """The manifest's part on a format."""
    if isinstance(form, Float8Format):
        return WeightFormatRecord(form.bits, form.block or 0, True, count, "float", form.rounds)
    return WeightFormatRecord(form.bits, form.block, form.symmetric, count)
