"""A server's requests in one step of the engine, or in turns where the graphs have one row."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.bundles import shared
from tests.runtime.server.conftest import serving
from tests.runtime.server.test_ends import LONG, metric, send

pytest.importorskip("starlette")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dialect", ["gqa", "portable"])
def test_requests_are_decoded_together_or_in_turns_which_is_said_once(tmp_path: Path, dialect: str) -> None:
    """A step has all requests that run, and whoever asks for a batch where there is none learns what brings one."""
    bundle = shared("bundle" if dialect == "gqa" else "portable-512")
    asks = {**LONG, "stream": False, "max_tokens": 100, "temperature": 0}
    with serving(tmp_path, bundle=bundle) as server:
        alone = [json.loads(send(server, asks).read())["choices"] for _ in range(2)]
        with ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda _: json.loads(send(server, asks).read())["choices"], range(6)))
        steps = metric(server, "decode_batch_size_count")
        rows = metric(server, "decode_batch_size_sum")
    assert answers == [alone[0]] * 6
    assert alone[0] == alone[1]
    said = server.log.read_text()
    if dialect == "gqa":
        assert rows > 2 * steps > 0
        assert "in turns" not in said
    else:
        assert rows == steps == 0
        assert said.count("requests decode in turns, not together: graphs of the dialect portable take one row") == 1
