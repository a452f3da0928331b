"""A request of several films: the engine runs the tower for one while the next is decoded, and answers are equal."""

from __future__ import annotations

import asyncio
import threading
from base64 import b64encode
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError
from framefusion.runtime.pipeline import Pipeline
from tests.films import write_film

pytest.importorskip("starlette")
pytestmark = pytest.mark.slow
SECONDS = 60.0


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
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=SECONDS) as client:
            return await ask(client)

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
            waited.append(towered.wait(SECONDS))  # the second film is not there before the first had the tower
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

    def decode(job: Any, seconds: float, cancelled: Callable[[], bool]) -> Any:
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
    assert ended.wait(SECONDS)
    assert service.ahead._latest.is_spent
