"""Films and pictures as the bytes of their files: bytes, and binary files that a program has open.

What is open is read from its first byte, each time it is shown, so it must be able to seek; it is not closed. A film
is written to a temporary file, which FFmpeg opens; it is gone before the film is shown. Knows no format.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TypeAlias, TypeGuard

from framefusion.errors import VideoError

FileContent: TypeAlias = "bytes | bytearray | memoryview | BinaryIO"


def is_file_content(source: object) -> TypeGuard[FileContent]:
    """Whether a source is the content of a file."""
    return isinstance(source, (bytes, bytearray, memoryview)) or callable(getattr(source, "read", None))


def content_size(source: FileContent, name: str) -> int:
    """Bytes of a content.

    Raises:
        VideoError: it is empty, cannot seek, or is closed or open as text; the message calls it `name`.
    """
    size = source.nbytes if isinstance(source, memoryview) else 0
    if isinstance(source, (bytes, bytearray)):
        size = len(source)
    elif not isinstance(source, memoryview):
        size = _open_size(source, name)
    if not size:
        raise VideoError(f"{name} is empty (0 bytes): give all bytes of a file")
    return size


def content_bytes(source: FileContent, name: str) -> bytes:
    """All of a content, whose size was looked at.

    Raises:
        VideoError: as `content_size`, or it cannot be read.
    """
    content_size(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    return _read(source, name)


@contextmanager
def content_as_file(source: FileContent, name: str) -> Iterator[Path]:
    """A temporary file with this content. Errors and warnings about it call it `name`.

    Raises:
        VideoError: as `content_size`, or it cannot be read or written.
    """
    content_size(source, name)
    with TemporaryDirectory(prefix="framefusion-") as folder:
        path = Path(folder, "content")
        opened: BinaryIO = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        try:
            with path.open("wb") as file:
                shutil.copyfileobj(opened, file, 1 << 20)
        except (OSError, ValueError) as error:
            raise VideoError(
                f"{name} cannot be read into a temporary file ({error}): save it, give its path"
            ) from error
        with warnings.catch_warnings(record=True) as caught:
            try:
                yield path
            except VideoError as error:
                raise VideoError(str(error).replace(str(path), name)) from error
        for warning in caught:
            warnings.warn(str(warning.message).replace(str(path), name), warning.category, stacklevel=4)


def _open_size(source: Any, name: str) -> int:
    """Bytes of an open file, which stands at its first one afterwards."""
    if isinstance(source, io.TextIOBase):
        raise VideoError(f'{name} is a file that is open as text: open it with mode "rb"')
    try:
        if not source.seekable():
            raise VideoError(f"{name} is a pipe or a stream, which cannot be read twice: give its bytes, source.read()")
        size = int(source.seek(0, io.SEEK_END))
        source.seek(0)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise VideoError(f"{name} of type {type(source).__name__} is no open binary file ({error})") from error
    return size


def _read(source: BinaryIO, name: str) -> bytes:
    try:
        content = source.read()
    except (OSError, ValueError) as error:
        raise VideoError(f"{name} cannot be read ({error}): open it again, or give its path") from error
    if not isinstance(content, bytes):
        raise VideoError(f'{name} reads {type(content).__name__}, not bytes: open it with mode "rb"')
    return content
