"""From a torch module on the meta device to an ONNX graph whose weights lie in an external file. No weight is touched.

Knows a module's signature and no kind of module. A traced graph serves every segment of its structure: `save_graph`
only changes which file and offsets its initializers name.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from framefusion.export.graphs.graph_plan import GraphModule, GraphPlan
from framefusion.export.graphs.tracing.dialects import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from framefusion.export.checkpoints.tensors.weights import Placement


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter prints progress and warns about torchvision; neither is ours to show."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


_FLOAT8_RANK = 2  # of weights; those of whole numbers are in blocks


class Traced(NamedTuple):
    """A graph in a dialect, and the torch program that it says; its values have the names of the program's nodes."""

    model: ir.Model
    program: torch.export.ExportedProgram


def trace_graph(graph: GraphPlan, dialect: Dialect) -> ir.Model:
    """A graph of a bundle in a dialect, in its own type."""
    return trace(graph.module(), dialect, graph.dtype).model


def trace(module: GraphModule, dialect: Dialect, dtype: torch.dtype = torch.float32) -> Traced:
    """Trace a module and say it in a dialect.

    Args:
        module: parameters on the meta device.
        dialect: table of the custom ops.
        dtype: of parameters and of all inputs that are floats; modules come in fp32, and this one stays as it is.
    """
    module = module.batched()
    signature = module.signature()
    module, arguments = _typed(module, signature.arguments, dtype)
    with _quiet(), torch.no_grad():
        # 1. torch's program: `forward` with the sizes free that the signature says are
        program = torch.export.export(module, arguments, dynamic_shapes=signature.dynamic_shapes, strict=False)
        # 2. custom ops that no dialect has a translation for become plain torch
        if module.decompositions:
            program = program.run_decompositions(dict(module.decompositions))
        # 3. the graph: the other custom ops as the dialect says them
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=dialect.opset,
            custom_translation_table=dialect.table(),
            optimize=False,  # its folding would read the weights
            verbose=False,
        )
    assert exported is not None
    assert exported.exported_program is not None
    # 4. the names that runtimes bind buffers to, in place of the exporter's
    _rename(exported.model.graph.inputs, signature.inputs)
    _rename(exported.model.graph.outputs, signature.outputs)
    for name, axes in signature.axes.items():
        for axis, symbol in axes.items():
            _set_axis(exported.model, name, axis, symbol)
    _retype_codes(exported.model)
    # 5. nothing of this machine, so that equal graphs are equal files
    return Traced(_plain(exported.model), exported.exported_program)


def _typed(module: GraphModule, arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[GraphModule, tuple[Any, ...]]:
    """Module and example inputs in another type; the caller's module stays as it is."""
    if dtype == torch.float32:
        return module, arguments

    def typed(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return copy.deepcopy(module).to(dtype), tree_map(typed, arguments)


def _retype_codes(model: ir.Model) -> None:
    """Say of the codes that DequantizeLinear reads what they are: INT4, INT8 or e4m3 [out, in], the same bits.

    torch has no tensors of 4 bits, so a trace holds uint8 [out, B, block * bits / 8]; in a file both are the codes of a
    row one behind the other, two in a byte with the first in its lower half. Floats of 8 bits are uint8 [out, in], and
    where a row has one scale these are [out] in place of [out, 1].
    """
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        (packed, scales) = node.inputs[:2]
        assert packed is not None
        assert scales is not None
        if packed.name not in model.graph.initializers:
            continue  # activations
        assert packed.shape is not None
        assert scales.shape is not None
        if len(packed.shape) == _FLOAT8_RANK:
            packed.dtype = ir.DataType.FLOAT8E4M3FN
            if "block_size" not in node.attributes:
                scales.shape = ir.Shape(scales.shape.numpy()[:1])
            continue
        outputs, blocks = scales.shape.numpy()
        inputs = blocks * node.attributes["block_size"].as_int()
        bits = 8 * math.prod(packed.shape.numpy()) // (outputs * inputs)
        packed.dtype = {4: ir.DataType.INT4, 8: ir.DataType.INT8}[bits]
        packed.shape = ir.Shape((outputs, inputs))


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    assert len(values) == len(names), ([value.name for value in values], names)
    for value, name in zip(values, names, strict=True):
        value.name = name


def _plain(model: ir.Model) -> ir.Model:
    """Drop what the exporter leaves for debuggers: it holds paths of this machine and makes equal graphs differ."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    return model


def _set_axis(model: ir.Model, name: str, axis: int, symbol: str) -> None:
    """Name an axis that is free where the exporter numbered its symbols; one that is fixed stays a number."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name == name and value.shape is not None and not isinstance(value.shape[axis], int):
            dims: list[Any] = list(value.shape)
            dims[axis] = symbol
            value.shape = ir.Shape(dims)


def save_graph(model: ir.Model, path: Path, weights_file: str, placements: Mapping[str, Placement]) -> None:
    """Write the graph with its initializers pointing into `weights_file`, which lies beside it."""
    for name, value in model.graph.initializers.items():
        if name not in placements:
            continue  # a constant of the graph itself
        place = placements[name]
        assert value.dtype is not None
        assert value.shape is not None  # that of the parameter, but for codes
        value.const_value = ir.ExternalTensor(
            weights_file, place.offset, place.length, value.dtype, shape=value.shape, name=name, base_dir=path.parent
        )
    ir.save(model, path)
