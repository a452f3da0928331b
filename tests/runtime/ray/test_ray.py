"""A local Ray of two workers: answers are those of one pipeline, and a killed worker costs nothing but time.

Ray is large, so the extra `dev` goes without it: `make test-ray` makes an environment of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framefusion.runtime.pipeline import Pipeline, Request
from tests.bundles import shared
from tests.films import write_film
from tests.patience import PATIENCE
from tests.wheel import ROOT

ray = pytest.importorskip("ray", reason="Ray is not installed: run `make test-ray`")
pytestmark = pytest.mark.slow
FILMS = 200
QUESTION = "What happens?"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("films")
    paths = [str(write_film(folder / f"{number:03}.mp4", seed=number, frames=8)) for number in range(FILMS - 1)]
    (folder / "broken.mp4").write_bytes(b"no film" * 20)
    return [*paths, str(folder / "broken.mp4")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield
    ray.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


class Killed:
    """Ends its own process once, in the middle of the data set."""

    def __init__(self, bundle: str, flag: str) -> None:
        from framefusion.runtime.ray import FilmAnswers

        self._answers = FilmAnswers(bundle, QUESTION, Request(5, cost=0.4), threads=1)
        self._flag = Path(flag)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if any("100.mp4" in name for name in batch["video"]) and not self._flag.exists():
            self._flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._answers(batch)


def test_200_films_and_a_worker_that_is_killed(cluster: None, films: list[str], tmp_path: Path) -> None:
    rows = ray.data.from_items([{"video": path} for path in films])
    flag = tmp_path / "killed"
    answered = rows.map_batches(
        Killed, fn_constructor_args=[str(shared("bundle")), str(flag)], batch_size=8, concurrency=2,
        max_restarts=-1, max_task_retries=-1,
    ).take_all()  # fmt: skip
    assert flag.exists()
    by_path = {row["video"]: row for row in answered}
    assert sorted(by_path) == sorted(films)
    assert len(answered) == FILMS
    assert by_path[films[-1]]["error"].startswith("VideoError: ")
    with Pipeline(shared("bundle")) as pipeline:
        for path in films[:-1]:
            alone = pipeline.generate(QUESTION, [path], Request(5, cost=0.4))
            row = by_path[path]
            assert (row["text"], row["visual_tokens"], row["error"]) == (alone.text, alone.visual_tokens, "")
            assert 0 < row["kept_tokens"] <= row["visual_tokens"]
            assert json.loads(row["seconds"])["media"] > 0


def test_the_server_as_a_deployment(cluster: None) -> None:
    from ray import serve

    from framefusion.runtime.ray import server_deployment

    application = server_deployment(str(shared("bundle")), model="tiny", threads=1, ray_actor_options={"num_cpus": 0.5})
    port = free_port()
    serve.start(http_options={"port": port})
    serve.run(application, route_prefix="/")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        answer = json.load(response)
    with Pipeline(shared("bundle")) as pipeline:
        alone = pipeline.generate("Hello", request=Request(5, temperature=0))
    assert answer["choices"][0]["message"]["content"] == alone.text
    serve.shutdown()
