"""Who signed a bundle: the digest of its manifest, and the state of each signature. Signs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.format.manifest_file import read_manifest_file
from framefusion.runtime.trust.signatures import SIGNING, Signature, fingerprint, is_valid, read_signatures


def integrity_facts(folder: Path, trusted: Sequence[bytes] = ()) -> dict[str, Any]:
    """The digest of a bundle's manifest and what is known of each signature, as plain values.

    Args:
        folder: the bundle.
        trusted: public ed25519 keys, 32 bytes each.

    A signature is "valid", "invalid", "of another manifest", or "not compared" where cryptography is not installed.
    """
    _, digest, sealed = read_manifest_file(folder)
    rows = [
        {"key": fingerprint(entry.key), "state": _state(entry, digest), "trusted": entry.key in trusted}
        for entry in read_signatures(folder)
    ]
    return {"digest": digest, "sealed": sealed, "signatures": rows}


def _state(signature: Signature, digest: str) -> str:
    if signature.digest != digest:
        return "of another manifest"
    try:
        return "valid" if is_valid(signature) else "invalid"
    except BackendError:
        return f"not compared: {install_command(SIGNING)}"


def render_integrity(facts: Mapping[str, Any]) -> list[str]:
    """What `integrity_facts` gives, as lines."""
    seal = "" if facts["sealed"] else "; the manifest is of an older package and does not hold it"
    lines = [f"manifest: {facts['digest']}{seal}"]
    for row in facts["signatures"]:
        trusted = ", trusted" if row["trusted"] else ""
        lines.append(f"signature: {row['key']}, {row['state']}{trusted}")
    if not facts["signatures"]:
        lines.append("signature: none")
    return lines
