"""Fetching what a client names, without being led where the client could not go itself.

A name is resolved once, every one of its addresses must be public, and the connection goes to one that was looked at:
whoever answers differently the second time gains nothing. Redirects are followed a few times, each as if it were the
first. One parser reads an address, and nothing else is made of it. No proxy, no cookies, no credentials, no encoding.

What others were attacked by: CVE-2026-24779 and CVE-2026-25960 of vLLM (two parsers that disagree), ms-swift#9740 (a
redirect to 169.254.169.254).
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from threading import Timer
from urllib.parse import SplitResult, urljoin, urlsplit

from framefusion.errors import RequestError

MOST_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_BLOCK = 1 << 16  # bytes
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_NO_ADDRESS = re.compile(r"[^\x21-\x7e]|\\")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], list[str]]


def fetch(
    url: str,
    place: str,
    domains: frozenset[str] | None,
    seconds: float,
    most_bytes: int,
    cancelled: Callable[[], bool] = lambda: False,
    is_public: Callable[[Address], bool] | None = None,
) -> Iterator[bytes]:
    """What an address gives, in blocks.

    Args:
        url: http or https.
        place: what messages call it.
        domains: hosts that may be asked; None for all.
        seconds: for all of it.
        most_bytes: of the content.
        cancelled: whether nobody waits any more.
        is_public: which addresses may be connected to; None for `is_public_address`.

    Raises:
        RequestError: it is not allowed, does not answer, answers with an error, too late or with too much.
    """
    deadline = time.monotonic() + seconds
    try:
        for _hop in range(MOST_REDIRECTS + 1):
            # 1. Read the address once; a redirect's counts no more than the client's.
            parts = _allowed(url, place, domains)
            # 2. Resolve once, and connect to an address that was looked at.
            address = _public_address(parts, place, is_public or is_public_address)
            connection = _Connection(parts, address, deadline)
            try:
                response = connection.get(parts)
                if response.status not in _REDIRECTS:
                    yield from _content(response, place, most_bytes, deadline, cancelled)
                    return
                location = response.headers.get("Location")
            finally:
                connection.close()
            if not location:
                raise RequestError(f"{place} answers with a redirect that leads nowhere: give the address behind it")
            url = urljoin(url, location)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        problem = f"did not come within {seconds:g} s" if late else f"cannot be fetched ({type(error).__name__})"
        raise RequestError(
            f"{place} {problem}: check it, or send the content as data:...;base64,...",
            param=place,
        ) from error
    raise RequestError(
        f"{place} redirects more than {MOST_REDIRECTS} times: give the address that it leads to", param=place
    )


def _allowed(url: str, place: str, domains: frozenset[str] | None) -> SplitResult:
    """The parts of an address that may be asked."""
    if _NO_ADDRESS.search(url):
        raise RequestError(f"{place} has characters that no address has: encode them with %", param=place)
    parts = urlsplit(url)
    host = parts.hostname or ""  # in lower case
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(host):
        raise RequestError(f"{place} is {url[:120]!r}: give https://host/clip.mp4", param=place)
    if "@" in parts.netloc:
        raise RequestError(f"{place} has a name or a password: leave it out", param=place)
    if domains is not None and host.rstrip(".") not in domains:
        raise RequestError(
            f"{place} is at {host!r}, which is none of the domains that this server fetches from "
            "(--allowed-media-domains): send the content as data:...;base64,...",
            param=place,
            status=403,
        )
    return parts


def _public_address(parts: SplitResult, place: str, is_public: Callable[[Address], bool]) -> str:
    """An address of the host, all of whose addresses are public."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise RequestError(
                f"{place} is at {parts.hostname!r}, which has an address that is not public: give a public one, or "
                "send the content as data:...;base64,...",
                param=place,
                status=403,
            )
    if not addresses:
        raise RequestError(f"{place} is at {parts.hostname!r}, which has no address: check it", param=place)
    return addresses[0]


def is_public_address(address: Address) -> bool:
    """Whether an address is one of the public network, and holds no other one inside."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(held is not None and not is_public_address(held) for held in inner):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


class _Connection:
    """One request to one address, under the name of its host, which ends at a deadline whatever the other side does."""

    def __init__(self, parts: SplitResult, address: str, deadline: float) -> None:
        left = max(deadline - time.monotonic(), 0.001)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        assert parts.hostname is not None
        self._http = http.client.HTTPConnection(parts.hostname, port, timeout=left)
        plain = socket.create_connection((address, port), timeout=left)
        self._socket = plain  # the connection forgets its own once the answer has it
        self._http.sock = plain
        self._timer = Timer(max(deadline - time.monotonic(), 0.001), self._shut)
        self._timer.daemon = True
        self._timer.start()
        try:
            if secure:
                self._socket = ssl.create_default_context().wrap_socket(plain, server_hostname=parts.hostname)
                self._http.sock = self._socket
        except BaseException:
            self.close()
            raise

    def get(self, parts: SplitResult) -> http.client.HTTPResponse:
        """The head of the answer."""
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._http.putrequest("GET", path, skip_host=True, skip_accept_encoding=True)
        self._http.putheader("Host", parts.netloc)
        self._http.putheader("Accept-Encoding", "identity")
        self._http.putheader("User-Agent", "framefusion-aot")
        self._http.putheader("Connection", "close")
        self._http.endheaders()
        return self._http.getresponse()

    def close(self) -> None:
        self._timer.cancel()
        self._http.close()
        self._socket.close()

    def _shut(self) -> None:
        """Wake whoever waits for the other side."""
        with suppress(OSError):  # it is gone already
            self._socket.shutdown(socket.SHUT_RDWR)


def _content(
    response: http.client.HTTPResponse, place: str, most_bytes: int, deadline: float, cancelled: Callable[[], bool]
) -> Iterator[bytes]:
    """The content of an answer, no more than is allowed."""
    if response.status != 200:
        raise RequestError(f"{place} answers with status {response.status}: check the address", param=place)
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(f"{place} comes as {encoding[:40]!r}: give an address of the file itself", param=place)
    too_large = RequestError(
        f"{place} has more than {most_bytes} bytes: give a shorter or smaller one", param=place, status=413
    )
    length = response.length
    if length is not None and length > most_bytes:
        raise too_large
    count = 0
    while block := response.read(_BLOCK):
        count += len(block)
        if count > most_bytes:
            raise too_large
        if cancelled():
            raise RequestError(f"{place} is not wanted any more", param=place)
        if time.monotonic() > deadline:
            raise TimeoutError
        yield block
    if time.monotonic() > deadline:  # the connection was cut then
        raise TimeoutError
    if count == 0 or (length is not None and count < length):
        raise RequestError(f"{place} ends after {count} bytes: send the file again", param=place)
