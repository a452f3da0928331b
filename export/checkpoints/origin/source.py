"""What a bundle says of the checkpoint it was made of: its name, its commit, and its licence as the hub writes it.

The licence is what the checkpoint says, in the front matter of its README.md or in its LICENSE file; no other source
is consulted, and where it says nothing the licence is "unknown".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from framefusion.export.checkpoints.files import check_file, present
from framefusion.export.checkpoints.origin.hub import Origin
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest import UNKNOWN_LICENSE, SourceRecord

OTHER = "other"  # the hub's key for a licence that is not in its list
LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")
_TEXTS = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("Permission is hereby granted, free of charge",)}
_HEAD = 1000  # characters in which a licence names itself; further down it may quote another one
_TITLE = 60  # characters of a licence's first line that serve as its name


class License(NamedTuple):
    """A licence by the hub's keys: `apache-2.0`, or `other` with a name and a link."""

    license: str = UNKNOWN_LICENSE
    license_name: str | None = None
    license_link: str | None = None


def source_record(origin: Origin, quantization: str = "") -> SourceRecord:
    """The manifest's part on the checkpoint.

    Args:
        origin: of the checkpoint.
        quantization: how its weights are quantized, and what the build made of them; "" where they are not.

    Raises:
        OSError: config.json is gone.
    """
    return SourceRecord(
        name=origin.name,
        on_hub=origin.on_hub,
        revision=origin.revision,
        commit=origin.commit,
        config_sha256=sha256_of(origin.folder / "config.json"),
        quantization=quantization or None,
        **license_of(origin.folder)._asdict(),
    )


def license_of(folder: Path) -> License:
    """The licence that a checkpoint states for itself."""
    readme = folder / "README.md"
    if present(readme):
        check_file(readme, folder)
    card = front_matter(readme)
    stated = card.get("license")
    if stated:
        link = _text(card.get("license_link"))
        names = list(map(str, stated)) if isinstance(stated, list) else [stated]
        if len(names) > 1:
            return License(OTHER, ", ".join(names), link)
        return License(str(names[0]), _text(card.get("license_name")), link)
    for path in license_files(folder):
        if not path.name.startswith("NOTICE"):
            return _recognised(path)
    return License()


def license_files(folder: Path) -> list[Path]:
    """Files that must travel with the weights.

    Raises:
        CheckpointError: one is a link that leaves the folder: it would publish a file of this machine.
    """
    found = sorted({path for pattern in LICENSE_FILES for path in folder.glob(pattern) if not path.is_dir()})
    for path in found:
        check_file(path, folder)
    return found


def front_matter(readme: Path) -> Mapping[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(readme) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _recognised(path: Path) -> License:
    """A licence by phrases of its text, else by its first line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    for name, phrases in _TEXTS.items():
        if all(phrase in text[:_HEAD] for phrase in phrases):
            return License(name, None, path.name)
    title = next((line.strip(" #*\t") for line in text.splitlines() if line.strip(" #*\t")), path.name)
    return License(OTHER, title[:_TITLE], path.name)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
