"""Inside one graph: the first node whose output differs from eager torch while its inputs agree.

The graph is traced again from the checkpoint, and the program that it was traced from runs in eager torch with the
checkpoint's weights; its nodes have the names of the graph's values. Some values at a time are marked as outputs of the
bundle's graph, which stays on the disk with its weights, and run in ONNX Runtime: a search in which each round leaves
1/(PROBES + 1) of the values. Knows no pipeline and no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner

from framefusion.errors import BackendError
from framefusion.export.check.bisect.reference import Reference
from framefusion.export.check.check import relative_error
from framefusion.export.graphs.graph_plan import GraphModule, GraphPlan
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.graphs.tracing.trace import trace
from framefusion.runtime.backends.buffer import Array
from framefusion.runtime.machine.cpu import default_threads

PROBES = 7  # values marked at a time
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Suspect:
    """Where a graph begins to differ.

    Attributes:
        value: the first one that is off while what it is computed from is not.
        nodes: what computes it, "name (operator)", in order.
        block: the weights' place in the graph around it, "blocks.1"; "" before the first.
        error, limit: of the value; `inputs` is the largest error of what it is computed from.
        causes: sentences on what is not as the checkpoint says: weights, attributes, operators.
        rounds: how often the graph was run.
    """

    value: str
    nodes: tuple[str, ...]
    block: str
    error: float
    limit: float
    inputs: float
    causes: tuple[str, ...]
    rounds: int


class ProbedGraph:
    """A graph of a bundle in ONNX Runtime, with chosen values as its outputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds = 0
        self.graph = ir.load(path).graph
        self.makers = {value.name: node for node in self.graph for value in node.outputs if value.name}

    def values(self, given: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        """Run up to the wanted values.

        Args:
            given: inputs and caches by name, fp32.
            wanted: names of values in the graph.

        Raises:
            BackendError: ONNX Runtime does not run the graph.
        """
        self.rounds += 1
        model = ir.load(self.path)
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs[:] = [values[name] for name in wanted]
        options = ort.SessionOptions()
        options.intra_op_num_threads = default_threads()
        options.log_severity_level = 3
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(self.path.parent))
        try:
            proto = ir.to_proto(model).SerializeToString()
            session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
            feeds = {tensor.name: _in_type(given[tensor.name], tensor.type) for tensor in session.get_inputs()}
            with OnnxrtRunner(session) as runner:
                results = runner.infer(feeds, check_inputs=False)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BackendError(f"{self.path} cannot be run by onnxruntime {ort.__version__} ({error})") from error
        return {name: np.asarray(results[name]) for name in wanted}


def first_difference(
    path: Path, source: GraphPlan, dialect: Dialect, module: GraphModule, given: Mapping[str, Array], limit: float
) -> Suspect | None:
    """Search a graph that differs at its boundary; None where no value inside differs when it is looked at.

    Args:
        path: the graph, beside its weights.
        source: what it was traced from, by the plan of the bundle.
        dialect: of the bundle.
        module: with the checkpoint's weights, in fp32.
        given: inputs and caches by name, fp32.
        limit: largest relative error that agrees.
    """
    # 1. the graph as it is in the bundle, and as it is traced now, whose program runs in eager torch
    graph = ProbedGraph(path)
    traced = trace(source.module(), dialect, source.dtype)
    reference = Reference(traced.program, module.signature(), module)
    # 2. the first value that is off
    search = Search(graph, reference, given, limit)
    value = search.first()
    if value is None:
        return None
    # 3. what computes it, and in what that is not as the checkpoint says
    nodes = list(search.nodes_of(value))
    weights = list(_weight_causes(graph, reference, value, source.dtype))
    altered = dict(_altered(nodes, traced.model))
    causes = [*weights, *altered.values()]
    nodes = [node for node in nodes if node.name in altered] or nodes  # the others are as they were traced
    return Suspect(
        value,
        tuple(f"{node.name} ({node.op_type})" for node in nodes),
        search.block_of(value),
        search.errors[value],
        limit,
        max((search.errors[name] for name in reference.sources(value) if name in search.errors), default=0.0),
        tuple(causes or ["it is as it is traced now: ONNX Runtime computes it otherwise than torch"]),
        graph.rounds,
    )


