"""Times are the frames' own: against ffmpeg's list of them for each film, and what samplings and families make of them.

The list (tests/media/films/times.json) says with which command it was made. Films were made for this project, each for
one public report of a film that was read wrongly.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.errors import VideoError
from framefusion.runtime.families.llava import LlavaPreprocessing, time_instruction
from framefusion.runtime.families.nvila import NvilaPreprocessing
from framefusion.runtime.families.qwen3_vl import Qwen3VLPreprocessing
from framefusion.runtime.media.frame_sampling import RULES, FrameSampling, sample_indices
from framefusion.runtime.media.video.frames import Video, read_video
from framefusion.runtime.media.video.timeline import MAX_SECONDS, Timeline, ascending, disorder
from tests.runtime.media.video.test_video import write_video
from tests.tiers import in_tiers
from tests.wheel import ROOT

FILMS = ROOT / "tests" / "media" / "films"
TIMES: dict[str, list[float]] = json.loads((FILMS / "times.json").read_text())["times"]
EVERY = FrameSampling("qwen2_vl", fps=1e6, max_frames=100_000, min_frames=1, frame_factor=1)
TWO_A_SECOND = FrameSampling("qwen2_vl", fps=2.0, max_frames=768, min_frames=1, frame_factor=1)
VERSIONS = 9.9
"""Seconds of vfr_phone.mp4: for FFmpeg 7 its last frame stays for 1/60 second, for FFmpeg 8 for 0.2."""
TALL = "k4long.mp4"  # 2160p, for the test of memory


def shown(name: str, sampling: FrameSampling = EVERY) -> Video:
    return read_video(FILMS / name, sampling)


def timeline(times: list[float], *rates: float, last: float = 0.0) -> Timeline:
    ticks = np.round(np.array(times) * 1000).astype(np.int64)
    return Timeline.from_timestamps(ticks, 1e-3, rates, round(last * 1000))


@pytest.mark.parametrize("name", in_tiers(sorted(set(TIMES) - {TALL}), fast=5))
@pytest.mark.filterwarnings("ignore::framefusion.errors.MediaWarning")
def test_each_frame_has_the_time_that_ffmpeg_gives_it(name: str) -> None:
    expected = np.array(TIMES[name])
    video = shown(name)
    assert video.total_frames == len(expected)
    half = np.min(np.diff(expected)) / 2
    assert np.abs(video.times - expected[video.indices]).max() < half
    assert set(video.indices.tolist()) == set(range(len(expected)))  # so fast a sampling passes none over
    assert video.duration > expected[-1]


def test_an_animated_webp_is_a_film() -> None:
    video = read_video(FILMS.parent / "anim.webp", EVERY)
    assert (video.total_frames, video.fps, video.duration) == (4, 2.0, 2.0)
    assert video.times.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert video.frames[:, 32, 32].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize(
    ("name", "seconds", "frames"),
    [
        ("slide_concat.mkv", 30.04, 7),
        ("slide_recipe.mkv", 30.0, 6),
        ("vfr_phone.mp4", VERSIONS, 105),
        ("st.ogv", 2.48, 62),
    ],
)
def test_a_film_lasts_as_long_as_its_last_frame(name: str, seconds: float, frames: int) -> None:
    video = shown(name, TWO_A_SECOND)
    assert video.duration == pytest.approx(seconds, abs=0.1 if seconds == VERSIONS else 0.005)
    assert video.total_frames == frames


def test_each_slide_is_seen_as_often_as_it_is_shown() -> None:
    video = shown("slide_concat.mkv", TWO_A_SECOND)
    assert len(video.indices) == 60  # of 30.04 seconds
    assert np.bincount(video.indices).tolist() == [10, 10, 10, 10, 10, 9, 1]
    slides = np.array(TIMES["slide_concat.mkv"])
    assert np.array_equal(video.indices, np.searchsorted(slides, video.moments + 0.02, side="right") - 1)
    steps = np.diff(video.moments)
    assert np.abs(steps - 0.51).max() < 0.5  # as evenly spread as the frames are
    assert video.times.tolist() == slides[video.indices].tolist()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_film_of_varying_rate_is_sampled_like_the_same_one_at_a_constant_rate(rule: str) -> None:
    """What ffmpeg -r 50 makes of a film is the film: frames repeated, none moved."""
    random = np.random.default_rng(3)
    times = np.unique(np.concatenate(([0], random.integers(1, 500, 60)))) / 50  # multiples of 20 ms in 10 s
    varying = timeline(times.tolist(), 50.0, last=10 - float(times[-1]))
    repeated = np.searchsorted(times, np.arange(500) / 50 + 1e-6, side="right") - 1
    constant = timeline((np.arange(500) / 50).tolist(), 50.0)
    assert (varying.constant, constant.constant) == (False, True)
    for fps, most in ((1.0, 64), (2.0, 8), (7.0, 32)):
        for force in (False, True):
            sampling = FrameSampling(rule, fps=fps, max_frames=most, min_frames=2, frame_factor=2, force=force)
            sampled, other = varying.sample(sampling), constant.sample(sampling)
            assert sampled.indices.tolist() == repeated[other.indices].tolist()
            late = other.moments - sampled.moments
            assert np.all(late > -0.01 - 1e-9)  # told no later than half a frame after the moment
            again = np.diff(sampled.indices, prepend=-1) == 0
            assert np.abs(late[again]).max(initial=0) < 1e-9
            np.testing.assert_allclose(sampled.timestamps, times[sampled.indices], atol=1e-9)


@pytest.mark.parametrize("rate", [25.0, 30000 / 1001, 24000 / 1001, 0.2])
def test_timestamps_rounded_to_milliseconds_are_of_a_constant_rate(rate: float) -> None:
    line = timeline((np.arange(900) / rate).tolist(), rate)
    assert line.constant
    assert line.fps == rate
    assert line.duration == 900 / rate
    assert line.sample(TWO_A_SECOND).indices.tolist() == sample_indices(900, rate, TWO_A_SECOND).tolist()


def test_a_rate_that_the_container_gets_wrong_is_mended() -> None:
    line = timeline((np.arange(18_000) / 30).tolist(), 29.97)  # ten minutes: 18 frames apart at the end
    assert line.constant
    assert line.fps == pytest.approx(30, rel=1e-6)


def test_a_last_frame_that_stays_is_looked_at_while_it_stays() -> None:
    line = timeline((np.arange(50) / 25).tolist(), 25.0, last=8.0)  # two seconds, then a still for eight
    assert not line.constant
    assert line.duration == pytest.approx(9.96)
    sampled = line.sample(TWO_A_SECOND)
    assert np.count_nonzero(sampled.indices == 49) == 15  # of 19, every 0.553 seconds
    assert sampled.moments[-1] == pytest.approx(9.92)


@pytest.mark.parametrize(
    ("times", "last", "message"),
    [
        ([], 0.0, "has no frame"),
        ([0.0, 2 * MAX_SECONDS], 0.0, "lasts 2.4192e"),
        ([0.0], 2 * MAX_SECONDS, "the limit is"),
    ],
)
def test_timestamps_that_no_film_has_are_refused(times: list[float], last: float, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        timeline(times, 25.0, last=last)


def test_joined_recordings_follow_one_another() -> None:
    assert ascending([0, 10, 20, 0, 10, 20], 10).tolist() == [0, 10, 20, 30, 40, 50]
    assert ascending([None, None, 25, None], 10).tolist() == [0, 10, 25, 35]
    assert ascending([0, 10, 10, 20, 40, 30, 50], 10).tolist() == [0, 10, 11, 20, 40, 41, 50]
    assert disorder([0, 10, 5, None, 20]) == 2


@pytest.mark.parametrize("count", [2, 3, 30])
def test_b_frames_of_an_avi_stand_at_the_rate_of_its_chunks(tmp_path: Path, count: int) -> None:
    """AVI does not say when a frame is shown: FFmpeg gives those of H.264 in disorder."""
    video = read_video(write_video(tmp_path / "a.avi", count), FrameSampling("uniform", force=True))
    np.testing.assert_allclose(video.times, np.arange(count) / 10)
    assert (video.fps, video.duration) == (10, count / 10)


# ---- what families tell


def sentence_times(sentence: str) -> NDArray[np.float64]:
    times_text = sentence.split("located at ")[1].split(".Please")[0]
    return np.array([float(item.removesuffix("s")) for item in times_text.split(",")])


@pytest.mark.parametrize("name", ["vfr_phone.mp4", "slide_concat.mkv", "slide_recipe.mkv", "drop_mpeg4.avi", "n.mp4"])
@pytest.mark.parametrize("round_fps", [False, True])
def test_llava_video_is_told_the_true_times_and_length(name: str, round_fps: bool) -> None:
    video = shown(name, FrameSampling("llava", fps=1.0, max_frames=64, min_frames=1, frame_factor=1))
    sentence = time_instruction(video, round_fps)
    expected = np.array(TIMES[name])
    times_said = sentence_times(sentence)
    assert np.abs(times_said - video.moments).max() <= 0.005 + 1e-9
    ends = np.append(expected[1:], video.duration)
    half = np.min(np.diff(expected)) / 2
    assert np.all(times_said >= expected[video.indices] - half)  # the frame is on the screen at the time told
    assert np.all(times_said < ends[video.indices] + half)
    assert f"lasts for {video.duration:.2f} seconds, and {len(times_said)} frames" in sentence


def test_qwen3_vl_writes_the_true_times() -> None:
    video = shown("slide_recipe.mkv", FrameSampling("qwen3_vl", min_frames=4, frame_factor=2))
    pieces = Qwen3VLPreprocessing().video(video).pieces
    labels = [piece for piece in pieces if isinstance(piece, str) and "seconds" in piece]
    assert [piece.split("<|vision_start|>")[0] for piece in labels] == [
        "<2.5 seconds>", "<12.5 seconds>", "<22.5 seconds>",
    ]  # fmt: skip


@pytest.mark.parametrize(("fps", "frames"), [(0.1, 1), (0.3, 2), (1.5, 6)])
def test_the_remedy_of_nvila_works(fps: float, frames: int) -> None:
    """F17: with --fps 0.1 it was told to give --max-frames 2, which changed nothing."""
    rule = NvilaPreprocessing(pool_sizes=(4, 1, 1), image_size=56, patch_size=14)
    sampling = FrameSampling("nvila", fps=1.0, min_frames=1, max_frames=8, frame_factor=1, force=True)
    video = shown("n.mp4", sampling.overridden(fps, None))
    assert len(video.indices) == frames
    with pytest.raises(VideoError, match="averages 4 to one") as caught:
        rule.video(video)
    flags = str(caught.value).split("such as ")[1].split()
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    rate = float(given["--fps"]) if "--fps" in given else fps
    visual = rule.video(shown("n.mp4", sampling.overridden(rate, int(given["--max-frames"]))))
    assert visual.num_rows


# ---- samplings that nobody means


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("fps", [math.nan, math.inf, -math.inf, 1e12, 1e-300, 0.0, -1.0])
def test_an_impossible_rate_is_refused_in_a_line(rule: str, fps: float) -> None:
    sampling = FrameSampling(rule)
    with pytest.raises(VideoError, match=r"cannot be sampled at \S+ a second: give fps from"):
        replace(sampling, fps=fps)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("fps", [1e-6, 1e9])
def test_the_slowest_and_the_fastest_rate_give_frames(rule: str, fps: float) -> None:
    for force in (False, True):
        sampling = FrameSampling(rule, fps=fps, max_frames=100, force=force)
        indices = sample_indices(100, 25.0, sampling)
        assert 1 <= indices.size <= 100
        assert 0 <= indices.min() <= indices.max() < 100


def test_more_frames_than_any_model_takes_are_refused() -> None:
    with pytest.raises(VideoError, match=r"max_frames=1000000000000 is above the limit of 100000"):
        FrameSampling("nvila", max_frames=10**12, force=True)


def test_the_authors_whole_seconds_hold_for_29_97_and_not_for_12_5() -> None:
    for rate, step in ((30000 / 1001, 30), (12.5, None)):
        count = round(rate * 10)
        line = timeline((np.arange(count) / rate).tolist(), rate)
        picked = line.sample(FrameSampling("llava", fps=1.0, max_frames=64, min_frames=1, frame_factor=1))
        video = Video(
            np.zeros((len(picked.indices), 4, 4, 3), np.uint8), picked.indices, rate, count, count / rate, 0.0
        )
        times_said = sentence_times(time_instruction(video, round_fps=True))
        expected = picked.indices / (step or rate)
        assert np.abs(times_said - expected).max() <= 0.005 + 1e-9


def test_a_sampling_of_llava_keeps_its_squeezed_frames() -> None:
    """Frames shrunk as they are read are, to the bit, those shrunk afterwards."""
    rule = LlavaPreprocessing(image_size=56, patch_size=14)
    whole = shown("x.mp4", TWO_A_SECOND)
    small = read_video(FILMS / "x.mp4", TWO_A_SECOND, shrink=rule.shrink)
    assert small.frames.shape == (*whole.frames.shape[:3], 0)
    np.testing.assert_array_equal(rule.video(small).tiles[0].values, rule.video(whole).tiles[0].values)
