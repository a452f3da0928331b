"""Codes of quantized weights as a bundle holds them, so that the eager model need not choose them once more.

What was written is compared with what is chosen by itself (`verify.weight_report`). Knows no recipe.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from framefusion.export.checkpoints.tensors.weights import AnySource, Computed, QuantizedPart
from framefusion.export.graphs.graph_plan import GraphPlan


def written_sources(graph: GraphPlan, folder: Path) -> dict[str, AnySource]:
    """The sources of a graph, those of quantized weights in the bundle's file where the bundle has the graph.

    Args:
        graph: of a plan.
        folder: the bundle.
    """
    sources = dict(graph.sources)
    codes = [name for name, source in sources.items() if isinstance(source, QuantizedPart)]
    if not codes or not (folder / graph.name).is_file():
        return sources
    initializers = ir.load(folder / graph.name).graph.initializers
    for name in codes:
        place = initializers[name].const_value
        assert isinstance(place, ir.ExternalTensor), name
        file = folder / graph.folder / str(place.location)
        read = partial(_mapped, file, int(place.offset or 0), int(place.length or 0), graph, name)
        sources[name] = Computed((), read)
    return sources


def _mapped(file: Path, offset: int, length: int, graph: GraphPlan, name: str) -> Tensor:
    """A tensor that is read from the file when it is looked at; changes of it stay in memory."""
    content = np.memmap(file, np.uint8, "c", offset, length)
    return torch.from_numpy(content).view(graph.types[name]).view(graph.shapes[name])
