"""What a film may cost is bounded, playlists reach no file, and mutated films end in frames or in a VideoError."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from framefusion.errors import VideoError
from framefusion.runtime.commands.cli import ff_run
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.container import opening
from framefusion.runtime.media.video.frames import read_video
from tests.patience import PATIENCE
from tests.wheel import ROOT
from tools.attack.films import attack

FILMS = ROOT / "tests" / "media" / "films"
SAMPLING = FrameSampling("qwen2_vl", min_frames=1, frame_factor=1)


def animation(path: Path, frames: int, side: int) -> Path:
    """A GIF of few bytes: every frame changes one pixel of a large canvas."""
    header = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    picture = b"!\xf9\4\0\1\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    path.write_bytes(header + picture * frames + b";")
    return path


def test_a_small_gif_cannot_cost_gigabytes(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif", 20_000, 5000)
    assert path.stat().st_size < 500_000
    start = time.monotonic()
    with pytest.raises(VideoError, match=r"decodes to 20000 frames of 25000000 pixels, the limit is .*--max-decoded-"):
        read_video(path, SAMPLING)
    assert time.monotonic() - start < PATIENCE  # to decode it takes a quarter of an hour


def test_ffmpeg_hears_of_a_quota_and_counts_cores_by_itself_without(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    for available in (2, 40, 64):
        monkeypatch.setattr(opening, "available_cores", lambda available=available: available)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        with opening.open_video(FILMS / "n.mp4") as container:
            threads.append(container.streams.video[0].codec_context.thread_count)
    assert threads[:2] == [2, 16]
    assert threads[2] == 0  # FFmpeg's word for as many as it finds


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"frame_pixels": 6000}, r"is 96x64, 6144 pixels a frame, the limit is 6000.*--max-frame-pixels"),
        ({"film_frames": 99}, r"has more than 99 frames, the limit.*--max-film-frames"),
        ({"film_bytes": 1000}, r"take 147456 bytes, the limit is 1000.*--max-film-bytes"),
        ({"decoded_bytes": 20_000}, r"has 6915 bytes and decodes to more, the limit is 20000.*--max-decoded-bytes"),
        ({"film_seconds": 1e-9}, r"takes longer to read than its limit.*--max-film-seconds"),
    ],
)
def test_each_limit_is_kept(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(VideoError, match=message):
        read_video(FILMS / "n.mp4", FrameSampling("qwen2_vl"), limits=MediaLimits(**limits))


@pytest.mark.parametrize("limits", [{"film_seconds": math.nan}, {"lost_share": 2.0}, {"decoded_bytes": 0}])
def test_limits_that_admit_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match=r"admits no film|is impossible"):
        MediaLimits(**limits)


def test_limits_of_an_animated_webp(tmp_path: Path) -> None:
    first, *rest = [Image.new("RGB", (64, 64), (40 * n, 0, 0)) for n in range(5)]
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=100, lossless=True)
    for limits, message in (
        ({"frame_pixels": 4000}, "4096 pixels a frame"),
        ({"film_frames": 4}, "has 5 frames"),
        ({"decoded_bytes": 10_000}, "decodes to 5 frames"),
    ):
        with pytest.raises(VideoError, match=message):
            read_video(tmp_path / "a.webp", SAMPLING, limits=MediaLimits(**limits))


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{film}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{film}'\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static'><Period>"
        "<BaseURL>{film}</BaseURL></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
        "[playlist]\nFile1={film}\n",
    ],
)
@pytest.mark.parametrize("suffix", ["m3u8", "ffconcat", "mpd", "mp4", "sdp"])
def test_a_playlist_reaches_no_film(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(text.format(film=(FILMS / "x.mp4").resolve()))
    with pytest.raises(VideoError, match="is damaged or no video"):
        read_video(path, SAMPLING)


def test_numbered_pictures_are_no_film(tmp_path: Path) -> None:
    for name in ("a1.png", "a2.png", "a%d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(VideoError, match=r"is an image \(png\)"):
        read_video(tmp_path / "a%d.png", SAMPLING)


def test_mutated_films_end_in_frames_or_an_error() -> None:
    """`python -m tools.attack.films` does thousands."""
    facts = attack(trials=40, seed=5)
    assert facts["failed"] == []
    assert facts["read"] > 5
    assert facts["refused"] > 5


@pytest.mark.slow
def test_minutes_of_2160p_take_no_more_memory_than_one_frame_needs() -> None:
    """F12: 480 sampled frames of 3840x2160 took 12 GB; now decoder, one frame, and 480 of 112x112."""
    code = (
        "import sys; from framefusion.runtime.media.video.frames import read_video\n"
        "from framefusion.runtime.media.frame_sampling import FrameSampling\n"
        "from framefusion.runtime.families.llava import LlavaPreprocessing\n"
        "rule = LlavaPreprocessing(image_size=112, patch_size=14)\n"
        "video = read_video(sys.argv[1], FrameSampling('qwen2_vl', fps=0.5), shrink=rule.shrink)\n"
        "(peak,) = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(*video.shrunk[0].shape, peak)"  # ru_maxrss would begin at what the parent has
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(FILMS / "k4long.mp4")], capture_output=True, text=True, check=True
    )
    *shape, peak = map(int, done.stdout.split())
    assert shape == [120, 112, 112, 3]
    assert peak / 1024 < 800  # MB; measured 260, of any number of frames; 120 frames as they are would be 2,986


def test_the_rate_of_the_command_line_is_refused_in_one_line(bundle: Path) -> None:
    for fps in ("nan", "inf", "1e12"):
        arguments = ["generate", str(bundle), "--video", str(FILMS / "n.mp4"), "--prompt", "What?", "--fps", fps]
        done = CliRunner().invoke(ff_run, arguments)
        assert done.exit_code == VideoError.exit_code
        assert done.output.count("\n") == 1
        assert "give fps from 1e-06 to 1e+09" in done.output


def test_the_commands_tell_of_damage_in_json_and_on_stderr(bundle: Path) -> None:
    film = str(FILMS / "bad_n.mp4")
    arguments = ["generate", str(bundle), "--video", film, "--prompt", "What?", "--max-new-tokens", "1", "--json"]
    done = CliRunner().invoke(ff_run, [*arguments, "--max-frames", "4"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["videos"][0] | {"fps": 25.0} == {
        "duration": 4.0, "fps": 25.0, "frames": 90, "sampled_frames": 4, "lost_frames": 10,
    }  # fmt: skip
    assert "10 of 100 frames are lost" in done.stderr
    assert "10 of 100 frames are lost" in facts["warnings"][0]
    refused = CliRunner().invoke(ff_run, [*arguments, "--max-lost-share", "0.05"])
    assert refused.exit_code == VideoError.exit_code
    assert np.isfinite(facts["seconds"]["video"])
