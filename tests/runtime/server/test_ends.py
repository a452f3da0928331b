"""Who may ask, who is turned away, and what is left of those who go: nothing."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import ServerError
from framefusion.runtime.pipeline import Pipeline, Request
from tests.bundles import shared
from tests.patience import PATIENCE
from tests.runtime.server.conftest import Running, serving

pytest.importorskip("starlette")
pytestmark = pytest.mark.slow
JSON = {"Content-Type": "application/json"}
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
LONG = {**HELLO, "max_tokens": 1000, "stream": True, "framefusion": {"cost": 1.0}}


def connect(server: Running) -> HTTPConnection:
    return HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)


def send(
    server: Running, body: Any, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
) -> HTTPResponse:
    connection = connect(server)
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    connection.request("POST", path, content, JSON if headers is None else headers)
    return connection.getresponse()


def metric(server: Running, name: str) -> float:
    connection = connect(server)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    found = re.search(rf"^framefusion:{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def takes_connections(server: Running) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


def error_of(response: HTTPResponse) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(response.read())["error"]
    return error


def test_strangers_pages_and_keys(tmp_path: Path) -> None:
    with serving(tmp_path, "--api-key", "secret") as server:
        key = {**JSON, "Authorization": "Bearer secret"}
        assert send(server, HELLO, key).status == 200
        # 1. Without the key, or with another one.
        for other in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            response = send(server, HELLO, {**JSON, **other})
            assert response.status == 401
            assert error_of(response)["type"] == "authentication_error"
        # 2. As a page of somebody else would send it: a form, or under a name that is not the server's.
        assert send(server, HELLO, {**key, "Content-Type": "text/plain"}).status == 415
        assert send(server, HELLO, {**key, "Host": "evil.example"}).status == 400
        connection = connect(server)
        connection.request("OPTIONS", "/v1/chat/completions", headers={"Origin": "http://evil.example"})
        response = connection.getresponse()
        assert response.status == 405
        assert response.getheader("Access-Control-Allow-Origin") is None
        # 3. Whoever watches over it needs no key; counters do.
        for path, status in (("/health", 200), ("/health/ready", 200), ("/metrics", 401), ("/v1/models", 401)):
            connection = connect(server)
            connection.request("GET", path)
            assert connection.getresponse().status == status, path
        connection = connect(server)
        connection.request("GET", "/nowhere")
        assert error_of(connection.getresponse())["code"] == "RequestError"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nul", b'{"messages": 1}', b'{"max_tokens": 1e999}', b"1" * 5000],
    ids=lambda body: repr(body[:12]),
)
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    response = send(server, body)
    assert response.status == 400
    assert error_of(response)["code"] == "RequestError"


def test_too_large_a_body_is_refused_before_it_is_read(server: Running) -> None:
    connection = connect(server)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_a_caller_who_leaves_frees_what_is_held(server: Running) -> None:
    for stream in (True, False):
        connection = connect(server)
        connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": stream}), JSON)
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        until(lambda: metric(server, "num_requests_running") > 0)
        connection.close()
        until(lambda: metric(server, "num_requests_running") == 0)
    assert send(server, HELLO).status == 200


def test_the_servers_flags_stand_where_a_request_says_nothing(tmp_path: Path, films: Path) -> None:
    content = [{"type": "video_url", "video_url": {"url": f"file://{films}/film.mp4"}}, {"type": "text", "text": "Hm?"}]
    asks = {**HELLO, "messages": [{"role": "user", "content": content}]}
    with Pipeline(shared("bundle")) as pipeline:
        sampling = pipeline.manifest.sampling.overridden(None, 3)
        request = Request(4, cost=0.5, reducer="uniform", temperature=0)
        expected = pipeline.generate("Hm?", [films / "film.mp4"], request, sampling=sampling)
    flags = ("--cost", 0.5, "--reducer", "uniform", "--max-frames", 3, "--allowed-local-media-path", films)
    with serving(tmp_path, *flags) as server:
        answer = json.loads(send(server, asks).read())
    assert answer["choices"][0]["message"]["content"] == expected.text
    details = answer["usage"]["prompt_tokens_details"]
    assert details["visual_tokens"] == expected.visual_tokens
    assert details["cost"] == pytest.approx(expected.cost, abs=1e-4)


@pytest.mark.parametrize("flags", [("--reducer", "nothing"), ("--cost", 1.5)], ids=str)
def test_a_reduction_that_no_request_could_have_is_refused_at_once(tmp_path: Path, flags: tuple[object, ...]) -> None:
    with pytest.raises(AssertionError, match=r"does not answer.*(nothing|1\.5)"), serving(tmp_path, *flags):
        pass


def test_more_than_can_be_done_are_turned_away(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-running", 1, "--max-waiting", 0) as server:
        connection = connect(server)
        connection.request("POST", "/v1/chat/completions", json.dumps(LONG), JSON)
        connection.getresponse().readline()
        response = send(server, HELLO)
        assert response.status == 429
        assert response.getheader("Retry-After") == "1"
        assert error_of(response)["type"] == "rate_limit_error"
        connection.close()
        until(lambda: send(server, HELLO).status == 200)


def test_what_runs_ends_before_the_server_does(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        connection = connect(server)
        connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "max_tokens": 200}), JSON)
        response = connection.getresponse()
        response.readline()
        server.signal(signal.SIGTERM)
        assert response.read().rstrip().endswith(b"data: [DONE]")
        assert server.process.wait(PATIENCE) == -signal.SIGTERM or server.process.returncode == 0
        assert "Traceback" not in server.log.read_text()


def test_conversations_have_a_budget_and_answers_do_not_change(tmp_path: Path, films: Path) -> None:
    film = {"type": "video_url", "video_url": {"url": f"file://{films}/film.mp4"}}

    def first(number: int) -> dict[str, Any]:
        return {"role": "user", "content": [film, {"type": "text", "text": f"Question {number}?"}]}

    with serving(tmp_path, "--cache-mb", 1, "--allowed-local-media-path", films) as server:
        answers = {}
        for number in range(12):
            answers[number] = json.loads(send(server, {**HELLO, "messages": [first(number)]}).read())
        assert metric(server, "evicted_conversations") > 0
        assert metric(server, "kv_cache_usage_perc") <= 1
        assert "evicted a conversation" in server.log.read_text()
        reused = []
        with Pipeline(shared("bundle")) as pipeline:
            for number, answer in answers.items():
                text = answer["choices"][0]["message"]["content"]
                messages = [
                    first(number), {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"},
                ]  # fmt: skip
                got = json.loads(send(server, {**HELLO, "messages": messages}).read())
                cached = got["usage"]["prompt_tokens_details"]["cached_tokens"]
                reused.append(cached > 0)
                if not cached:  # as one prefill of the whole conversation says
                    turns: list[Any] = [dict(message) for message in messages]
                    turns[0]["content"] = [{"type": "video", "video": str(films / "film.mp4")}, f"Question {number}?"]
                    own = pipeline.generate(turns, request=Request(4, temperature=0))
                    assert got["choices"][0]["message"]["content"] == own.text
        assert False in reused


def test_junk_leaves_no_trace(server: Running) -> None:
    """Half requests, random bytes and bodies of every kind: it answers as before, and does not grow."""
    seeded = random.Random(0)
    host, port = server.url.removeprefix("http://").split(":")

    def junk() -> bytes:
        kind = seeded.randrange(4)
        if kind == 0:
            return seeded.randbytes(seeded.randrange(1, 2000))
        if kind == 1:
            return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
        if kind == 2:
            return b"GET /" + seeded.randbytes(200).replace(b"\n", b"") + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
        body = json.dumps({"messages": [{"role": seeded.choice(["user", "x"]), "content": seeded.choice([3, [], {}])}]})
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()

    before = 0
    for number in range(3000):
        if number == 1000:  # threads and buffers are there now
            before = server.resident()
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
            connection.sendall(junk())
            if seeded.random() < 0.02:
                connection.settimeout(0.1)
                with suppress(OSError):
                    connection.recv(1000)
    until(lambda: send(server, HELLO).status == 200)  # so many connections at once are turned away for a moment
    until(lambda: metric(server, "num_requests_running") == 0)
    assert server.resident() < before + (16 << 20)
    assert "Traceback" not in server.log.read_text()


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    from tests.commands import assert_refused, run

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(run("serve", shared("bundle"), "--port", port), ServerError, str(port), "--port")


@contextmanager
def bare_server(app: Any) -> Iterator[tuple[Any, tuple[str, int]]]:
    """An application of its own behind the server's protocol: uvicorn, and where it listens."""
    import uvicorn

    from framefusion.runtime.server import running

    opened = running.listen(running.Address(port=0))
    config = uvicorn.Config(app, http=running.BoundedProtocol, lifespan="off", log_level="error", timeout_keep_alive=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        until(lambda: server.started)
        yield server, opened.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()


def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.runtime.server import running

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    usual = running.HEADER_SECONDS
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    with bare_server(app) as (_, address):
        for begin in (b"", b"GET / HTTP/1.1\r\nHost: x\r\nA", b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"):
            with socket.create_connection(address, timeout=PATIENCE) as connection:
                connection.sendall(begin)
                start = time.monotonic()
                while connection.recv(1000):
                    pass
                assert time.monotonic() - start < usual


@pytest.mark.parametrize("pieces", [1, 200], ids=["whole", "in pieces"])
def test_a_connection_that_takes_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Buffers of both sides are full, and the rest of the answer waits; whoever reads gets all of it."""
    from framefusion.runtime.server import running

    size = 32 << 20

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        for number in range(pieces):
            more = number + 1 < pieces
            body = bytes(size // pieces if more else size - size // pieces * (pieces - 1))
            await send({"type": "http.response.body", "body": body, "more_body": more})

    monkeypatch.setattr(running, "TAKE_SECONDS", 0.5)
    with bare_server(app) as (server, address):
        with socket.create_connection(address, timeout=PATIENCE) as idle:
            idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: len(server.server_state.connections) == 1)
            until(lambda: not server.server_state.connections)
        monkeypatch.setattr(running, "TAKE_SECONDS", PATIENCE)
        with socket.create_connection(address, timeout=PATIENCE) as reading:
            reading.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert sum(len(piece) for piece in iter(lambda: reading.recv(1 << 16), b"")) > size


def test_callers_who_leave_are_no_failures_of_the_server(tmp_path: Path) -> None:
    """Whenever they leave: their places are free again, what they asked for is not kept, and no traceback is logged."""
    with serving(tmp_path, "--max-running", 1, "--max-waiting", 5) as server:
        for number in range(12):
            leaving = []
            for stream in (True, False, True, False):
                connection = connect(server)
                connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "stream": stream}), JSON)
                leaving.append(connection)
            time.sleep(0.01 * number)
            for connection in leaving:
                connection.close()
            until(lambda: metric(server, "num_requests_waiting") + metric(server, "num_requests_running") == 0)
        assert send(server, HELLO).status == 200
        assert "Traceback" not in server.log.read_text()


def test_asking_for_many_tokens_keeps_nobody_waiting(tmp_path: Path) -> None:
    """More tokens are asked for than a cache has room for: what counts is the room."""
    with serving(tmp_path, "--cache-mb", 64) as server:
        both = [connect(server), connect(server)]
        for connection in both:
            connection.request("POST", "/v1/chat/completions", json.dumps({**LONG, "max_tokens": 1 << 20}), JSON)
        until(lambda: metric(server, "num_requests_running") == 2)
        for connection in both:
            connection.close()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        connection = connect(server)
        connection.request("POST", "/v1/chat/completions", json.dumps(LONG), JSON)
        response = connection.getresponse()
        response.readline()
        server.signal(signal.SIGINT)
        until(lambda: not takes_connections(server))  # two of one kind at once are one
        server.signal(signal.SIGINT)
        assert b"the server ended before the answer did" in response.read()
        assert server.process.wait(PATIENCE) == 130
        assert "Traceback" not in server.log.read_text()


def test_a_body_takes_no_longer_than_a_request_may(tmp_path: Path) -> None:
    with serving(tmp_path, "--request-seconds", 1) as server:
        connection = connect(server)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "10")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 408
        assert error_of(response)["message"].startswith("the body did not come within 1 s")
        until(lambda: metric(server, "num_requests_waiting") == 0)
