"""Files of a bundle of unknown origin, and hashes that are believed only while the very files stand."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framefusion.errors import BundleError
from framefusion.runtime.bundle import Bundle, file_record
from framefusion.runtime.format import bundle_files
from framefusion.runtime.format.bundle_files import VERIFIED, place, sha256_of, verify_files
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.machine.user_cache import read_private, user_cache, write_private
from framefusion.storage.records import name_problem
from tests.commands import assert_refused, run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache(VERIFIED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two files that have not changed for a while."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


def listed(folder: Path) -> dict[str, FileRecord]:
    return {path.name: file_record(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes are read."""
    names: list[str] = []

    def count(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(bundle_files, "sha256_of", count)
    monkeypatch.setattr(bundle_files, "_STABLE_AFTER", 0)
    return names


def test_hashes_are_computed_once_and_kept_outside_the_bundle(folder: Path, cache: Path, hashed: list[str]) -> None:
    files = listed(folder)
    verify_files(folder, files)
    assert hashed == ["a.bin", "b.bin"]
    verify_files(folder, files)
    assert hashed == ["a.bin", "b.bin"]
    verify_files(folder, files, trust_stamps=False)
    assert hashed == ["a.bin", "b.bin"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "b.bin"]
    (memo,) = cache.iterdir()
    assert memo.stat().st_mode & 0o077 == 0


def flip(path: Path) -> None:
    """One bit, in place, with the times as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_in_a_copy(path: Path) -> None:
    """The same by another file that takes the name."""
    shutil.copy2(path, path.with_name("copy"))
    flip(path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


@pytest.mark.usefixtures("cache", "hashed")
@pytest.mark.parametrize("damage", [flip, flip_in_a_copy])
def test_damage_that_keeps_size_and_times_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    files = listed(folder)
    verify_files(folder, files)
    time.sleep(0.02)  # a tick of the file system's clock
    damage(folder / "b.bin")
    with pytest.raises(BundleError, match=r"b\.bin is altered: its sha256"):
        verify_files(folder, files)


@pytest.mark.usefixtures("cache")
def test_a_copy_with_all_its_times_is_hashed_anew(folder: Path, tmp_path: Path, hashed: list[str]) -> None:
    files = listed(folder)
    verify_files(folder, files)
    moved = tmp_path / "gone"
    folder.rename(moved)
    shutil.copytree(moved, folder)  # the same name, the same times: other files
    verify_files(folder, files)
    assert hashed == ["a.bin", "b.bin"] * 2


def test_stamps_that_a_bundle_brings_count_for_nothing(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle, other)
    weights = other / "segments/rest/weights.bin"
    flip(weights)
    stamp = weights.stat().st_mtime_ns
    record = Bundle(bundle).manifest.files["segments/rest/weights.bin"]
    (other / ".verified.json").write_text(f'{{"segments/rest/weights.bin": [{stamp}, "{record.sha256}"]}}')
    assert_refused(run("generate", other, "--prompt", "What?"), BundleError, "weights.bin is altered")


@pytest.mark.usefixtures("cache")
def test_a_file_that_just_changed_is_not_remembered(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within one tick of the clock that stamps it."""
    monkeypatch.setattr(bundle_files, "_STABLE_AFTER", 10**18)  # however long this test takes
    verify_files(folder, listed(folder))
    assert not cache.exists()


def test_the_memory_of_hashes_is_believed_only_where_nobody_else_can_write_it(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "memo"
    assert read_private(path, 10) is None
    assert write_private(path, b"mine")
    assert read_private(path, 10) == b"mine"
    assert read_private(path, 3) is None
    path.chmod(0o666)
    assert read_private(path, 10) is None
    (tmp_path / "link").symlink_to(path)
    assert read_private(tmp_path / "link", 10) is None
    assert not write_private(path / "below", b"a file is no folder")
    for index in range(5):
        write_private(tmp_path / "many" / str(index), b"", most_files=3)
    assert len(list((tmp_path / "many").iterdir())) == 3


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../a", "a/../../b", "a//b", "./a", "a\\b", "c:a", "a\x1b", "a/" * 600]
)
def test_names_that_no_manifest_may_hold(tmp_path: Path, name: str) -> None:
    assert name_problem(name) is not None
    with pytest.raises(BundleError, match="names the file"):
        place(tmp_path, name)


def test_links_may_stay_within_the_folder_and_not_leave_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "inner").symlink_to("a.bin")
    assert place(folder, "inner") == folder / "inner"
    (folder / "outer").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    for name in ("outer", "up/secret"):
        with pytest.raises(BundleError, match="outside the bundle"):
            place(folder, name)
    (tmp_path / "other-name").symlink_to(folder)
    assert place(tmp_path / "other-name", "a.bin").is_file()  # what the user himself calls the bundle


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_regular_file_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "odd")
    with pytest.raises(BundleError, match="no regular file"):
        verify_files(folder, {"odd": FileRecord(0, "0" * 64)})
