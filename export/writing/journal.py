"""What in a folder is ours: the journal of a build or a compilation, and the manifest of a bundle.

    journal.json    in a folder while it is changed: what was written, what is to be moved, what is replaced
    .writing/       beside it: everything that is not complete yet
    .lock           held by the process that changes the folder; empty

A valid journal makes .writing and the files that it names ours, a valid manifest those that it names. Nothing else is
removed or replaced, see framefusion/storage/files.py. A process that is killed leaves a journal, and the next command
that writes the bundle brings to an end what it says (`tidy`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framefusion.errors import BundleError, StorageError
from framefusion.runtime.format.manifest import FileRecord, Manifest
from framefusion.runtime.format.manifest_file import MANIFEST, read_manifest
from framefusion.runtime.trust.signatures import SIGNATURES, read_signatures
from framefusion.storage import files
from framefusion.storage.records import RecordError, from_json, to_json

JOURNAL = "journal.json"
LOCK = ".lock"
SCRATCH = ".writing"
CHECKSUMS = "SHA256SUMS"
STAMPS = ".verified.json"  # hashes that were right once, as bundles had them beside the manifest
PARTIAL = ".partial"
_KIND = "framefusion-aot"
_VERSION = 1
_LIMIT = 1 << 26  # bytes of a journal
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Replaced:
    """The bundle that a build replaces."""

    name: str  # that it has afterwards, beside the output
    inode: int  # of its folder: a copied journal speaks of nothing


@dataclass
class Journal:
    """What a process that was killed leaves for the next one."""

    folder: Path
    key: str = ""
    parts: dict[str, dict[str, FileRecord]] = field(default_factory=dict)  # complete, or being moved out of SCRATCH
    moves: tuple[str, ...] = ()  # files of SCRATCH that take their places, complete: this goes on to its end
    removes: tuple[str, ...] = ()  # files that go after these moves
    replaces: Replaced | None = None
    inode: int = 0  # of its folder, so that a copied bundle, or a stranger's, brings no orders with it

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of a folder; None where there is none, or none of ours."""
        try:
            raw = json.loads(files.read_file(folder / JOURNAL, _LIMIT))
            if (raw["journal"], raw["version"]) != (_KIND, _VERSION):
                return None
            parts = {
                part: {name: from_json(FileRecord, record) for name, record in named.items()}
                for part, named in raw["parts"].items()
            }
            replaces = None if raw["replaces"] is None else from_json(Replaced, raw["replaces"])
            moves = tuple(raw["moves"])
            removes = tuple(raw["removes"])
            for name in [*(name for named in parts.values() for name in named), *moves, *removes]:
                files.place_inside(folder, name)
            return cls(folder, str(raw["key"]), parts, moves, removes, replaces, int(raw["inode"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecordError, RecursionError):
            return None

    def save(self) -> None:
        """Write JOURNAL, in one step.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.inode = os.lstat(self.folder).st_ino
        record = {
            "journal": _KIND, "version": _VERSION, "key": self.key, "inode": self.inode, "parts": to_json(self.parts),
            "moves": list(self.moves), "removes": list(self.removes), "replaces": to_json(self.replaces),
        }  # fmt: skip
        scratch = self.folder / SCRATCH
        files.write_file(
            self.folder / JOURNAL, json.dumps(record).encode(), scratch=scratch if scratch.is_dir() else None
        )

    @property
    def files(self) -> dict[str, FileRecord]:
        """Path of each file of all parts -> its size and hash."""
        return {name: record for named in self.parts.values() for name, record in named.items()}

    def open_scratch(self) -> Path:
        """An empty scratch folder. The journal has to be there: it makes the folder ours."""
        files.remove_scratch(self.folder / SCRATCH)
        (self.folder / SCRATCH).mkdir()
        return self.folder / SCRATCH

    def close(self) -> None:
        """Remove scratch folder, journal and lock, in this order."""
        files.remove_scratch(self.folder / SCRATCH)
        files.remove_file(self.folder / JOURNAL)
        files.remove_file(self.folder / LOCK)


# --- What is foreign --------------------------------------------------------------------------------------------------


def refuse_foreign(folder: Path, named: Collection[str], remedy: str) -> None:
    """Refuse a folder that holds anything but the files named.

    Args:
        folder: to look into, with its folders.
        named: paths of files from there, that may be in it.
        remedy: what the user can do, for the message.

    Raises:
        StorageError: it holds others, with their names; or it cannot be read.
    """
    try:
        foreign = [name for name in files.foreign_entries(folder, named) if name.split(os.sep)[0] != SCRATCH]
    except OSError as error:
        raise StorageError(f"{error.filename} cannot be read ({error.strerror}): {remedy}") from None
    if foreign:
        names = ", ".join(foreign[:_SHOWN]) + (f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else "")
        raise StorageError(f"{folder} holds what framefusion-aot did not write: {names}; {remedy}")


def valid_manifest(folder: Path) -> Manifest | None:
    """The manifest of a bundle of ours; None where there is none that is valid, or that names anything elsewhere."""
    path = folder / MANIFEST
    if not files.is_real_folder(folder) or path.is_symlink() or not path.is_file():
        return None
    try:
        manifest = read_manifest(folder)
        for name in manifest.files:
            files.place_inside(folder, name)
    except (BundleError, ValueError):
        return None
    return manifest


def names_of(folder: Path, manifest: Manifest) -> set[str]:
    """The files of a bundle that are ours: those of the manifest, and what commands write beside it.

    Returns:
        paths from the folder; what is written beside the manifest is among them if it is there and valid.
    """
    named = {*manifest.files, MANIFEST}
    ours = {CHECKSUMS: _are_checksums, STAMPS: _are_stamps, LOCK: _is_lock, SIGNATURES: _are_signatures}
    return named | {name for name, is_ours in ours.items() if is_ours(folder / name, manifest)}


def _are_checksums(path: Path, manifest: Manifest) -> bool:
    text = _text(path)
    lines = [re.fullmatch(r"[0-9a-f]{64}  (.+)", line) for line in text.splitlines()]
    return bool(lines) and all(line is not None and line[1] in {*manifest.files, MANIFEST} for line in lines)


def _are_stamps(path: Path, manifest: Manifest) -> bool:
    try:
        stamps: Mapping[str, Any] = json.loads(_text(path))
        return all(name in manifest.files or isinstance(stamp, list) for name, stamp in stamps.items())
    except (ValueError, AttributeError, RecursionError):
        return False


def _are_signatures(path: Path, _: Manifest) -> bool:
    try:
        return not path.is_symlink() and bool(read_signatures(path.parent))
    except BundleError:
        return False


def _is_lock(path: Path, _: Manifest) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def _text(path: Path) -> str:
    try:
        return files.read_file(path, _LIMIT).decode("utf-8")
    except (OSError, ValueError):
        return ""


# --- Bringing to an end -----------------------------------------------------------------------------------------------


def move_into_place(folder: Path, names: Collection[str]) -> None:
    """Move files out of the scratch folder, the manifest last; those that have moved already are passed over.

    Args:
        folder: that the scratch folder is in.
        names: paths from either.

    Raises:
        OSError: a file cannot be moved.
        ValueError: a name leads out of the folder.
    """
    for name in sorted(names, key=lambda name: (name == MANIFEST, name)):
        source = folder / SCRATCH / name
        target = files.place_inside(folder, name)
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)


def remove_bundle(folder: Path) -> None:
    """Remove a bundle: what its manifest names, the manifest last, and the folder if it is empty then."""
    manifest = valid_manifest(folder)
    if manifest is not None:
        files.remove_named(folder, names_of(folder, manifest) - {MANIFEST})
        files.remove_file(folder / MANIFEST)
    files.remove_empty_within(folder)
    files.remove_empty(folder)


def tidy(output: Path) -> None:
    """Bring to an end what a killed process left of publishing or changing a bundle; nothing where all is well.

    Args:
        output: the place of a bundle, absolute and no link.
    """
    if not os.path.lexists(output):
        _restore(output)
        return
    if not files.is_real_folder(output):
        return
    if not os.path.lexists(output / JOURNAL):
        _remove_lock(output)
        return
    journal = Journal.read(output)
    if journal is None or journal.inode != os.lstat(output).st_ino or valid_manifest(output) is None:
        return
    try:
        lock = files.hold(output / LOCK)
    except OSError:
        return  # the process lives, or the folder cannot be written: who wants to write says so
    try:
        finish(journal)
    except OSError:
        return
    finally:
        lock.close()


def _remove_lock(output: Path) -> None:
    """Remove the lock of a bundle whose process was killed behind all else that it had to do."""
    if not os.path.lexists(output / LOCK):
        return
    manifest = valid_manifest(output)
    if manifest is None or not _is_lock(output / LOCK, manifest):
        return
    try:
        with files.hold(output / LOCK):
            files.remove_file(output / LOCK)
    except OSError:
        return  # the process lives


def finish(journal: Journal) -> None:
    """Carry out what the journal of a bundle says, and close it. The caller holds the lock.

    Each step may be repeated after a kill: what is done already is passed over.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = journal.folder
    # 1. what is complete takes its place
    if journal.moves:
        move_into_place(folder, journal.moves)
    # 2. what it replaces goes, only now that nobody can miss it
    files.remove_named(folder, journal.removes)
    if journal.replaces is not None:
        old = folder.with_name(journal.replaces.name)
        if _is_old_name(folder, old.name) and _is(old, journal.replaces):
            remove_bundle(old)
    # 3. the journal last: while it is there, the next command takes all this up again
    journal.close()


def _restore(output: Path) -> None:
    """Give a bundle its name back: it was put aside, and the process was killed before the new one had the name."""
    journal = Journal.read(output.with_name(output.name + PARTIAL))
    if journal is None or journal.replaces is None:
        return
    old = output.with_name(journal.replaces.name)
    if _is_old_name(output, old.name) and _is(old, journal.replaces):
        files.rename_new(old, output)


def old_name(output: Path) -> str:
    """A free name for the bundle that is replaced, where two names cannot be exchanged in one step."""
    return files.free_name(output.parent, f"{output.name}.old-").name


def _is_old_name(output: Path, name: str) -> bool:
    pattern = re.escape(output.name) + r"\.old-[0-9a-f]{12}"
    return name == output.name + PARTIAL or re.fullmatch(pattern, name) is not None


def _is(folder: Path, replaced: Replaced) -> bool:
    return files.is_real_folder(folder) and os.lstat(folder).st_ino == replaced.inode
