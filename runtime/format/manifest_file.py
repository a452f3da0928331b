"""manifest.json: read as a stranger's, written in one step, and the digest by which any edit of it is noticed.

The digest is the SHA-256 of the manifest without it, in a canonical form: keys sorted, no white space, UTF-8. It holds
the hash of every file, so it names the whole bundle, and it is what a signature signs. It shows damage and edits; who
wrote it, only a signature shows. Manifests of schema 2 have none.

A manifest may be of any family, so the reader knows them all; the records do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from framefusion.errors import BundleError
from framefusion.runtime.families import load_preprocessing
from framefusion.runtime.format.bundle_files import read_small
from framefusion.runtime.format.manifest import OLDEST_SCHEMA, SCHEMA_VERSION, Manifest
from framefusion.runtime.format.manifest_checks import check_manifest
from framefusion.runtime.format.manifest_rules import RULES
from framefusion.storage.bounded_json import JsonError, parse_json
from framefusion.storage.records import RecordError, from_json, to_json

MANIFEST = "manifest.json"
DIGEST = "digest"
MOST_BYTES = 1 << 24  # a hundred times that of a 7B model with four kinds of engines
MOST_VALUES = 1 << 19  # numbers, texts and the like: each is looked at, which takes microseconds


class ManifestFile(NamedTuple):
    """A manifest as it was read."""

    manifest: Manifest
    digest: str  # of what it says, SHA-256 in hexadecimal digits
    sealed: bool  # it held the digest itself: an edit would have been noticed


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json.

    Raises:
        BundleError: there is none, or it was edited, is of another schema, or says what no bundle can be.
    """
    return read_manifest_file(folder).manifest


def read_manifest_file(folder: Path) -> ManifestFile:
    """Read and check manifest.json, and say what its digest is.

    Raises:
        BundleError: as `read_manifest`.
    """
    path = folder / MANIFEST
    # 1. JSON of bounded size and depth, of a schema that this package reads.
    raw = _read(path)
    version = _schema_version(path, raw)
    # 2. The digest before anything that it protects.
    stated = raw.pop(DIGEST, None)
    digest = digest_of(raw)
    sealed = stated is not None or version > OLDEST_SCHEMA
    if sealed and stated != digest:
        raise BundleError(
            f"{path} was edited or damaged: its digest is {digest}, it states {ascii(stated)[:80]}; copy the bundle "
            "again or rebuild"
        )
    # 3. Types and ranges of the fields, then what they have to do with each other.
    _load_rule(raw)
    try:
        manifest = from_json(Manifest, raw, rules=RULES)
        check_manifest(manifest)
    except RecordError as error:
        raise BundleError(f"{path}: {error}: rebuild the bundle") from None
    return ManifestFile(manifest, digest, sealed)


def _schema_version(path: Path, raw: Any) -> int:
    """The version of a manifest that this package reads.

    Raises:
        BundleError: there is none, or another.
    """
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int:
        raise BundleError(f"{path} has no schema_version: it is no manifest of a bundle")
    if version < OLDEST_SCHEMA:
        raise BundleError(
            f"{path} has schema version {version}, this package reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}: rebuild the "
            "bundle"
        )
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {version}, this package reads up to {SCHEMA_VERSION}: upgrade framefusion-aot"
        )
    return version


def _load_rule(raw: Mapping[str, Any]) -> None:
    """Load the family's preprocessing where another package brings it; the reader refuses a rule that is unknown."""
    preprocessing = raw.get("preprocessing")
    rule = preprocessing.get("rule") if isinstance(preprocessing, dict) else None
    if isinstance(rule, str):
        load_preprocessing(rule)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with its digest, in one step: a bundle that is in use gets engines while others read it.

    Raises:
        BundleError: it would be refused when it is read.
        OSError: it cannot be written; the old one stays.
    """
    try:
        written = from_json(Manifest, to_json(replace(manifest, schema_version=SCHEMA_VERSION)), rules=RULES)
        check_manifest(written)
    except RecordError as error:
        raise BundleError(
            f"{folder / MANIFEST} would not be read again ({error}): correct what it was made of"
        ) from None
    plain = to_json(written)
    text = json.dumps(plain | {DIGEST: digest_of(plain)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    fresh = folder / f".{MANIFEST}.{secrets.token_hex(8)}"
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(fresh, folder / MANIFEST)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise


def digest_of(plain: dict[str, Any]) -> str:
    """SHA-256 of a manifest, given as plain values without its digest, in the canonical form."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read(path: Path) -> Any:
    try:
        content = read_small(path, MOST_BYTES)
        if content.count(b",") > MOST_VALUES:  # of values there are about as many
            raise ValueError(f"it holds more than {MOST_VALUES} values")
        return parse_json(content, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        folder = path.parent
        if folder.is_dir():
            raise BundleError(f"{folder} holds no {MANIFEST}: it is no bundle, or unfinished; build it") from None
        raise BundleError(f"no bundle at {folder}: build one with ff-export build") from None
    except (OSError, JsonError, ValueError) as error:
        raise BundleError(f"{path} is not readable ({error}): rebuild or copy the bundle again") from None
