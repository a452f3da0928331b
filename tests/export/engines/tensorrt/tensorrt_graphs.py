"""Small graphs of the portable dialect with weights, as a bundle holds them, for tests of engines. No test in here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from framefusion.export.graphs.decoder import DecoderConfig, Segment
from framefusion.export.graphs.segments import SegmentPlan, cut_after, segment_module
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import trace
from tests.conftest import made_once

TINY = DecoderConfig(
    hidden_size=32, intermediate_size=64, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=40,
    rms_norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip
LOOKED_AT, REST = cut_after(TINY.num_layers, range(2))[1:]  # MLP and attention with scores; MLPs, two layers, head


def segment(config: DecoderConfig, plan: SegmentPlan) -> Segment:
    """A segment with small random weights, and norms of about one."""
    module = Segment(config, plan.blocks, scores=plan.scores, head=plan.head, one_length=plan.one_length)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / parameter.shape[0] ** 0.5 if parameter.ndim > 1 else 1 + drawn / 10)
    return module.eval()


def write_segment(
    path: Path, config: DecoderConfig = TINY, plan: SegmentPlan = REST, dtype: torch.dtype = torch.float16,
    dialect: str = "portable",
) -> Path:  # fmt: skip
    """A segment's graph over weights.bin, both beside each other."""
    model = trace(segment_module(config, plan), DIALECTS[dialect], dtype).model
    return write_graph(path, model, segment(config, plan), dtype)


def write_graph(path: Path, model: ir.Model, module: nn.Module, dtype: torch.dtype) -> Path:
    """A traced graph with the weights of a module."""
    state = module.state_dict()
    for name, value in model.graph.initializers.items():
        if name in state:
            value.const_value = ir.tensor(state[name].to(dtype), name=name)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data="weights.bin", size_threshold_bytes=0)
    return path


def tiny_segment(factory: pytest.TempPathFactory) -> Path:
    """MLPs, two attentions over caches and the head, in fp16: traced once, for all tests."""
    return made_once(factory, "tiny-segment", lambda folder: write_segment(folder / "graph.onnx")) / "graph.onnx"


def renamed(graph: Path, target: Path, names: dict[str, str]) -> Path:
    """A copy of a graph, beside it, with other names for some tensors."""
    model = onnx.load(str(graph), load_external_data=False)
    values = [*model.graph.input, *model.graph.output]
    for value in values:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(name, name) for name in tensors]
    onnx.save(model, str(target))
    return target


def empty_caches(layers: int, capacity: int, config: DecoderConfig = TINY) -> list[tuple[Tensor, Tensor]]:
    """Caches of zeros, one pair a layer."""
    shape = (1, config.num_kv_heads, capacity, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]


def shapes_of(tensors: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {tensor.name: tuple(tensor.shape) for tensor in tensors}
