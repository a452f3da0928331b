"""`ff-run batch` as people run it: killed, resumed, in parts, with films that cannot be shown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError
from framefusion.runtime.pipeline import Pipeline, Request
from tests.bundles import shared
from tests.films import write_film, write_picture
from tests.patience import PATIENCE
from tests.runtime.bundle_edits import copied, of_one_row
from tests.runtime.server.conftest import START

pytestmark = pytest.mark.slow
QUESTION = "What happens?"
FILMS = 12


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    for number in range(FILMS):
        write_film(folder / f"{number:02}.mp4", seed=number, frames=8 + number)
    write_picture(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"no film" * 50)
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "ff-run"
    path.write_text(START)
    return path


def command(script: Path, source: Path, output: Path, *flags: object) -> list[str]:
    start = [sys.executable, str(script), "batch", str(shared("bundle")), str(source), "-o", str(output)]
    return [*start, "--prompt", QUESTION, "--max-new-tokens", "5", "--cost", "0.4", *map(str, flags)]


def run(script: Path, source: Path, output: Path, *flags: object) -> dict[str, Any]:
    done = subprocess.run(
        command(script, source, output, *flags, "--json"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def answers(path: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    named = {row["id"]: row for row in rows}
    assert len(named) == len(rows)
    return named


@pytest.mark.parametrize("together", [2, 5])
def test_questions_answered_together_get_what_each_gets_alone(
    films: Path, script: Path, tmp_path: Path, together: int
) -> None:
    facts = run(script, films, tmp_path / "together.jsonl", "--together", together, "--decoders", 2)
    assert (facts["answered"], facts["failed"]) == (FILMS + 1, 2)
    run(script, films, tmp_path / "alone.jsonl")
    both = [answers(tmp_path / name) for name in ("together.jsonl", "alone.jsonl")]
    for rows in both:
        for row in rows.values():
            row.pop("seconds", None)
    assert both[0] == both[1]


def test_answers_one_at_a_time_where_a_backend_knows_no_more(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from tests.commands import assert_refused
    from tests.commands import run as invoke

    (tmp_path / "pictures").mkdir()
    write_picture(tmp_path / "pictures" / "picture.png")
    output = tmp_path / "out.jsonl"
    folder = of_one_row(copied(shared("bundle"), tmp_path / "bundle"))
    refused = invoke("batch", folder, tmp_path / "pictures", "-p", "What?", "-o", output, "--together", 2)
    assert_refused(refused, BackendError, "2 questions cannot be answered together", "leave --together out")
    assert not output.exists()


def test_every_film_has_its_line_and_bad_ones_cost_no_more(films: Path, script: Path, tmp_path: Path) -> None:
    facts = run(script, films, tmp_path / "out.jsonl")
    rows = answers(tmp_path / "out.jsonl")
    assert (facts["answered"], facts["failed"], facts["skipped"]) == (FILMS + 1, 2, 0)
    for name in ("broken.mp4", "empty.mp4"):
        assert rows[name]["error"]["code"] in ("VideoError", "RequestError")
        assert str(films) not in rows[name]["error"]["message"]
    with Pipeline(shared("bundle")) as pipeline:
        for name, row in rows.items():
            if "error" not in row:
                own = pipeline.generate(QUESTION, [films / name], Request(5, cost=0.4))
                assert (row["text"], row["prompt_tokens"], row["visual_tokens"]) == (
                    own.text, own.prompt_tokens, own.visual_tokens,
                )  # fmt: skip
                assert row["kept_tokens"] <= row["visual_tokens"]
    again = run(script, films, tmp_path / "out.jsonl")
    assert (again["answered"], again["skipped"]) == (0, FILMS + 3)


def test_kills_lose_nothing_and_repeat_nothing_that_is_written(films: Path, script: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    whole = tmp_path / "whole.jsonl"
    run(script, films, whole)
    kills = 0
    for wanted in (2, 5, 9):
        process = subprocess.Popen(command(script, films, output), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < end:
            if output.exists() and output.read_bytes().count(b"\n") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        before = output.read_bytes()
        before = before[: before.rfind(b"\n") + 1]
        with output.open("ab") as file:
            file.write(b'{"id": "half')
        assert before
    run(script, films, output)
    assert output.read_bytes().startswith(before)
    timeless = [
        {name: {k: v for k, v in row.items() if k != "seconds"} for name, row in answers(path).items()}
        for path in (output, whole)
    ]
    assert timeless[0] == timeless[1]
    assert kills


def test_parts_together_are_the_whole(films: Path, script: Path, tmp_path: Path) -> None:
    names: list[str] = []
    for index in range(2):
        facts = run(script, films, tmp_path / "out.jsonl", "--shard", f"{index}/2")
        assert facts["answers"].endswith(f"out-{index}-of-2.jsonl")
        names += answers(Path(facts["answers"]))
    assert sorted(names) == sorted(path.name for path in films.iterdir())


def test_openais_batches_in_and_out(films: Path, script: Path, tmp_path: Path) -> None:
    def line(identity: str, url: str) -> str:
        parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 5, "framefusion": {"cost": 0.4}}
        return json.dumps({"custom_id": identity, "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"

    source = tmp_path / "in.jsonl"
    source.write_text(line("a", f"file://{films}/00.mp4") + line("b", "file:///etc/passwd") + line("c", "http://x.y/z"))
    run(script, source, tmp_path / "out.jsonl", "--allowed-local-media-path", films)
    rows = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    with Pipeline(shared("bundle")) as pipeline:
        own = pipeline.generate(QUESTION, [films / "00.mp4"], Request(5, cost=0.4))
    body = rows["a"]["response"]["body"]
    assert rows["a"]["error"] is None
    assert body["choices"][0]["message"]["content"] == own.text
    assert body["usage"]["prompt_tokens"] == own.prompt_tokens
    for identity in "bc":
        assert rows[identity]["response"]["status_code"] == 403
        assert rows[identity]["error"]["code"] == "RequestError"


def test_a_full_disk_ends_the_job_and_says_so(films: Path, script: Path, tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("needs bash, which limits how large a file may become")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command(script, films, tmp_path / "out.jsonl")]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 16, done.stderr
    assert "Traceback" not in done.stderr
