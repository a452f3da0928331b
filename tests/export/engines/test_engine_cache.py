"""The engine cache: what hits, what misses and why, and that neither two processes nor a killed one can spoil it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import StorageError
from framefusion.export.engines.cache import EngineCache, key_of
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest import FileRecord
from tests.patience import PATIENCE

COMPONENTS: Mapping[str, Any] = {"graph": "a" * 64, "version": "1.7.0", "targets": ["8.6", "8.9"], "dtype": "float16"}
LIMIT = 10**9


def writer(content: bytes, calls: list[Path] | None = None) -> Callable[[Path], tuple[Mapping[str, Any], None]]:
    """A compilation of known bytes."""

    def write(target: Path) -> tuple[Mapping[str, Any], None]:
        if calls is not None:
            calls.append(target)
        target.write_bytes(content)
        return {"seconds": 1.5}, None

    return write


def never(_: Path) -> tuple[Mapping[str, Any], None]:
    raise AssertionError("the cache has it")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache", LIMIT)


def test_what_was_compiled_once_is_not_compiled_again(cache: EngineCache, tmp_path: Path) -> None:
    first = cache.fetch(COMPONENTS, tmp_path / "a/one.engine", writer(b"engine"))
    again = cache.fetch(
        {name: COMPONENTS[name] for name in reversed(list(COMPONENTS))}, tmp_path / "b/two.engine", never
    )
    assert (first.hit, again.hit, again.reason) == (False, True, "hit")
    assert first.reason == "miss: nothing like it was compiled before"
    assert again.entry == first.entry
    assert again.entry.facts == {"seconds": 1.5}
    assert again.entry.file == FileRecord(6, sha256_of(tmp_path / "a/one.engine"))
    assert (tmp_path / "b/two.engine").read_bytes() == b"engine"
    assert cache.find(COMPONENTS) == first.entry


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "1.7.1"}, "miss: version 1.7.0 -> 1.7.1"),
        ({"targets": ["12.0"]}, "miss: targets 8.6,8.9 -> 12.0"),
        ({"graph": "b" * 64, "dtype": "bfloat16"}, "miss: graph aaaaaaaa... -> bbbbbbbb..., dtype float16 -> bfloat16"),
        (dict.fromkeys(COMPONENTS, "other"), "miss: nothing like it was compiled before"),
    ],
)
def test_a_miss_says_what_differs_from_the_nearest(
    cache: EngineCache, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    cache.fetch(COMPONENTS, tmp_path / "one", writer(b"engine"))
    far = {name: f"far {name}" for name in COMPONENTS}
    cache.fetch(far, tmp_path / "far", writer(b"far"))
    fetched = cache.fetch({**COMPONENTS, **changes}, tmp_path / "two", writer(b"another"))
    assert (fetched.hit, fetched.reason) == (False, reason)
    assert (tmp_path / "two").read_bytes() == b"another"


def test_its_own_past_is_nearer_than_another_engine(cache: EngineCache, tmp_path: Path) -> None:
    """The first component says what it is an engine of."""
    cache.fetch({**COMPONENTS, "version": "1.6", "dtype": "bfloat16"}, tmp_path / "own", writer(b"own"))
    cache.fetch({**COMPONENTS, "graph": "b" * 64}, tmp_path / "other", writer(b"other"))
    reason = cache.fetch(COMPONENTS, tmp_path / "new", writer(b"new")).reason
    assert reason == "miss: version 1.6 -> 1.7.0, dtype bfloat16 -> float16"


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_component_is_in_the_key(name: str) -> None:
    assert key_of({**COMPONENTS, name: "other"}) != key_of(COMPONENTS)
    assert key_of({other: value for other, value in COMPONENTS.items() if other != name}) != key_of(COMPONENTS)


@pytest.mark.parametrize(
    ("damaged", "reason"), [(b"eng", "its file is gone or truncated"), (b"enginf", "the cached file is altered")]
)
def test_a_damaged_engine_is_compiled_again(cache: EngineCache, tmp_path: Path, damaged: bytes, reason: str) -> None:
    entry = cache.fetch(COMPONENTS, tmp_path / "one", writer(b"engine")).entry
    stored = cache.folder / "objects" / entry.file.sha256
    stored.unlink()  # a link to what the bundle has
    stored.write_bytes(damaged)
    fetched = cache.fetch(COMPONENTS, tmp_path / "two", writer(b"engine"))
    assert (fetched.hit, fetched.reason) == (False, f"miss: {reason}")
    assert (tmp_path / "two").read_bytes() == b"engine"
    assert cache.fetch(COMPONENTS, tmp_path / "three", never).hit


def test_an_entry_that_is_not_readable_is_as_good_as_none(cache: EngineCache, tmp_path: Path) -> None:
    entry = cache.fetch(COMPONENTS, tmp_path / "one", writer(b"engine")).entry
    (cache.folder / "entries" / f"{entry.key}.json").write_text('{"key": ')
    assert not cache.fetch(COMPONENTS, tmp_path / "two", writer(b"engine")).hit


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    first = EngineCache(tmp_path / "cache", limit=250)
    for name in "abc":
        first.fetch({"graph": name}, tmp_path / name, writer(name.encode() * 100))
    keys = {name: key_of({"graph": name}) for name in "abc"}
    for age, name in enumerate("cab"):  # c is the oldest, b the newest
        os.utime(first.folder / "entries" / f"{keys[name]}.json", (age, age))
    assert first.trim() == 300  # a job's own engines stay, whatever the limit
    later = EngineCache(tmp_path / "cache", limit=250)
    later.fetch({"graph": "a"}, tmp_path / "a2", never)
    assert later.trim() == 200
    assert [name for name in "abc" if later.find({"graph": name})] == ["a", "b"]
    assert len(list((later.folder / "objects").iterdir())) == 2
    assert (tmp_path / "c").read_bytes() == b"c" * 100  # a bundle keeps what it was given


def test_engines_of_equal_content_are_stored_once(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "cache", limit=150)
    for name in "ab":
        cache.fetch({"graph": name}, tmp_path / name, writer(b"x" * 100))
    assert len(list((cache.folder / "objects").iterdir())) == 1
    later = EngineCache(tmp_path / "cache", limit=150)
    later.fetch({"graph": "b"}, tmp_path / "b2", never)
    later.trim()
    assert later.fetch({"graph": "b"}, tmp_path / "b3", never).hit  # evicting a's entry left b's engine


def test_a_full_disk_leaves_no_entry(cache: EngineCache, tmp_path: Path) -> None:
    def full(target: Path) -> tuple[Mapping[str, Any], None]:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"No space left on device.*make room"):
        cache.fetch(COMPONENTS, tmp_path / "one", full)
    assert not (tmp_path / "one").exists()
    assert cache.find(COMPONENTS) is None
    assert not list((cache.folder / "building").glob("*.new*"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be written.*--engine-cache"):
        EngineCache(tmp_path / "file" / "cache", LIMIT)


def test_measurements_are_shared_and_never_shrink(cache: EngineCache) -> None:
    assert cache.timing_cache("tensorrt-10.13-8.6") is None
    for content in (b"two", b"three", b"one"):
        cache.keep_timing_cache("tensorrt-10.13-8.6", content)
    assert cache.timing_cache("tensorrt-10.13-8.6") == b"three"
    assert cache.timing_cache("tensorrt-10.13-8.9") is None


# --- Several processes ------------------------------------------------------------------------------------------------

PROCESS = """
    import sys, time
    from pathlib import Path
    from framefusion.export.engines.cache import EngineCache

    folder, target, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

    def compile_engine(path):
        with path.open("wb") as file:
            file.write(b"half ")
            file.flush()
            with (folder / "log").open("a") as log:
                log.write("compiled\\n")
            time.sleep(seconds)
            file.write(b"whole")
        return {}, None

    told = EngineCache(folder / "cache", 10**9).fetch({"graph": "a"}, target, compile_engine)
    print(told.reason)
