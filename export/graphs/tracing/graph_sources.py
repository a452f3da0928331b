"""What each graph of a bundle is traced from: its torch module and signature, by the graph's name in the bundle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from framefusion.export.graphs.segments import SegmentPlan
from framefusion.export.graphs.tower import TowerSignature
from framefusion.export.graphs.tracing.signatures import Signature, fixed_signature, segment_module, segment_signature
from framefusion.export.plan.build_plan import VISION_GRAPH, BuildPlan
from framefusion.ops import static_reduction


@dataclass(frozen=True, eq=False)
class GraphSource:
    """A graph before it is traced."""

    module: nn.Module  # on the meta device, nobody else's
    told: Signature | TowerSignature
    decompositions: Mapping[Any, Any] = field(default_factory=dict)


def graph_sources(plan: BuildPlan) -> dict[str, Callable[[], GraphSource]]:
    """Graph of the bundle -> what makes its source."""
    made: dict[str, Callable[[], GraphSource]] = {VISION_GRAPH: partial(_tower, plan)}
    for segment in plan.segments:
        record = plan.segment_record(segment)
        made[record.decode] = partial(_segment, plan, segment)
        if record.prefill != record.decode:
            made[record.prefill] = partial(_fixed_prefill, plan)
    return made


def _tower(plan: BuildPlan) -> GraphSource:
    return GraphSource(copy.deepcopy(plan.tower.module), plan.tower.module.signature())


def _segment(plan: BuildPlan, segment: SegmentPlan) -> GraphSource:
    return GraphSource(segment_module(plan.config, segment), segment_signature(plan.config, segment))


def _fixed_prefill(plan: BuildPlan) -> GraphSource:
    module = plan.fixed_module()
    return GraphSource(module, fixed_signature(module), static_reduction.DECOMPOSITIONS)
