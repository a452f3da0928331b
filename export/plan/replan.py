"""The plan of a bundle that was published, worked out again from its checkpoint and the options in its manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from framefusion.errors import BundleError, CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.format.manifest import Manifest
from framefusion.storage.records import RecordError, from_json


def replan(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> BuildPlan:
    """The plan that a bundle was built by.

    Raises:
        BundleError: the manifest does not say how it was built.
        CheckpointError: the checkpoint is not the one that the bundle was built from.
    """
    try:
        options = from_json(BuildOptions, manifest.options)
    except RecordError as error:
        raise BundleError(f"{folder} does not say how it was built ({error}): rebuild it") from None
    plan = BuildPlan(checkpoint, options)
    ours = asdict(manifest.model)
    theirs = asdict(plan.model_record())
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{checkpoint.folder} has {name} {theirs[name]}, the bundle was built from one with {value}: "
                "give the checkpoint that it was built from"
            )
    return plan
