"""A traced graph in eager torch, node by node: the values that a graph of the same trace is compared with.

Knows no ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.export.graphs.graph_plan import Signature
from framefusion.runtime.backends.buffer import Array


class Reference(torch.fx.Interpreter):
    """The program of a graph in eager torch, in fp32, of which named values are kept.

    Args:
        program: the graph, traced on the meta device.
        signature: with the names of inputs and outputs in the graph.
        module: with the checkpoint's weights.
    """

    def __init__(self, program: torch.export.ExportedProgram, signature: Signature, module: nn.Module) -> None:
        super().__init__(program.graph_module)
        self._nodes = list(program.graph_module.graph.nodes)
        names = program.graph_signature
        self.weights = dict(module.named_parameters())
        self._places = names.inputs_to_parameters  # placeholder -> parameter
        given = [name for name in names.user_inputs if isinstance(name, str)]  # an argument that is None has none
        self._users = dict(zip(given, signature.inputs, strict=True))
        renamed = dict(zip(map(str, names.user_outputs), signature.outputs, strict=True))
        self.names = {node.name: renamed.get(node.name, node.name) for node in self._nodes}
        self._wanted: set[str] = set()
        self._kept: dict[str, Array] = {}

    def values(self, given: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
        """Run the program.

        Args:
            given: inputs and caches by name, fp32.
            wanted: names of values in the graph.

        Returns:
            those of them that are tensors, floats in fp32.
        """
        self._wanted = set(wanted)
        self._kept = {}
        arguments = [self._argument(node.name, given) for node in self._nodes if node.op == "placeholder"]
        with torch.inference_mode():
            self.run(*arguments)
        return self._kept

    def sources(self, value: str) -> list[str]:
        """Values that a value is computed from, inputs of the graph left out."""
        node = next(node for node in self._nodes if self.names[node.name] == value)
        return [self.names[source.name] for source in node.all_input_nodes if source.op != "placeholder"]

    def parameters_of(self, value: str) -> list[str]:
        """Parameters that a value is computed from."""
        node = next(node for node in self._nodes if self.names[node.name] == value)
        return [self._places[source.name] for source in node.all_input_nodes if source.name in self._places]

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node as `Interpreter` does, and keep its value if it is wanted."""
        result = super().run_node(n)
        name = self.names[n.name]
        if name in self._wanted and isinstance(result, Tensor):
            self._kept[name] = result.float().numpy() if result.is_floating_point() else result.numpy()
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function as `Interpreter` does, on the CPU: constants were traced on the meta device."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return super().call_function(target, args, kwargs)

    def _argument(self, placeholder: str, given: Mapping[str, Array]) -> Any:
        if placeholder in self._places:
            return self.weights[self._places[placeholder]]
        name = self._users.get(placeholder)
        return None if name is None else torch.from_numpy(given[name])
