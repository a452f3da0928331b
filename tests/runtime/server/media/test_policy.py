from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from framefusion.errors import RequestError, ServerError
from framefusion.runtime.server.media.policy import MediaFile, MediaPolicy, open_media, read_domains


def opened(url: str, folder: Path, policy: MediaPolicy) -> MediaFile:
    return open_media(url, "the film", folder, policy, lambda: False)


def as_data(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_equal_content_has_one_digest(tmp_path: Path) -> None:
    first = opened(as_data(b"film"), tmp_path, MediaPolicy())
    second = opened(as_data(b"film", "video/webm;codecs=vp9"), tmp_path, MediaPolicy())
    assert first.path.read_bytes() == b"film"
    assert first.digest == second.digest != opened(as_data(b"other"), tmp_path, MediaPolicy()).digest


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:video/mp4,plain", 400),
        ("data:video/mp4;base64,****", 400),
        ("data:video/mp4;base64,", 400),
        ("data:;base64,A", 400),
        (as_data(b"x" * 101), 413),
        ("file:///etc/passwd", 403),
        ("https://films.example/x", 403),
        ("http://127.0.0.1/x", 403),
        ("clip.mp4", 400),
        ("/etc/passwd", 400),
        ("concat:/etc/passwd", 400),
        ("rtsp://camera/", 400),
        ("", 400),
    ],
)
def test_closed_by_default(url: str, status: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        opened(url, tmp_path, MediaPolicy(file_bytes=100))
    assert refused.value.status == status
    assert list(tmp_path.iterdir()) == []


def test_the_limit_itself_is_taken(tmp_path: Path) -> None:
    assert opened(as_data(b"x" * 100), tmp_path, MediaPolicy(file_bytes=100)).path.stat().st_size == 100


@pytest.mark.parametrize("size", [1, 100, 5 << 20])
def test_a_body_has_room_for_the_largest_film(size: int) -> None:
    assert len(as_data(b"x" * size)) < MediaPolicy(file_bytes=size).body_bytes


def test_domains_of_a_flag() -> None:
    assert read_domains("Films.example, b.example,,") == {"films.example", "b.example"}
    assert read_domains("") == frozenset()


def test_files_below_the_folder_alone(tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    (films / "a film.mp4").write_bytes(b"film")
    (films / "link.mp4").symlink_to("a film.mp4")
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(b"secret")
    (films / "out.mp4").symlink_to(secret)
    (tmp_path / "films-too").mkdir()
    (tmp_path / "films-too" / "x.mp4").write_bytes(b"x")
    policy = MediaPolicy(local_folder=films)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    film = opened(f"file://{films}/a%20film.mp4", scratch, policy)
    assert film.path == films / "a film.mp4"
    assert opened(f"file://localhost{films}/link.mp4", scratch, policy).digest == film.digest
    for name in (
        f"{films}/../secret.mp4", f"{films}/%2e%2e/secret.mp4", f"{films}/out.mp4", str(secret), str(films),
        f"{tmp_path}/films-too/x.mp4", f"{films}/none.mp4", "/proc/self/environ", f"{films}/a%00",
    ):  # fmt: skip
        with pytest.raises(RequestError):
            opened(f"file://{name}", scratch, policy)
    with pytest.raises(RequestError):
        opened(f"file://elsewhere{films}/a%20film.mp4", scratch, policy)


def test_settings_that_open_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="is none"):
        MediaPolicy(local_folder=tmp_path / "nowhere")
    with pytest.raises(ServerError, match="is none"):
        MediaPolicy(domains=frozenset({"https://films.example"}))


@pytest.mark.parametrize("url", ["file://[/x", "file:///\ud800", "file://\u2100/x", "file:///a%00"])
def test_addresses_of_files_that_no_parser_takes(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        opened(url, tmp_path, MediaPolicy(local_folder=tmp_path))
    assert refused.value.status in (400, 403)


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.mp4")
    try:
        path.write_bytes(b"film")
    except OSError:
        pytest.skip("this file system has no such names")
    assert opened(path.as_uri(), tmp_path, MediaPolicy(local_folder=tmp_path)).path == path
