"""A request of several films: the engine runs the tower for one while the next is decoded, and answers are equal."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError
from framefusion.runtime.generation import embedder
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.server.engine import Job
from framefusion.runtime.server.media import decoding
from framefusion.runtime.server.media.child import decode_in_child
from framefusion.runtime.server.media.transfer import FrameSender
from framefusion.runtime.server.protocol.request import read_chat_request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film
from tests.patience import FOREVER, PATIENCE

pytest.importorskip("starlette")
pytestmark = pytest.mark.slow


@pytest.fixture
def service(pipeline: Pipeline) -> Iterator[Any]:
    from framefusion.runtime.server.media.policy import MediaPolicy
    from framefusion.runtime.server.media.reader import MediaReader
    from framefusion.runtime.server.service import Service, ServiceSettings

    reader = MediaReader(MediaPolicy(), pipeline.manifest.preprocessing, pipeline.manifest.sampling, decoders=1)
    service = Service(pipeline, reader, ServiceSettings("tiny"))
    service.start()
    yield service
    service.close()


@pytest.fixture
def contents(tmp_path: Path) -> list[bytes]:
    """Two films."""
    return [write_film(tmp_path / f"{seed}.mp4", frames=8 + 4 * seed, seed=seed).read_bytes() for seed in (1, 2)]


def message(contents: list[bytes], text: str = "What differs?") -> dict[str, Any]:
    urls = [f"data:video/mp4;base64,{b64encode(content).decode()}" for content in contents]
    shown: list[dict[str, Any]] = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def with_client(service: Any, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    import httpx2

    from framefusion.runtime.server.app import Access, create_app

    app = create_app(service, Access(("127.0.0.1",), None, 1 << 24))

    async def run() -> Any:
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=PATIENCE) as client:
            answer = await ask(client)
            deadline = time.monotonic() + PATIENCE
            while service.admitted and time.monotonic() < deadline:  # the engine's last call needs this loop
                await asyncio.sleep(0.005)
            return answer

    return asyncio.run(run())


async def post(client: Any, messages: list[dict[str, Any]]) -> Any:
    return await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 6, "temperature": 0})


def test_answers_are_those_of_films_decoded_first(
    service: Any, pipeline: Pipeline, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a conversation, too, and whichever request reads ahead of two that come at once."""

    async def ask(client: Any) -> list[Any]:
        first = (await post(client, [message(contents)])).json()
        said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
        second = (await post(client, [message(contents), said, message(contents[::-1], "And now?")])).json()
        both = await asyncio.gather(*(post(client, [message(contents, text)]) for text in ("One?", "Two?")))
        return [
            (answer["choices"][0]["message"]["content"], answer["usage"])
            for answer in (first, second, *(response.json() for response in both))
        ]

    answers = []
    for overlaps in (False, True):
        monkeypatch.setattr(pipeline, "overlaps", overlaps)
        answers.append(with_client(service, ask))
        service.conversations.clear()
    assert answers[0] == answers[1]
    assert answers[0][1][1]["prompt_tokens_details"]["cached_tokens"] > 0


