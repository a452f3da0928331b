"""A server's requests in one step of the engine, or in turns where the graphs have one row."""

from __future__ import annotations

import asyncio
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.session import Session
from tests.bundles import shared
from tests.patience import PATIENCE
from tests.runtime.bundle_edits import copied, of_one_row
from tests.runtime.server.conftest import serving
from tests.runtime.server.test_ends import LONG, metric, send

pytest.importorskip("starlette")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["gqa", "portable", "of one row"])
def test_requests_are_decoded_together_or_in_turns_which_is_said_once(tmp_path: Path, kind: str) -> None:
    """A step has all requests that run, and whoever asks for a batch where there is none learns what brings one."""
    bundle = shared("portable-512" if kind == "portable" else "bundle")
    if kind == "of one row":
        pytest.importorskip("onnx")
        bundle = of_one_row(copied(bundle, tmp_path / "bundle"))
    asks = {**LONG, "stream": False, "max_tokens": 100, "temperature": 0}
    with serving(tmp_path, bundle=bundle) as server:
        alone = [json.loads(send(server, asks).read())["choices"] for _ in range(2)]
        before = [metric(server, f"decode_batch_size_{name}") for name in ("count", "sum")]
        together = Barrier(6)

        def ask(_: int) -> Any:
            together.wait(PATIENCE)
            return json.loads(send(server, asks).read())["choices"]

        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(ask, range(6)))
        steps = metric(server, "decode_batch_size_count") - before[0]
        rows = metric(server, "decode_batch_size_sum") - before[1]
    assert answers == [alone[0]] * 6
    assert alone[0] == alone[1]
    said = server.log.read_text()
    if kind != "of one row":
        assert rows > 2 * steps > 0
        assert "in turns" not in said
    else:
        assert rows == steps == 0
        assert said.count("requests decode in turns, not together: segments/") == 1
        assert "takes one row, as it was built before there were batches: rebuild the bundle" in said


def test_what_was_answered_keeps_no_caches(pipeline: Pipeline) -> None:
    """Caches go when the last request or conversation of theirs does, and wait for no collector of garbage."""
    import httpx2

    from framefusion.runtime.server.app import Access, create_app
    from framefusion.runtime.server.media.policy import MediaPolicy
    from framefusion.runtime.server.media.reader import MediaReader
    from framefusion.runtime.server.service import Service, ServiceSettings

    policy = MediaPolicy()
    reader = MediaReader(policy, pipeline.manifest.preprocessing, pipeline.manifest.sampling, decoders=1)
    service = Service(pipeline, reader, ServiceSettings("tiny", cache_budget=200_000))
    app = create_app(service, Access(("127.0.0.1",), None, 1 << 20))

    async def ask(client: httpx2.AsyncClient, number: int) -> None:
        message = {"role": "user", "content": f"{number} is a number. " * 9}
        body = {"messages": [message], "max_tokens": 4, "stream": number % 2 == 0}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200

    async def run() -> int:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
            for turn in range(4):
                await asyncio.gather(*(ask(client, 8 * turn + number) for number in range(8)))
            while service.engine.running:
                await asyncio.sleep(0.01)
        return sum(type(each) is Session for each in gc.get_objects())

    gc.collect()
    before = sum(type(each) is Session for each in gc.get_objects())
    gc.disable()
    service.start()
    try:
        left = asyncio.run(run())
        kept = len(service.conversations)
        evicted = service.conversations.evicted
    finally:
        gc.enable()
        service.close()
    assert evicted > 8
    assert left - before == kept
