"""Bundles as others may leave them: a manifest that says something else, with a digest that agrees or an old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.manifest_file import DIGEST, MANIFEST, digest_of

Edit = Callable[[dict[str, Any]], object]


def copied(bundle: Path, target: Path) -> Path:
    """A copy, whose links stay links."""
    shutil.copytree(bundle, target, symlinks=True)
    return target


def edited(bundle: Path, edit: Edit, *, sealed: bool = True) -> Path:
    """Edit manifest.json; `sealed` makes the digest that of the edited manifest, as whoever means harm would."""
    path = bundle / MANIFEST
    plain = json.loads(path.read_text(encoding="utf-8"))
    stated = plain.pop(DIGEST, None)
    edit(plain)
    if sealed:
        stated = digest_of(plain)
    path.write_text(json.dumps(plain | ({} if stated is None else {DIGEST: stated})), encoding="utf-8")
    return bundle


def in_old_layout(bundle: Path) -> Path:
    """The manifest as packages before schema 3 wrote it."""

    def forget(plain: dict[str, Any]) -> None:
        plain["schema_version"] = 2

    edited(bundle, forget)
    path = bundle / MANIFEST
    plain = json.loads(path.read_text(encoding="utf-8"))
    del plain[DIGEST]
    path.write_text(json.dumps(plain), encoding="utf-8")
    return bundle


def of_one_row(bundle: Path) -> Path:
    """Graphs as they were before there were batches: none is free in its rows."""
    import onnx

    for path in sorted((bundle / "segments").rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        layers = sum(value.name.startswith("past_key_") for value in model.graph.input)
        sizes = {"batch": 1, "lengths": layers}
        for value in (*model.graph.input, *model.graph.output):
            for axis in value.type.tensor_type.shape.dim:
                if axis.dim_param in sizes:
                    axis.dim_value = sizes[axis.dim_param]
        onnx.save(model, str(path))
        resealed(bundle, str(path.relative_to(bundle)))
    return bundle


def resealed(folder: Path, name: str) -> Path:
    """The manifest with the hash that a file has now: whoever changed the file made it agree."""
    record = file_record(folder / name)
    return edited(folder, lambda plain: plain["files"][name].update(size=record.size, sha256=record.sha256))
