"""What memory the writing of a bundle takes, from headers alone; checks, goldens and engines are others' to say.

the process (TRACING_PROCESS), and of the one parameter that takes most
    floats          the tensors it is read from, as they are stored
    chosen codes    what is packed, and of the rows that are searched at a time READ bytes a weight; where a source
                    is no tensor's rows, the whole matrix in place of these: as stored, and a byte a weight
    other codes     a checkpoint's, or those of films: a byte a weight as they are read, and what is packed
"""

from __future__ import annotations

import math

from framefusion.export.checkpoints.tensors.weights import AnySource, Headers, QuantizedPart
from framefusion.export.machine import TRACING_PROCESS
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization import recipes
from framefusion.export.quantization.recipes import Made

READ = 4  # as stored, a code, packed
SCALE = 4  # bytes in memory, in any bundle


def build_memory(plan: BuildPlan) -> int:
    """Bytes at the peak of writing."""
    sources = (graph.sources[name] for graph in plan.graphs for name in graph.shapes)
    return TRACING_PROCESS + max((_bytes(plan, source) for source in sources if not _is_beside(source)), default=0)


def _is_beside(source: AnySource) -> bool:
    """Scales and zero points are made with the codes."""
    return isinstance(source, QuantizedPart) and source.part != "packed"


def _bytes(plan: BuildPlan, source: AnySource) -> int:
    """Bytes of a parameter while it is written, beside TRACING_PROCESS."""
    checkpoint = plan.checkpoint
    stored = sum(checkpoint.nbytes(key) for key in source.keys if key in checkpoint)
    if not isinstance(source, QuantizedPart):
        return stored
    recipe = source.recipe
    outputs, inputs = recipe.shape(Headers(checkpoint))
    shapes = recipe.form.shapes(outputs, inputs)
    packed = sum(math.prod(shape) * (SCALE if part == "scales" else 1) for part, shape in shapes.items())
    if not isinstance(recipe, Made):
        return packed + outputs * inputs
    if recipe.is_read_by_rows:
        return packed + READ * min(recipes.WEIGHTS_AT_ONCE, outputs * inputs)
    return packed + stored + outputs * inputs