class Search:
    """Errors of the values of one graph, found a few at a time."""

    def __init__(self, graph: ProbedGraph, reference: Reference, given: Mapping[str, Array], limit: float) -> None:
        self._graph = graph
        self._reference = reference
        self._given = given
        self._limit = limit
        known = set(reference.names.values())
        self.order = [str(value.name) for node in graph.graph for value in node.outputs if value.name in known]
        self.errors: dict[str, float] = {}

    def first(self) -> str | None:
        """The value, or None.

        First among what weights make, where an error stays one; then back from the one found, source by source. Counts
        and comparisons between them may flip by a rounding that nothing behind them notices.
        """
        ends = [str(value.name) for value in self._graph.graph.outputs if value.name in self.order]
        marks = [name for name in self.order if name in ends or self._reference.parameters_of(name)]
        last = next((place for place, name in enumerate(marks) if name in ends and self._differs(name)), None)
        if last is None:
            return None
        value = self._transition(marks, last)
        while True:
            sources = [name for name in self._reference.sources(value) if name in self.order]
            self._measure(sources)
            worse = [name for name in sources if self._differs(name)]
            if not worse:
                return value
            value = min(worse, key=self.order.index)

    def _transition(self, marks: Sequence[str], high: int) -> str:
        """A value that differs right behind one that agrees, at or before the one at `high`, which differs."""
        low = -1
        while high - low > 1:
            places = np.unique(np.linspace(low, high, PROBES + 2).astype(int)[1:-1])
            places = places[(places > low) & (places < high)]
            self._measure([marks[place] for place in places])
            for place in map(int, places):
                if self._differs(marks[place]):
                    high = place
                    break
                low = place
        return marks[high]

    def _differs(self, name: str) -> bool:
        self._measure([name])
        return not self.errors[name] <= self._limit  # a NaN differs

    def _measure(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self.errors]
        if not new:
            return
        ours = self._graph.values(self._given, new)
        theirs = self._reference.values(self._given, new)
        for name in new:
            self.errors[name] = _error(ours[name], theirs.get(name))

    def nodes_of(self, value: str) -> Iterator[ir.Node]:
        """Nodes that compute a value from those that torch's program has, too, in the graph's order."""
        makers = self._graph.makers
        stop = set(self.order)
        wanted = [value]
        nodes = set()
        while wanted:
            node = makers.get(wanted.pop())
            if node is None or node in nodes:
                continue
            nodes.add(node)
            inputs = [tensor.name for tensor in node.inputs if tensor is not None and tensor.name]
            wanted += [name for name in inputs if name not in stop]
        return (node for node in self._graph.graph if node in nodes and node.op_type != "Constant")

    def block_of(self, value: str) -> str:
        """Where the weights last used at or before a value stand in the module."""
        block = ""
        for node in self._graph.graph:
            for tensor in node.inputs:
                if tensor is not None and tensor.name in self._graph.graph.initializers and "." in str(tensor.name):
                    block = str(tensor.name).rsplit(".", 1)[0]
            if any(output.name == value for output in node.outputs):
                return block
        return block


def _error(ours: Array, theirs: Array | None) -> float:
    if theirs is None or ours.shape != theirs.shape:
        return float("inf")
    if not theirs.any():
        return float(np.abs(ours.astype(np.float32)).max(initial=0))
    return relative_error(ours.astype(np.float32), theirs)


def _weight_causes(graph: ProbedGraph, reference: Reference, value: str, dtype: torch.dtype) -> Iterator[str]:
    """Weights of an operator that are not the checkpoint's."""
    for name in reference.parameters_of(value):
        stored = graph.graph.initializers[name].const_value
        assert stored is not None
        expected = reference.weights[name].to(dtype).float().numpy()
        found = np.asarray(stored.numpy()).astype(np.float32)
        if not np.array_equal(found, expected):
            count = int((found != expected).sum())
            yield f"{name} is not the checkpoint's: {count} of {found.size} numbers differ"


def _altered(nodes: Sequence[ir.Node], fresh: ir.Model) -> Iterator[tuple[str, str]]:
    """In what a graph traced now has other nodes, or other constants that they read: name of the node, sentence."""
    others = {node.name: node for node in fresh.graph}
    for node in nodes:
        producers = [tensor.producer() for tensor in node.inputs if tensor is not None]
        constants = [producer for producer in producers if producer is not None and producer.op_type == "Constant"]
        for near in (node, *constants):
            difference = _difference(near, others.get(near.name))
            if difference:
                yield str(node.name), difference


def _difference(node: ir.Node, other: ir.Node | None) -> str:
    """In what a node is not the one that is traced now; "" where it is."""
    if other is None or other.op_type != node.op_type:
        return f"{node.name} is {node.op_type}, traced now {'nothing' if other is None else other.op_type}"
    attributes = {"inputs": (_input_names(node), _input_names(other))} | {
        str(name): (_value(node.attributes.get(name)), _value(other.attributes.get(name)))
        for name in sorted({*node.attributes, *other.attributes})
    }
    differing = [f"{name} {here}, traced now {there}" for name, (here, there) in attributes.items() if here != there]
    return f"{node.name} ({node.op_type}) has {'; '.join(differing)}" if differing else ""


def _input_names(node: ir.Node) -> list[str | None]:
    return [None if tensor is None else tensor.name for tensor in node.inputs]


def _value(attribute: ir.Attr | None) -> Any:
    value = None if attribute is None else attribute.value
    return value.numpy().tolist() if isinstance(value, ir.TensorProtocol) else value


def _in_type(array: Array, kind: str) -> Array:
    return array.astype(np.float16) if kind == "tensor(float16)" else array
