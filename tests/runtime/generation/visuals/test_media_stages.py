"""Several films in one request: the next one is decoded while the tower has one, and nothing else is different."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError, FrameFusionError, PromptError, VideoError
from framefusion.runtime.backends.host import HostBackend
from framefusion.runtime.generation import embedder
from framefusion.runtime.generation.visuals.media_stages import leaves_cores_free
from framefusion.runtime.machine.cpu import available_cores
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import Source, as_video
from framefusion.runtime.media.video.container.opening import ended_by
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.media.visual_input import VisualInput
from framefusion.runtime.pipeline import Generation, Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film
from tests.patience import PATIENCE

TURN = Turn("user", (Visual.VIDEO, "One.", Visual.IMAGE, "Two.", Visual.VIDEO, "What differs?"))
FILMS = Turn("user", (Visual.VIDEO, Visual.VIDEO, "What differs?"))
FEW = Request(4)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("framefusion-film")]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of another size and length."""
    return write_film(tmp_path_factory.mktemp("other") / "other.mp4", frames=24, size=96, seed=5)


@pytest.fixture
def overlapping(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(pipeline, "overlaps", True)
    return pipeline


def in_both_ways(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    for overlaps in (False, True):
        monkeypatch.setattr(pipeline, "overlaps", overlaps)
        yield overlaps


def test_rows_and_answers_are_the_same_to_the_bit(
    pipeline: Pipeline, film: Path, picture: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    answers: list[Generation] = []
    for _ in in_both_ways(pipeline, monkeypatch):
        rows.append(np.asarray(pipeline.read([TURN], [film, picture, other])[1].hidden).copy())
        answers.append(pipeline.generate([TURN], [film, picture, other], FEW))
    np.testing.assert_array_equal(rows[0], rows[1])
    (apart, ahead) = answers
    assert (apart.token_ids, apart.kv_lengths, apart.videos) == (ahead.token_ids, ahead.kv_lengths, ahead.videos)
    assert apart.shown is not None
    assert ahead.shown is not None
    drawn = [[(one.content, one.name) for one in answer.shown.thumbnails.shown] for answer in answers if answer.shown]
    assert drawn[0] == drawn[1]
    assert list(apart.seconds) == list(ahead.seconds)


def test_read_media_is_decode_media_and_preprocess(overlapping: Pipeline, film: Path, picture: Path) -> None:
    sampling = overlapping.manifest.sampling
    read = overlapping.read_media([TURN], [film, picture, film], sampling, Stopwatch())
    whole = overlapping.read_visuals([TURN], [film, picture, film], sampling, Stopwatch())
    assert [rows is None for rows in read.rows] == [False, False, True]
    rows = overlapping.encode_rest(read.visuals, read.rows)
    for visual, had, kept in zip(whole, rows, read.visuals, strict=True):
        np.testing.assert_array_equal(overlapping.encode_visual(visual), had)
        assert kept.num_rows == visual.num_rows
    assert [bool(visual.tiles) for visual in read.visuals] == [False, False, True]


class Waiting(io.BytesIO):
    """A file that says when it is first read."""

    def __init__(self, content: bytes, begun: threading.Event) -> None:
        super().__init__(content)
        self._begun = begun

    def read(self, *size: Any) -> bytes:
        self._begun.set()
        return super().read(*size)


def test_the_next_film_is_read_while_the_tower_has_one(
    overlapping: Pipeline, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()
    waited: list[bool] = []
    encode = overlapping.encode_visual

    def encode_visual(visual: VisualInput) -> Any:
        waited.append(begun.wait(PATIENCE))
        return encode(visual)

    monkeypatch.setattr(overlapping, "encode_visual", encode_visual)
    overlapping.read([FILMS], [film, Waiting(film.read_bytes(), begun)])
    assert waited == [True, True]


def test_one_film_is_refused_before_the_tower(overlapping: Pipeline, film: Path) -> None:
    stopwatch = Stopwatch()
    read = overlapping.read_media([Turn("user", [Visual.VIDEO])], [film], overlapping.manifest.sampling, stopwatch)
    assert read.rows == (None,)
    assert "vision" not in stopwatch.seconds


@pytest.mark.slow
def test_what_is_too_long_spares_the_tower(overlapping: Pipeline, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = overlapping.manifest.limits.max_input_len
    rows = overlapping.read_visuals([Turn("user", [Visual.VIDEO])], [film], overlapping.manifest.sampling, Stopwatch())[
        0
    ].num_rows
    count = most // rows + 3
    calls: list[VisualInput] = []
    encode = overlapping.encode_visual

    def encode_visual(visual: VisualInput) -> Any:
        calls.append(visual)
        return encode(visual)

    monkeypatch.setattr(overlapping, "encode_visual", encode_visual)
    with pytest.raises(PromptError, match="sample fewer frames"):
        overlapping.read([Turn("user", (*[Visual.VIDEO] * count, "What?"))], [film] * count)
    assert len(calls) == most // rows


@pytest.mark.parametrize("content", [b"no film", b""])
def test_a_bad_film_is_the_error_that_it_was(
    pipeline: Pipeline, film: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.mp4").write_bytes(content)
    errors = []
    for _ in in_both_ways(pipeline, monkeypatch):
        with pytest.raises(VideoError) as caught:
            pipeline.generate([TURN], [film, film, film], FEW)  # a film where a picture is shown
        errors.append(str(caught.value))
        with pytest.raises(VideoError) as caught:
            pipeline.generate([FILMS], [film, tmp_path / "bad.mp4"], FEW)
        errors.append(str(caught.value))
    assert errors[:2] == errors[2:]


def test_limits_of_time_hold_in_the_thread(
    pipeline: Pipeline, film: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "limits", MediaLimits(film_seconds=1e-9))
    errors = []
    for _ in in_both_ways(pipeline, monkeypatch):
        with pytest.raises(VideoError, match="takes longer to read") as caught:
            pipeline.generate([FILMS], [as_video(film, FrameSampling("qwen2_vl")), other], FEW)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_tower_that_fails_ends_what_is_decoded(
    overlapping: Pipeline, film: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_visual(visual: VisualInput) -> Any:
        raise BackendError("no memory")

    monkeypatch.setattr(overlapping, "encode_visual", encode_visual)
    with pytest.raises(BackendError, match="no memory"):
        overlapping.generate([FILMS], [film, other], FEW)


def test_a_film_that_nobody_waits_for_is_given_up_between_two_frames(film: Path) -> None:
    looks: list[bool] = []

    def is_ended() -> bool:
        looks.append(len(looks) >= 2)
        return looks[-1]

    with ended_by(is_ended), pytest.raises(VideoError, match="not wanted any more"):
        as_video(film, FrameSampling("qwen2_vl"))
    assert looks == [False, False, True]
    assert len(as_video(film, FrameSampling("qwen2_vl")).frames)


@pytest.mark.slow
def test_two_films_are_held_at_most(
    pipeline: Pipeline, film: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = pipeline._decode
    for overlaps in in_both_ways(pipeline, monkeypatch):
        films: list[weakref.ref[Any]] = []
        held: list[int] = []

        def counted(*given: Any, films: list[weakref.ref[Any]] = films, held: list[int] = held, **named: Any) -> Any:
            held.append(sum(reference() is not None for reference in films))
            decoded = decode(*given, **named)
            films.append(weakref.ref(decoded))
            return decoded

        monkeypatch.setattr(pipeline, "_decode", counted)
        gc.disable()
        try:
            shown: list[Source] = [film, other, film, other]
            pipeline.read([Turn("user", (*[Visual.VIDEO] * 4, "What?"))], shown)
        finally:
            gc.enable()
        assert len(held) == 4
        assert max(held) <= int(overlaps)


@pytest.mark.slow
def test_a_session_goes_on_and_begins_afresh_with_the_same_answers(
    pipeline: Pipeline, film: Path, picture: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for _ in in_both_ways(pipeline, monkeypatch):
        session = pipeline.session()
        first = session.ask([FILMS], [film, film], FEW)
        second = session.ask([Turn("user", (Visual.IMAGE, Visual.VIDEO, "And?"))], [picture, film], FEW)
        session._cut_back(0)  # as a turn does that is given up while everything was prefilled afresh
        third = session.ask([Turn("user", (Visual.IMAGE, Visual.VIDEO, "And?"))], [picture, film], FEW)
        assert session.records[2].restart is not None
        answers.append([(answer.token_ids, answer.kv_lengths) for answer in (first, second, third)])
    assert answers[0] == answers[1]


def test_cores_are_free_beside_a_device_and_few_threads() -> None:
    backend = HostBackend()
    free = []
    for threads in (0, 1, available_cores() - 1, available_cores(), None):
        backend.host_threads = threads
        free.append(leaves_cores_free(backend))  # type: ignore[arg-type]
    several = available_cores() > 1
    assert free == [False, several, several, False, True]
    assert not leaves_cores_free(object())  # type: ignore[arg-type]  # of a package from before there was a word of it


def test_errors_of_sources_are_those_of_decode_media(overlapping: Pipeline, film: Path) -> None:
    for files in ("one", [film]):
        said = []
        for read in (overlapping.decode_media, overlapping.read_media):
            with pytest.raises(FrameFusionError) as caught:
                read([FILMS], files, overlapping.manifest.sampling, Stopwatch())
            said.append(str(caught.value))
        assert said[0] == said[1]


@pytest.mark.slow
def test_the_tower_has_the_first_frames_while_the_rest_is_decoded(
    pipeline: Pipeline, film: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs of as many pictures as ever, so rows are the same to the bit; what is left follows with the film."""
    monkeypatch.setattr(embedder, "PATCHES_AT_ONCE", 128)
    expected: list[Any] = []
    towered = threading.Event()
    runs: list[int] = []
    encode = pipeline.encode_visual
    follow = FilmProgress.add

    def encode_visual(visual: VisualInput) -> Any:
        runs.append(visual.tiles[0].shape[0])
        towered.set()
        return encode(visual)

    def add(self: FilmProgress, kept: Any, size: tuple[int, int], ready: int) -> None:
        follow(self, kept, size, ready)
        if ready == len(kept[0]) - 1:  # the last frame comes once the tower had the first ones
            waited.append(towered.wait(PATIENCE))

    monkeypatch.setattr(pipeline, "encode_visual", encode_visual)
    for overlaps in in_both_ways(pipeline, monkeypatch):
        if overlaps:
            monkeypatch.setattr(FilmProgress, "add", add)
        for shown in (film, other):
            towered.clear()
            runs.clear()
            waited: list[bool] = []
            rows = np.asarray(pipeline.read([Turn("user", [Visual.VIDEO, "What?"])], [shown])[1].hidden).copy()
            if not overlaps:
                expected.append(rows)
                continue
            assert waited == [True]
            assert len(runs) > 1
            np.testing.assert_array_equal(rows, expected.pop(0))


@pytest.mark.slow
def test_parts_that_are_not_the_films_are_thrown_away(
    overlapping: Pipeline, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a film whose packets lied, which is picked anew."""
    turns = [Turn("user", [Visual.VIDEO, "What?"])]
    expected = np.asarray(overlapping.read(turns, [film])[1].hidden).copy()
    monkeypatch.setattr(embedder, "PATCHES_AT_ONCE", 64)
    part = FilmProgress.part
    parts: list[Video] = []

    def other_pixels(self: FilmProgress, start: int, count: int) -> Video | None:
        shown = part(self, start, count)
        if shown is None:
            return None
        parts.append(replace(shown, shrunk=tuple(255 - array for array in shown.shrunk)))
        return parts[-1]

    monkeypatch.setattr(FilmProgress, "part", other_pixels)
    add = FilmProgress.add

    def slowly(self: FilmProgress, kept: Any, size: tuple[int, int], ready: int) -> None:
        add(self, kept, size, ready)
        while ready == len(kept[0]) - 1 and not parts:
            time.sleep(0.001)

    monkeypatch.setattr(FilmProgress, "add", slowly)
    read = overlapping.read_media(turns, [film], overlapping.manifest.sampling, Stopwatch())
    assert parts
    assert read.rows == (None,)
    np.testing.assert_array_equal(overlapping.read(turns, [film])[1].hidden, expected)
