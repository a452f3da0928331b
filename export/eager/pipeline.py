"""A checkpoint under the runtime's own pipeline, its graphs in eager torch: nothing is traced, nothing compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.streaming import stream
from framefusion.export.checkpoints.tensors.weights import AnySource, load_parameters
from framefusion.export.eager.backend import EagerBackend, Load
from framefusion.export.eager.written import written_sources
from framefusion.export.graphs.graph_plan import GraphModule, GraphPlan
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing.parts import Builder
from framefusion.export.writing.staging import Staging
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import write_manifest
from framefusion.runtime.pipeline import Pipeline


def eager_loaders(plan: BuildPlan, *, streamed: bool = False, written: Path | None = None) -> Mapping[str, Load]:
    """What reads each graph's module with its weights, in fp32; freed with the loaders.

    Args:
        plan: of the graphs; its checkpoint has the weights.
        written: a bundle of this plan, in which codes of quantized weights are; None chooses them once more.
        streamed: a layer's weights are read when it runs, each time, and memory holds no other's: see streaming.py.

    Returns:
        name of the graph in the bundle -> loader; graphs that share a file of weights share their tensors.
    """
    loaders: dict[str, Load] = {}
    by_folder: dict[str, Load] = {}
    for graph in plan.graphs:
        sources = graph.sources if written is None else written_sources(graph, written)
        load: Callable[[], GraphModule] = partial(_loaded, graph, plan.checkpoint, sources)
        if streamed:
            load = partial(_streamed, graph, plan.checkpoint, sources)
        elif graph.folder in by_folder:
            load = partial(_sharing, graph, by_folder[graph.folder])
        loaders[graph.name] = cache(load)
        by_folder.setdefault(graph.folder, loaders[graph.name])
    return loaders


def _loaded(graph: GraphPlan, checkpoint: Checkpoint, sources: Mapping[str, AnySource]) -> GraphModule:
    return load_parameters(graph.module(), checkpoint, sources, torch.float32)


def _streamed(graph: GraphPlan, checkpoint: Checkpoint, sources: Mapping[str, AnySource]) -> GraphModule:
    module = graph.module()
    stream(module, lambda name: sources[name].make(checkpoint))
    return module


def _sharing(graph: GraphPlan, owner: Callable[[], nn.Module]) -> GraphModule:
    """A module over the tensors of another graph's, whose parameters have the same names."""
    module = graph.module()
    module.load_state_dict(owner().state_dict(), assign=True)
    return module


def uncompiled_bundle(plan: BuildPlan, folder: Path) -> Bundle:
    """A bundle without graphs: embedding table, tokenizer and manifest.

    Args:
        plan: what would be built.
        folder: must not exist.
    """
    builder = Builder(plan)
    producers = builder.producers()
    with Staging(folder, "uncompiled", force=False) as staged:
        for part in ("embedding", "tokenizer"):
            staged.write(part, producers[part])
        write_manifest(staged.folder, builder.manifest(staged.files, staged.folder))
        staged.publish()
    return Bundle(folder)


def in_fp32(bundle: Bundle, plan: BuildPlan) -> Bundle:
    """A bundle whose buffers fit the torch graphs of a plan: floats are in fp32, and caches are what the plan has.

    Args:
        bundle: of this plan, or of the one that has codes for this one's floats.
        plan: whose graphs are run.
    """
    cached = None if plan.kv_scales is None else plan.kv_scales.record
    return bundle.with_manifest(model=replace(bundle.manifest.model, dtype="float32"), kv_cache=cached)


def eager_pipeline(plan: BuildPlan, folder: Path) -> Pipeline:
    """A pipeline in fp32 over the torch graphs of a plan.

    Args:
        plan: what would be built.
        folder: gets the embedding table and the tokenizer, and must stay as long as the pipeline; must not exist.
    """
    bundle = uncompiled_bundle(plan, folder)
    return Pipeline(in_fp32(bundle, plan), EagerBackend(eager_loaders(plan)))