"""


def start(folder: Path, target: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(folder), str(folder / target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def compiled(folder: Path) -> int:
    """How often the engine was begun."""
    log = folder / "log"
    return log.read_text().count("compiled") if log.exists() else 0


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_compile_one_engine_once(tmp_path: Path) -> None:
    both = [start(tmp_path, name, 0.3) for name in ("one", "two")]
    reason = sorted(process.communicate(timeout=PATIENCE)[0].strip() for process in both)
    assert reason == ["hit", "miss: nothing like it was compiled before"]
    assert compiled(tmp_path) == 1
    assert {(tmp_path / name).read_bytes() for name in ("one", "two")} == {b"half whole"}


def test_a_killed_process_leaves_nothing_that_the_next_would_take(tmp_path: Path) -> None:
    first = start(tmp_path, "one", 600)
    wait_for(lambda: compiled(tmp_path) == 1)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=PATIENCE)
    left = list((tmp_path / "cache" / "building").glob("*.new"))
    assert [path.read_bytes() for path in left] == [b"half "]
    second = start(tmp_path, "two", 0)
    assert second.communicate(timeout=PATIENCE)[0].startswith("miss")
    assert (tmp_path / "two").read_bytes() == b"half whole"
    assert not (tmp_path / "one").exists()
    assert not list((tmp_path / "cache" / "building").glob("*.new"))
