"""A checkpoint under the runtime's own pipeline, its graphs in eager torch: nothing is traced, nothing compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from framefusion.export.eager.backend import EagerBackend
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing.parts import Builder
from framefusion.export.writing.staging import Staging
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import write_manifest
from framefusion.runtime.pipeline import Pipeline


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


def eager_pipeline(plan: BuildPlan, folder: Path) -> Pipeline:
    """A pipeline in fp32 over the torch graphs of a plan.

    Args:
        plan: what would be built.
        folder: gets the embedding table and the tokenizer, and must stay as long as the pipeline; must not exist.
    """
    bundle = uncompiled_bundle(plan, folder)
    in_fp32 = bundle.seen_as(model=replace(bundle.manifest.model, dtype="float32"))
    return Pipeline(in_fp32, EagerBackend(plan.eager_loaders()))