def test_the_tower_has_a_film_while_the_next_is_decoded(
    service: Any, pipeline: Pipeline, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from framefusion.runtime.server.media import decoding, reader

    towered = threading.Event()
    waited: list[bool] = []
    threads: list[str] = []
    decode_apart = decoding.decode_apart
    encode = pipeline.encode_visual

    def decode(*given: Any) -> Any:
        decoded = decode_apart(*given)
        if waited or threads:
            waited.append(towered.wait(PATIENCE))  # the second film is not there before the first had the tower
        else:
            waited.append(True)
        return decoded

    def encode_visual(visual: Any) -> Any:
        threads.append(threading.current_thread().name)
        towered.set()
        return encode(visual)

    monkeypatch.setattr(reader, "decode_apart", decode)
    monkeypatch.setattr(pipeline, "encode_visual", encode_visual)
    monkeypatch.setattr(pipeline, "overlaps", True)
    answer = with_client(service, lambda client: post(client, [message(contents)]))
    assert answer.status_code == 200
    assert (waited, threads) == ([True, True], ["engine", "engine"])
    assert service.ahead._latest.is_spent


def test_what_goes_wrong_is_an_error_of_its_request_alone(
    service: Any, pipeline: Pipeline, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [message([contents[0], b"no film"])]
    monkeypatch.setattr(pipeline, "overlaps", False)
    expected = with_client(service, lambda client: post(client, bad))
    monkeypatch.setattr(pipeline, "overlaps", True)
    answer = with_client(service, lambda client: post(client, bad))
    assert answer.status_code == expected.status_code == 400
    assert answer.json() == expected.json()
    assert service.ahead._latest.is_spent

    def fail(visual: Any) -> Any:
        raise BackendError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "encode_visual", fail)
        assert with_client(service, lambda client: post(client, [message(contents)])).status_code == 500
    assert service.ahead._latest.is_spent
    assert with_client(service, lambda client: post(client, [message(contents)])).status_code == 200
    assert service.admitted == 0


def test_who_leaves_while_a_film_is_decoded_leaves_nothing(
    service: Any, pipeline: Pipeline, contents: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from framefusion.runtime.server.media import reader
    from framefusion.runtime.server.protocol.request import read_chat_request

    monkeypatch.setattr(pipeline, "overlaps", True)
    begun = threading.Event()
    ended = threading.Event()

    def decode(job: Any, seconds: float, cancelled: Callable[[], bool], follower: Any) -> Any:
        begun.set()
        while not cancelled():
            ended.wait(0.005)
        ended.set()
        raise ValueError("not wanted")

    monkeypatch.setattr(reader, "decode_apart", decode)
    chat = read_chat_request({"messages": [message(contents)]}, service.settings.reduction)

    async def leave() -> None:
        task = asyncio.create_task(service.submit(chat, lambda: False, 0.0))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert ended.wait(PATIENCE)
    assert service.ahead._latest.is_spent


# --- Within one film -------------------------------------------------------------------------------------------------


@pytest.fixture
def long_film(tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A film that comes in several parts, for a tower that takes two pictures at once."""
    content = write_film(tmp_path / "long.mp4", frames=24, size=224).read_bytes()
    (visual,) = pipeline.read_visuals(
        [Turn("user", [Visual.VIDEO, "What?"])], [tmp_path / "long.mp4"], pipeline.manifest.sampling, Stopwatch()
    )
    monkeypatch.setattr(embedder, "PATCHES_AT_ONCE", 2 * visual.tiles[0].shape[1])
    assert visual.tiles[0].shape[0] > 4
    monkeypatch.setattr(pipeline, "overlaps", True)
    return [content]


class HeldDecoder:
    """`decode_apart` of films whose last frames come once the tower ran for the first ones.

    Attributes:
        towered: the tower ran.
        runs: of the tower for the frames that have come, before a film ends.
        on_part: called when frames came.
        frames: references to the memory of all films.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
        from framefusion.runtime.server.media import decoding, reader

        self.towered = threading.Event()
        self.runs = 0
        self._encoded = threading.Semaphore(0)
        self.on_part: Callable[[], None] = lambda: None
        self.frames: list[weakref.ref[Any]] = []
        self._decode = decoding.decode_apart
        self._encode = pipeline.encode_visual
        monkeypatch.setattr(reader, "decode_apart", self.decode)
        monkeypatch.setattr(pipeline, "encode_visual", self.encode_visual)

    def decode(self, job: Any, seconds: float, cancelled: Callable[[], bool], follower: Any) -> Any:
        return self._decode(job, seconds, cancelled, _Held(self, follower))

    def encode_visual(self, visual: Any) -> Any:
        rows = self._encode(visual)
        self.towered.set()
        self._encoded.release()
        return rows

    def end(self) -> None:
        """Wait for the runs that a film's frames bring while it is decoded."""
        for _ in range(self.runs):
            assert self._encoded.acquire(timeout=PATIENCE)


class _Held:
    def __init__(self, held: HeldDecoder, follower: Any) -> None:
        self._held = held
        self._follower = follower

    def begin(self) -> None:
        raise AssertionError("frames are picked in the child")

    def add(self, kept: Any, size: tuple[int, int], ready: int) -> None:
        self._held.frames.append(weakref.ref(kept[0]))
        self._follower.add(kept, size, ready)
        self._held.on_part()
        if ready > len(kept[0]) // 2:
            assert self._held.towered.wait(PATIENCE)
        if ready == len(kept[0]):
            self._held.end()


class Endless(Job):
    """Somebody else's answer."""

    def __init__(self, on_token: Callable[[], object]) -> None:
        super().__init__()
        self._on_token = on_token

    @property
    def nbytes(self) -> int:
        return 0

    def start(self) -> Iterator[Any]:  # type: ignore[override]
        while True:
            time.sleep(0.001)
            yield None

    def give(self, step: Any) -> None:
        self._on_token()

    def finish(self, error: BaseException | None) -> None:
        pass


def test_the_tower_has_the_first_frames_while_the_rest_is_decoded_and_others_get_tokens(
    service: Any, pipeline: Pipeline, long_film: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the engine's thread, a run at a time; the answer is that of a film that was decoded first."""
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "overlaps", False)
        expected = with_client(service, lambda client: post(client, [message(long_film)])).json()
    service.conversations.clear()
    events: list[str] = []
    held = HeldDecoder(monkeypatch, pipeline)
    held.runs = 3
    encode = pipeline.encode_visual

    def encode_visual(visual: Any) -> Any:
        events.append(threading.current_thread().name)
        return encode(visual)

    monkeypatch.setattr(pipeline, "encode_visual", encode_visual)
    runs_beside = threading.Event()

    def on_token() -> None:
        events.append("token")
        runs_beside.set()

    other = Endless(on_token)
    service.engine.submit(other)
    assert runs_beside.wait(PATIENCE)  # while it waits for its first token, nobody reads ahead
    response = with_client(service, lambda client: post(client, [message(long_film)]))
    other.cancel()
    assert response.status_code == 200, response.text
    answer = response.json()
    for name in ("choices", "usage"):
        assert answer[name] == expected[name]
    runs = [index for index, event in enumerate(events) if event == "engine"]
    assert len(runs) > 2
    assert set(events) == {"engine", "token"}
    assert all("token" in events[start:end] for start, end in pairwise(runs[:-1]))
    assert held.towered.is_set()
    seconds = answer["framefusion"]["seconds"]
    assert seconds["media"] > 0
    assert "video" not in seconds


def test_a_film_is_decoded_first_where_others_wait_for_the_engine(
    service: Any, pipeline: Pipeline, long_film: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no idle time to be filled, and rows that wait for their prompt take memory."""
    from framefusion.runtime.server.media import reader

    expected = with_client(service, lambda client: post(client, [message(long_film)]))
    service.conversations.clear()
    service.ahead._latest = None
    followers: list[Any] = []
    decoded = threading.Event()
    decode_apart = decoding.decode_apart

    def decode(job: Any, seconds: float, cancelled: Callable[[], bool], follower: Any) -> Any:
        followers.append(follower)
        try:
            return decode_apart(job, seconds, cancelled, follower)
        finally:
            decoded.set()

    monkeypatch.setattr(reader, "decode_apart", decode)
    others = [Endless(lambda: decoded.wait(PATIENCE)) for _ in range(2)]
    for other in others:
        service.engine.submit(other)
    assert service.engine.waiting > 0
    response = with_client(service, lambda client: post(client, [message(long_film)]))
    for other in others:
        other.cancel()
    assert (followers, service.ahead._latest) == ([None], None)
    assert response.status_code == 200, response.text
    for name in ("choices", "usage"):
        assert response.json()[name] == expected.json()[name]


def test_a_child_that_is_killed_halfway_is_an_error_of_its_request_alone(
    service: Any, pipeline: Pipeline, long_film: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldDecoder(monkeypatch, pipeline)

    def kill() -> None:
        if held.towered.wait(PATIENCE):
            for child in multiprocessing.active_children():
                child.kill()

    held.on_part = kill
    monkeypatch.setattr(decoding, "decode_in_child", sends_half_a_film)
    failed = with_client(service, lambda client: post(client, [message(long_film)]))
    assert failed.status_code == 400
    assert "processor time: send a shorter or smaller one" in failed.json()["error"]["message"]
    assert_nothing_is_left(service, held)
    held.on_part = lambda: None
    monkeypatch.setattr(decoding, "decode_in_child", decode_in_child)
    assert with_client(service, lambda client: post(client, [message(long_film)])).status_code == 200


def sends_half_a_film(pipe: Connection, job: Any) -> None:
    film = np.zeros((24, 84, 84, 3), np.uint8)
    sender = FrameSender(pipe)
    sender.begin()
    sender.add((film,), (84, 84), 23)
    time.sleep(FOREVER)


def test_who_leaves_halfway_through_a_film_leaves_nothing(
    service: Any, pipeline: Pipeline, long_film: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldDecoder(monkeypatch, pipeline)
    monkeypatch.setattr(decoding, "decode_in_child", sends_half_a_film)
    chat = read_chat_request({"messages": [message(long_film)]}, service.settings.reduction)

    async def leave() -> None:
        task = asyncio.create_task(service.submit(chat, lambda: False, 0.0))
        while not held.towered.is_set():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.monotonic()
    asyncio.run(leave())
    assert_nothing_is_left(service, held)
    assert time.monotonic() - start < PATIENCE


def assert_nothing_is_left(service: Any, held: HeldDecoder) -> None:
    """No child, no frame and no row, a moment behind the request's end; the engine has nothing to do."""
    deadline = time.monotonic() + PATIENCE
    while multiprocessing.active_children() or any(frames() is not None for frames in held.frames):
        assert time.monotonic() < deadline
        time.sleep(0.01)
        gc.collect()
    assert held.frames
    reading = service.ahead._latest
    assert (reading.is_spent, reading._parts, reading._rows, reading._left) == (True, [], [], None)
    assert (service.engine.waiting, service.engine.running) == (0, 0)
