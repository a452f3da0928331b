"""Checkpoints by id: from a filled cache without network, from a server that answers like the hub; and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from framefusion import errors
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.origin.hub import origin_of, resolve
from tests.commands import assert_refused, export
from tests.patience import PATIENCE

REPO, COMMIT = "Tiny/Video-1B", "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"


def fill_cache(cache: Path, files: Path, repo: str = REPO, leave_out: str = "") -> Path:
    """The folder `files` as huggingface_hub keeps it: blobs by hash, links to them for each commit, refs to commits."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / COMMIT
    for folder in (storage / "blobs", storage / "refs", snapshot):
        folder.mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    for path in sorted(files.iterdir()):
        if path.name != leave_out:
            blob = storage / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def sharded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in two shards, with files beside it that nobody wants."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("sharded") / "tiny"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), dict[str, str]()
    for part, keys in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{part:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for unwanted in ("pytorch_model.bin", "modeling_tiny.py"):
        (folder / unwanted).write_text("never downloaded")
    return folder


# --- Without network --------------------------------------------------------------------------------------------------


def test_an_id_is_found_in_the_cache(cache: Path, sharded: Path) -> None:
    snapshot = fill_cache(cache, sharded)
    origin = resolve(REPO)
    assert origin == resolve(REPO, "main")
    assert (origin.folder, origin.name, origin.on_hub) == (snapshot, REPO, True)
    assert (origin.revision, origin.commit) == ("main", COMMIT)
    by_id, by_folder = Checkpoint.named(REPO), Checkpoint(sharded)
    assert by_id.config == by_folder.config
    assert set(by_id.files) == set(by_folder.files)
    assert all(by_id.shape(key) == by_folder.shape(key) for key in by_id.files)


def test_a_folder_of_the_cache_knows_its_id(cache: Path, sharded: Path) -> None:
    origin = origin_of(fill_cache(cache, sharded))
    assert (origin.name, origin.on_hub, origin.commit) == (REPO, True, COMMIT)


def test_a_folder_wins_over_an_id(cache: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_cache(cache, sharded)
    shutil.copytree(sharded, tmp_path / REPO)
    monkeypatch.chdir(tmp_path)
    origin = resolve(REPO)
    assert (origin.folder, origin.on_hub, origin.name) == (Path(REPO), False, Path(REPO).name)


def test_a_revision_is_a_ref_or_a_commit(cache: Path, sharded: Path) -> None:
    fill_cache(cache, sharded)
    assert resolve(REPO, COMMIT).commit == COMMIT
    with pytest.raises(errors.CheckpointError, match=f"{REPO} at v2.*HF_HUB_OFFLINE is set: unset it"):
        resolve(REPO, "v2")
    with pytest.raises(errors.CheckpointError, match="--revision v2 belongs to an id on the hub"):
        resolve(sharded, "v2")


def test_a_cache_that_misses_a_shard(cache: Path, sharded: Path) -> None:
    fill_cache(cache, sharded, leave_out="model-00002-of-00002.safetensors")
    with pytest.raises(errors.CheckpointError, match=f"{REPO} at main: .*model-00002-of-00002.*hf download {REPO}"):
        resolve(REPO)


@pytest.mark.parametrize(
    ("name", "phrases"),
    [
        ("/no/such/folder", ("no checkpoint folder at /no/such/folder", "ORGANISATION/MODEL")),
        ("./tiny", ("no checkpoint folder at ./tiny", "ORGANISATION/MODEL")),
        ("tiny", ("no checkpoint folder at tiny", "ORGANISATION/MODEL")),
        ("Tiny/Video--1B", ("no checkpoint folder at Tiny/Video--1B", "Cannot have -- or ..")),
        ("Tiny/Vid eo", ("no checkpoint folder at Tiny/Vid eo", "alphanumeric")),
        ("Tiny/Absent", ("Tiny/Absent at main", "HF_HUB_OFFLINE is set: unset it")),
    ],
)
@pytest.mark.usefixtures("cache")
def test_names_that_lead_nowhere(name: str, phrases: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    """Each command that takes a checkpoint refuses it alike, and writes nothing."""
    for command in (("build", name, "-o", tmp_path / "out"), ("check", bundle, "--checkpoint", name)):
        assert_refused(export(*command), errors.CheckpointError, *phrases)
    assert not any(tmp_path.glob("out*"))


# --- Against a server -------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a download uses; answers by the name of the repository."""

    files: Path
    paths: list[str]
    refusals = {  # noqa: RUF012
        "Tiny/Gated": (403, "GatedRepo"),
        "Tiny/Locked": (401, "GatedRepo"),
        "Tiny/Absent": (404, "RepoNotFound"),
        "Tiny/Private": (401, "RepoNotFound"),
        "Tiny/Broken": (500, ""),
    }

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        rest = path.partition(repo)[2]
        self.paths.append(path)
        if repo in self.refusals:
            self.answer(*self.refusals[repo])
        elif rest == "/revision/main":
            self.answer(200, body={"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": [], "tags": []})
        elif rest.startswith("/revision/"):
            self.answer(404, "RevisionNotFound")
        elif rest.startswith("/tree/"):
            self.answer(200, body=[self.entry(path) for path in sorted(self.files.iterdir())])
        else:
            content = (self.files / Path(rest).name).read_bytes()
            self.answer(200, content=content, etag=hashlib.sha256(content).hexdigest())

    @staticmethod
    def entry(path: Path) -> dict[str, Any]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}

    def answer(self, status: int, error: str = "", body: Any = None, content: bytes = b"", etag: str = "") -> None:
        content = content if body is None else json.dumps(body).encode()
        self.send_response(status)
        given = {"X-Error-Code": error, "ETag": f'"{etag}"' if etag else "", "X-Repo-Commit": COMMIT if etag else ""}
        for name, value in given.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(sharded: Path) -> Iterator[str]:
    Hub.files, Hub.paths = sharded, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def resolved(names: list[tuple[str, str | None]], home: Path, **settings: str) -> list[list[str]]:
    """[kind, text] for each name and revision, in a process of its own: huggingface_hub reads its settings once."""
    code = f"""
import json
from framefusion.errors import FrameFusionError
from framefusion.export.checkpoints.origin.hub import resolve
told = []
for name, revision in {names!r}:
    try:
        told.append(["found", str(resolve(name, revision).folder)])
    except FrameFusionError as error:
        told.append([type(error).__name__, str(error)])
print(json.dumps(told))
"""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | {"HF_HOME": str(home)} | settings, capture_output=True, text=True,
        timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.mark.slow
def test_a_download_takes_what_is_needed_and_no_more(hub: str, sharded: Path, tmp_path: Path) -> None:
    (first,) = resolved([(REPO, None)], tmp_path, HF_ENDPOINT=hub)
    assert first[0] == "found", first
    wanted = {path.name for path in sharded.iterdir()} - {"pytorch_model.bin", "modeling_tiny.py"}
    assert {path.name for path in Path(first[1]).iterdir()} == wanted
    assert all((Path(first[1]) / name).read_bytes() == (sharded / name).read_bytes() for name in wanted)
    assert not any(path.endswith((".bin", ".py")) for path in Hub.paths)
    assert resolved([(REPO, None)], tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1") == [first]  # from the cache now
    (Path(first[1]) / "model-00001-of-00002.safetensors").unlink()
    ((kind, text),) = resolved([(REPO, None)], tmp_path, HF_HUB_OFFLINE="1")
    assert kind == "CheckpointError"
    assert REPO in text
    assert "unset" in text


@pytest.mark.slow
def test_what_the_hub_refuses(hub: str, tmp_path: Path) -> None:
    login = "hf auth login or set HF_TOKEN"
    expected = {
        ("Tiny/Gated", None): ("is gated", f"{hub}/Tiny/Gated", login),
        ("Tiny/Locked", None): ("is gated", login),
        ("Tiny/Absent", None): ("neither a folder here nor a model", "check the name"),
        ("Tiny/Private", None): ("neither a folder here nor a model", "if it is private", login),
        ("Tiny/Broken", None): ("500", "check the connection"),
        (REPO, "v9"): ("has no revision v9", "leave --revision out"),
    }
    outcomes = resolved(list(expected), tmp_path, HF_ENDPOINT=hub)
    for (kind, text), ((name, _), phrases) in zip(outcomes, expected.items(), strict=True):
        assert kind == "CheckpointError"
        assert text.startswith(name)
        assert all(phrase in text for phrase in phrases), text
        assert "\n" not in text
    ((kind, text),) = resolved([(REPO, None)], tmp_path / "other", HF_ENDPOINT="http://127.0.0.1:1")
    assert kind == "CheckpointError"
    assert "gave no answer" in text
    assert "check the connection" in text


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(hub: str, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    ((kind, text),) = resolved([(REPO, None)], tmp_path / "home", HF_ENDPOINT=hub)
    assert kind == "StorageError", text
    assert "set HF_HOME" in text
