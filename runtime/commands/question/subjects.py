"""What is asked about, of files, folders and patterns: films and pictures together, or each of many by itself.

Opens a file only where a folder has one whose name does not say what it is. Knows no bundle.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from framefusion.errors import VideoError
from framefusion.runtime.media.media_file import FILM_SUFFIXES, PICTURE_SUFFIXES


@dataclass(frozen=True)
class Subject:
    """Films and pictures that one prompt shows, in order: "video", "image" or None for what the file says; and where.

    There is none in a question of text alone.
    """

    visuals: tuple[tuple[str | None, Path], ...] = ()

    @property
    def names(self) -> list[str]:
        """Its files as they were given."""
        return [str(path) for _, path in self.visuals]

    def kinds(self) -> list[str]:
        """What each of them is.

        Raises:
            VideoError: one is neither a film nor a picture, or cannot be opened.
        """
        return [kind or _kind_of(path) for kind, path in self.visuals]


def list_subjects(flagged: Sequence[tuple[str, Path]], files: Sequence[Path], each: bool) -> list[Subject]:
    """One subject of all that is named, or one for each film and picture.

    Args:
        flagged: kind and file, folder or pattern of every --video and --image, in order.
        files: the same of the arguments behind the bundle, whose kind is found out.
        each: ask about each by itself; so it is with folders, patterns and several arguments.

    Raises:
        click.UsageError: it could mean both, or an argument is but a word.
        VideoError: a folder or a pattern holds nothing.
    """
    for path in files:
        if not path.suffix and not glob.has_magic(str(path)) and not _exists(path):
            raise click.UsageError(f"there is no file {path}: quote a question of several words, -p 'What is this?'")
    named = [*flagged, *((None, path) for path in files)]
    many = [path for _, path in named if _is_many(path)]
    if not each and flagged and files:
        raise click.UsageError(
            f"{files[0]} is an argument, --{flagged[0][0]} {flagged[0][1]} a flag: name all in one way to show them "
            "together, or add --each to ask about each by itself"
        )
    if not each and many and any(path not in many for _, path in flagged):
        raise click.UsageError(
            f"{many[0]} stands for many, each asked about by itself, and another flag names one: add --each to ask "
            "about that by itself, too"
        )
    visuals = [(kind, found) for kind, path in named for found in _expanded(kind, path)]
    if each or many or len(files) > 1:
        return [Subject((visual,)) for visual in visuals] or [Subject()]
    return [Subject(tuple(visuals))]


def _kind_of(path: Path) -> str:
    """What a file is by what it holds; a damaged one by its name, so that its reader says what is wrong with it."""
    from framefusion.runtime.media.sources import source_kind

    try:
        return source_kind(path)
    except VideoError:
        suffix = path.suffix.lower()
        if suffix in FILM_SUFFIXES:
            return "video"
        if suffix in PICTURE_SUFFIXES:
            return "image"
        raise


def _is_many(path: Path) -> bool:
    """Whether it is a folder, or a pattern that is no file's name."""
    try:
        return path.is_dir() or (glob.has_magic(str(path)) and not path.exists())
    except (OSError, ValueError):  # a name that no file can have: whoever opens it says so
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _expanded(kind: str | None, path: Path) -> list[Path]:
    """The files that it stands for, by name."""
    if not _is_many(path):
        return [path]
    if path.is_dir():
        try:
            found = [entry for entry in sorted(path.iterdir()) if entry.name[0] != "." and _fits(kind, entry)]
        except OSError as error:
            raise VideoError(f"{path} cannot be listed ({error.strerror}): give files, or a folder of them") from None
    else:
        found = [entry for name in sorted(glob.glob(str(path), recursive=True)) if (entry := Path(name)).is_file()]
    if not found:
        what = {"video": "film", "image": "picture"}.get(kind or "", "film or picture")
        raise VideoError(
            f"{path} holds no {what}: give files, a folder that has some, or a pattern such as 'clips/*.mp4'"
        )
    return found


def _fits(kind: str | None, path: Path) -> bool:
    """Whether a file of a folder is of that kind, by its name, or by what it holds where the name does not say."""
    if not path.is_file():
        return False
    suffix = path.suffix.lower()
    if suffix in FILM_SUFFIXES | PICTURE_SUFFIXES:
        return kind is None or suffix in (FILM_SUFFIXES if kind == "video" else PICTURE_SUFFIXES)
    from framefusion.runtime.media.sources import source_kind

    try:
        found = source_kind(path)
    except VideoError:
        return False
    return kind in (None, found)
