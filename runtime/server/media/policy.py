"""Which films and pictures a server opens for its clients: closed by default, and bounded before anything is decoded.

    data:         always, up to `file_bytes`; the length is known before it is decoded
    file:         below `local_folder`, links followed first
    http, https   of `domains`, at public addresses: see fetch.py

Each becomes a file of its own in a folder of the request, and a digest by which it is known again. Decodes nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from framefusion.errors import RequestError, ServerError
from framefusion.runtime.server.media.fetch import fetch

ANY_DOMAIN = "any"
FILE_BYTES = 256 << 20
FETCH_SECONDS = 30.0
_DATA = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.=+-]+)*;base64,", re.IGNORECASE)
_TEXT_BYTES = 1 << 20  # of a body, for all that is no film


@dataclass(frozen=True)
class MediaPolicy:
    """What clients may show.

    Attributes:
        domains: hosts that films and pictures are fetched from, in lower case; `ANY_DOMAIN` for every public one.
        local_folder: below which files of this machine are opened; None opens none.
        file_bytes: of one film or picture at most.
        fetch_seconds: for fetching one at most.
    """

    domains: frozenset[str] = frozenset()
    local_folder: Path | None = None
    file_bytes: int = FILE_BYTES
    fetch_seconds: float = FETCH_SECONDS

    def __post_init__(self) -> None:
        if self.local_folder is not None and not self.local_folder.is_dir():
            raise ServerError(f"the folder of media {self.local_folder} is none: give one that exists")
        for domain in self.domains:
            if not re.fullmatch(r"[a-z0-9.-]+", domain):
                raise ServerError(f"the domain {domain!r} is none: give names such as example.com, or {ANY_DOMAIN}")

    @property
    def body_bytes(self) -> int:
        """Of the largest body of a request: `file_bytes` in base64, and its text."""
        return self.file_bytes * 4 // 3 + _TEXT_BYTES


def read_domains(text: str) -> frozenset[str]:
    """The domains of a policy, of names with commas between them."""
    return frozenset(name.strip().lower() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class MediaFile:
    """A film or picture of a client, on this machine.

    Attributes:
        path: of the file.
        digest: equal for equal content.
        name: what messages call it.
    """

    path: Path
    digest: str
    name: str


def open_media(url: str, place: str, folder: Path, policy: MediaPolicy, cancelled: Callable[[], bool]) -> MediaFile:
    """The file behind an address.

    Args:
        url: a data:, file: or http(s): one.
        place: what messages call it.
        folder: of the request: what is fetched goes there.
        policy: what is allowed.
        cancelled: whether nobody waits any more.

    Raises:
        RequestError: the address is malformed or not allowed, or there is nothing there.
    """
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        return _from_data(url, place, folder, policy)
    if scheme == "file":
        return _from_disk(url, place, policy)
    if scheme in ("http", "https"):
        return _from_network(url, place, folder, policy, cancelled)
    raise RequestError(
        f"{place} begins with {url[:16]!r}: give data:...;base64,..., file:///... or https://...", param=place
    )


def _from_data(url: str, place: str, folder: Path, policy: MediaPolicy) -> MediaFile:
    """The content of a data: URL."""
    head = _DATA.match(url[:256])
    if head is None:
        raise RequestError(f"{place} is no data: URL in base64: give data:video/mp4;base64,...", param=place)
    padding = url[-2:].count("=")
    size = (len(url) - head.end()) * 3 // 4 - padding
    if size > policy.file_bytes:
        raise _too_large(place, size, policy)
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{place} is no base64 ({error}): encode the file anew", param=place) from None
    if not content:
        raise RequestError(f"{place} holds no bytes: give those of a file", param=place)
    digest = hashlib.sha256(content).hexdigest()
    path = folder / digest
    if not path.exists():  # a request may show the same twice
        with path.open("xb") as file:
            file.write(content)
    return MediaFile(path, digest, place)


def _from_disk(url: str, place: str, policy: MediaPolicy) -> MediaFile:
    """A file of this machine."""
    if policy.local_folder is None:
        raise RequestError(
            f"{place} is a file of the server's machine, it opens none: send the content as data:...;base64,..., or "
            "start the server with --allowed-local-media-path",
            param=place,
            status=403,
        )
    malformed = RequestError(f"{place} is {url[:120]!r}: give file:///folder/clip.mp4", param=place)
    try:
        parts = urlsplit(url)
        name = os.fsdecode(unquote_to_bytes(parts.path))  # names of files are bytes, not all of them are UTF-8
    except ValueError:  # half an IPv6 address, half a surrogate pair
        raise malformed from None
    if parts.netloc not in ("", "localhost") or not name.startswith("/") or "\0" in name:
        raise malformed
    outside = RequestError(
        f"{place} is {url[:120]!r}: no file is there, or none below the folder that is allowed "
        "(--allowed-local-media-path)",
        param=place,
        status=403,
    )
    try:
        path = Path(name).resolve(strict=True)  # links are followed before the folder is compared
    except (OSError, RuntimeError, ValueError):
        raise outside from None
    if not path.is_relative_to(policy.local_folder.resolve()) or not path.is_file():
        raise outside
    facts = path.stat()
    if facts.st_size > policy.file_bytes:
        raise _too_large(place, facts.st_size, policy)
    identity = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}"
    return MediaFile(path, f"file:{identity}", place)


def _from_network(url: str, place: str, folder: Path, policy: MediaPolicy, cancelled: Callable[[], bool]) -> MediaFile:
    """What an address of the network gives."""
    if not policy.domains:
        raise RequestError(
            f"{place} is on the network, this server fetches nothing: send the content as data:...;base64,..., or "
            "start the server with --allowed-media-domains",
            param=place,
            status=403,
        )
    allowed = None if ANY_DOMAIN in policy.domains else policy.domains
    digest = hashlib.sha256()
    path = folder / f"fetched-{len(list(folder.iterdir()))}"
    with path.open("xb") as file:
        for block in fetch(url, place, allowed, policy.fetch_seconds, policy.file_bytes, cancelled):
            digest.update(block)
            file.write(block)
    return MediaFile(path, digest.hexdigest(), place)


def _too_large(place: str, size: int, policy: MediaPolicy) -> RequestError:
    return RequestError(
        f"{place} has {size} bytes, at most {policy.file_bytes} are taken: send a shorter or smaller one",
        param=place,
        status=413,
    )
