"""The list of a bundle's graphs: everything that loads, traces, writes, checks or compiles a graph goes by it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from framefusion.export.checkpoints.tensors.weights import AnySource
from framefusion.export.families.towers import TowerPlan
from framefusion.export.graphs.decoder import DecoderConfig
from framefusion.export.graphs.fixed import FixedPrefill
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.graphs.segments import SegmentPlan, segment_module
from framefusion.reduction.budget import FixedSchedule
from framefusion.runtime.format.manifest import FixedRecord

VISION_GRAPH = "vision/graph.onnx"
GRAPH = "graph.onnx"
DECODE_GRAPH = "decode.onnx"


def segment_graphs(
    config: DecoderConfig, segments: Mapping[SegmentPlan, Mapping[str, AnySource]], dtype: torch.dtype
) -> Iterator[GraphPlan]:
    """One graph for each segment, which takes a prompt and single tokens alike.

    Args:
        config: geometry of the decoder.
        segments: segment -> where its parameters are.
        dtype: of the bundle.
    """
    for plan, sources in segments.items():
        name = f"segments/{plan.name}/{GRAPH}"
        yield GraphPlan(name, "both", partial(segment_module, config, plan), sources, dtype, plan.structure)


def fixed_graphs(
    config: DecoderConfig,
    plan: SegmentPlan,
    sources: Mapping[str, AnySource],
    dtype: torch.dtype,
    schedule: FixedSchedule,
    record: FixedRecord,
) -> Sequence[GraphPlan]:
    """Two graphs over one file of weights: the reductions are in the prefill, decoding runs the plain decoder."""
    folder = f"segments/{plan.name}"
    plain = partial(segment_module, config, plan)
    prefill = partial(fixed_module, config, schedule, record, plan)
    return (
        GraphPlan(f"{folder}/{GRAPH}", "prefill", prefill, sources, dtype, ("fixed", plan.structure)),
        GraphPlan(f"{folder}/{DECODE_GRAPH}", "decode", plain, sources, dtype, plan.structure),
    )


def fixed_module(
    config: DecoderConfig, schedule: FixedSchedule, record: FixedRecord, plan: SegmentPlan
) -> FixedPrefill:
    """The static prefill of the fixed mode, on the meta device."""
    with torch.device("meta"):
        return FixedPrefill(config, schedule, record, plan)


def tower_graph(tower: TowerPlan, dtype: torch.dtype) -> GraphPlan:
    """The graph of the vision tower."""
    return GraphPlan(VISION_GRAPH, "vision", partial(copy.deepcopy, tower.module), tower.sources, dtype, "vision")
