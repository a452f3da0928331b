"""Addresses that must not be asked, and answers that must not be taken; CVE-2026-24779, CVE-2026-25960 and others."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from framefusion.errors import RequestError
from framefusion.runtime.server.media.fetch import Address, fetch, is_public_address
from tests.patience import FOREVER, PATIENCE

PAUSE = 0.05  # seconds between two bytes of a slow answer
PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "192.0.0.1",
    "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1",
    "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:a9fe:a9fe::", "2001:0:7f00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_any_spelling(address: str) -> None:
    assert not is_public_address(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public_address(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x",
        "http://127.1/x",
        "http://2130706433/x",
        "http://0x7f000001/x",
        "http://0177.0.0.1/x",
        "http://[::1]/x",
        "http://[::ffff:127.0.0.1]/x",
        "http://[::]/x",
        "http://0/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/x",
        "https://127.0.0.1:8443/x",
        "http://user:password@93.184.216.34/x",
        "http://93.184.216.34@127.0.0.1/x",
        "http://127.0.0.1\\@93.184.216.34/x",
        "http://127.0.0.1#@93.184.216.34/x",
        "http://127.0.0.1%00.example.com/x",
        "http://example.com\r\nHost: evil/x",
        "http:///x",
        "http://",
        "ftp://93.184.216.34/x",
        "gopher://127.0.0.1/x",
        "http://①②⑦.0.0.1/x",
    ],
)
def test_no_address_leads_inside(url: str) -> None:
    with pytest.raises(RequestError):
        list(fetch(url, "the film", None, 2, 100))


@pytest.mark.parametrize("url", ["http://evil.com/x", "http://films.example.evil.com/x", "http://notfilms.example/x"])
def test_only_allowed_domains_are_asked(url: str) -> None:
    with pytest.raises(RequestError, match="none of the domains") as refused:
        list(fetch(url, "the film", frozenset({"films.example"}), 2, 100))
    assert refused.value.status == 403


# --- Beside a server of our own, on this machine --------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers by the path."""

    asked: list[str]

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers['Host']}{self.path}")  # type: ignore[attr-defined]
        answers: dict[str, Callable[[], None]] = {
            "/film": lambda: self.reply(b"film" * 1000),
            "/large": lambda: self.reply(b"x" * 100, length=1 << 40),
            "/endless": self.endless,
            "/slow": self.slow,
            "/short": lambda: self.reply(b"half", length=8),
            "/empty": lambda: self.reply(b""),
            "/packed": lambda: self.reply(b"film", encoding="gzip"),
            "/inside": lambda: self.redirect("http://169.254.169.254/"),
            "/file": lambda: self.redirect("file:///etc/passwd"),
            "/again": lambda: self.redirect("/again"),
            "/once": lambda: self.redirect("/film"),
            "/nowhere": lambda: self.redirect(None),
            "/out": lambda: self.redirect("http://other.example/film"),
        }
        answers.get(self.path, lambda: self.send_error(404))()

    def reply(self, content: bytes, length: int | None = None, encoding: str | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(content)

    def redirect(self, to: str | None) -> None:
        self.send_response(302)
        if to is not None:
            self.send_header("Location", to)
        self.end_headers()

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.pour(b"x" * 4096, 0)

    def slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.pour(b"x", PAUSE)

    def pour(self, block: bytes, pause: float) -> None:
        try:
            for _ in range(int(FOREVER / PAUSE)):
                self.wfile.write(block)
                time.sleep(pause)
        except OSError:
            pass

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as opened:
        threading.Thread(target=opened.serve_forever, args=(0.01,), daemon=True).start()
        yield opened
        opened.shutdown()


def here(address: Address) -> bool:
    """What these tests take for public: this machine."""
    return str(address) == "127.0.0.1"


def get(server: Server, path: str, *, domains: frozenset[str] | None = None, seconds: float = PATIENCE) -> bytes:
    url = f"http://127.0.0.1:{server.server_port}{path}"
    return b"".join(fetch(url, "the film", domains, seconds, 100_000, is_public=here))


def test_a_film_is_fetched_through_a_redirect(server: Server) -> None:
    assert get(server, "/film") == b"film" * 1000
    assert get(server, "/once") == b"film" * 1000


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/inside", "not public"),
        ("/file", "give https://host"),
        ("/again", "redirects more than 3 times"),
        ("/nowhere", "leads nowhere"),
        ("/large", "more than 100000 bytes"),
        ("/endless", "more than 100000 bytes"),
        ("/short", "ends after 4 bytes"),
        ("/empty", "ends after 0 bytes"),
        ("/packed", "comes as 'gzip'"),
        ("/missing", "status 404"),
    ],
)
def test_answers_that_are_not_taken(server: Server, path: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        get(server, path)


def test_a_redirect_counts_no_more_than_the_client(server: Server) -> None:
    with pytest.raises(RequestError, match=r"'other\.example', which is none of the domains"):
        get(server, "/out", domains=frozenset({"127.0.0.1"}))
    assert len(server.asked) == 1


def test_slow_answers_end_in_time(server: Server) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match="did not come within"):
        get(server, "/slow", seconds=0.3)
    assert time.monotonic() - start < PATIENCE


def test_nobody_listens(server: Server) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(RequestError, match="cannot be fetched"):
        get(server, "/film")


def test_a_name_is_resolved_once_and_its_address_connected(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers with a public address first and with a private one later gains nothing (DNS rebinding)."""
    answers = ["127.0.0.1", "10.0.0.1", "10.0.0.1"]  # `here` takes the first one for public
    resolve = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host == "films.example":
            host = answers.pop(0)
        return resolve(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    url = f"http://films.example:{server.server_port}/film"
    content = b"".join(fetch(url, "the film", frozenset({"films.example"}), PATIENCE, 100_000, is_public=here))
    assert content == b"film" * 1000
    assert len(answers) == 2
    assert server.asked == [f"films.example:{server.server_port}/film"]


def test_one_private_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: entries)
    with pytest.raises(RequestError, match="not public"):
        list(fetch("http://films.example/film", "the film", None, 1, 100))
