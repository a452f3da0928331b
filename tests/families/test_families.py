"""Every family through the same questions: features, prompts, labels, logits, sixteen tokens, dense and reduced.

Quick: the torch graphs of each family's first checkpoint under the runtime's own pipeline. Slow: compiled bundles of
every checkpoint variant and every kind of conversation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from packaging.version import Version

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families import FAMILIES
from framefusion.export.options import BuildOptions
from framefusion.reduction import tracks
from framefusion.runtime.backends.openvino.backend import OpenVinoBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation import embedder
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.generation.visuals.reading import VisualReading
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.media.sources import as_image, as_video
from framefusion.runtime.media.video.frames import Video, read_video
from framefusion.runtime.media.video.progress import FilmProgress
from framefusion.runtime.media.visual_input import Rows, Tiles, VisualInput
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.prove import prove
from framefusion.runtime.request import Step, Stopwatch
from framefusion.runtime.server.engine import Engine
from framefusion.runtime.server.media.ahead import ReadingAhead
from framefusion.runtime.server.media.policy import MediaFile, MediaPolicy
from framefusion.runtime.server.media.reader import MediaReader, OpenPart
from framefusion.runtime.server.protocol.parts import MediaPart
from framefusion.runtime.text.prompt import Prompt, Turn, Visual
from tests.families import CASES
from tests.families.case import CONVERSATIONS, FamilyCase, Media, Reference, clip, picture, relative_error
from tests.films import write_film
from tests.patience import PATIENCE

NEW = 16
COST = 0.5
OPTIONS = BuildOptions(cost=COST)
FILMS = ((9, 25), (40, 10), (75, 30))  # frames and rate of mp4 files


@dataclass
class Subject:
    """A family's tiny checkpoint, a bundle of it, and the reference."""

    case: FamilyCase
    folder: Path
    pipeline: Pipeline
    reference: Reference


@dataclass
class Conversation:
    """A conversation as the runtime reads it."""

    turns: Sequence[Turn]
    media: list[Media]
    visuals: list[VisualInput]
    prompt: Prompt
    features: list[NDArray[np.float32]]
    rows: TokenRows


def name_of(case: FamilyCase) -> str:
    return case.family


def variants(cases: Sequence[FamilyCase]) -> list[Any]:
    return [pytest.param(case, variant, id=f"{case.family}-{variant}") for case in cases for variant in case.variants]


@pytest.fixture(params=CASES, ids=name_of, scope="module")
def eager(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The first variant's torch graphs: a bundle whose graphs were never traced, and a backend that needs none."""
    from tests.families.eager import eager_pipeline

    case: FamilyCase = request.param
    folder = tmp_path_factory.mktemp(case.family)
    case.write(folder, case.variants[0])
    pipeline = eager_pipeline(folder, tmp_path_factory.mktemp("bundle") / "b", OPTIONS)
    return Subject(case, folder, pipeline, case.reference(folder))


def read_conversation(subject: Subject, name: str) -> Conversation:
    turns, shown = CONVERSATIONS[name]
    pipeline, sampling = subject.pipeline, subject.pipeline.manifest.sampling
    kinds = [part for turn in turns for part in turn.parts if isinstance(part, Visual)]
    media: list[Media] = [
        as_video(pixels, sampling) if kind is Visual.VIDEO else as_image(pixels)
        for kind, pixels in zip(kinds, shown, strict=True)
    ]
    visuals = pipeline.read_visuals(turns, shown, sampling, Stopwatch())
    prompt = pipeline.prompt(turns, visuals)
    features = [np.asarray(pipeline.encode_visual(visual)) for visual in visuals]
    return Conversation(turns, media, visuals, prompt, features, pipeline.embed(prompt, features))


@dataclass
class HeldFilm:
    """A film whose last frames come once the tower had the first ones, or wants none before all are there.

    Attributes:
        turns: that show it.
        expected: rows of the prompt where nothing overlaps.
        joined: of each time that rows of parts were joined, how many parts.
    """

    path: Path
    turns: Sequence[Turn]
    expected: NDArray[Any]
    joined: list[int]


@pytest.fixture
def held_film(eager: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldFilm:
    pipeline = eager.pipeline
    film = write_film(tmp_path / "film.mp4", frames=24, size=84)
    turns = [Turn("user", [Visual.VIDEO, "What?"])]
    (visual,) = pipeline.read_visuals(turns, [film], pipeline.manifest.sampling, Stopwatch())
    monkeypatch.setattr(embedder, "PATCHES_AT_ONCE", 2 * visual.tiles[0].shape[1])
    expected = np.asarray(pipeline.read(turns, [film])[1].hidden).copy()
    followed = Event()
    joined: list[int] = []
    add = FilmProgress.add
    encode = pipeline.encode_visual
    parts = VisualReading.parts
    join = pipeline.join_rows

    def slowly(self: FilmProgress, kept: Any, size: tuple[int, int], ready: int) -> None:
        add(self, kept, size, ready)
        assert ready < len(kept[0]) - 1 or followed.wait(PATIENCE)

    def encode_visual(visual: VisualInput) -> Any:
        followed.set()
        return encode(visual)

    def parts_to_the_end(self: VisualReading, progress: FilmProgress) -> Iterator[Tiles]:
        yield from parts(self, progress)
        followed.set()

    def join_rows(parts: Any, mapping: Any) -> Any:
        joined.append(len(parts))
        return join(parts, mapping)

    monkeypatch.setattr(FilmProgress, "add", slowly)
    monkeypatch.setattr(VisualReading, "parts", parts_to_the_end)
    monkeypatch.setattr(pipeline, "encode_visual", encode_visual)
    monkeypatch.setattr(pipeline, "join_rows", join_rows)
    monkeypatch.setattr(pipeline, "overlaps", True)
    return HeldFilm(film, turns, expected, joined)


@pytest.mark.slow
def test_a_film_that_is_decoded_while_the_tower_works_has_the_same_rows(eager: Subject, held_film: HeldFilm) -> None:
    """The tower has pairs of pictures before the last frame is there, where a film is pictures of one kind."""
    rows = eager.pipeline.read(held_film.turns, [held_film.path])[1]
    np.testing.assert_array_equal(rows.hidden, held_film.expected)
    assert held_film.joined or eager.case.family == "nvila"  # which averages groups of frames


@pytest.mark.slow
def test_a_film_that_a_servers_child_decodes_while_the_tower_works_has_the_same_rows(
    eager: Subject, held_film: HeldFilm
) -> None:
    pipeline = eager.pipeline
    manifest = pipeline.manifest
    reader = MediaReader(MediaPolicy(), manifest.preprocessing, manifest.sampling)
    engine = Engine(1, 1 << 30, lambda held: None)
    engine.start()
    ahead = ReadingAhead(pipeline, reader, engine)
    name = "the film"
    part = OpenPart(
        MediaPart(Visual.VIDEO, (held_film.path.as_uri(),), name),
        (MediaFile(held_film.path, "", name),),
        manifest.sampling,
        None,
        "",
    )
    try:
        reading = ahead.begin(pipeline.session(), held_film.turns)
        assert reading is not None
        asyncio.run(ahead.decode(reading, [part], 0, lambda: False))
    finally:
        engine.close()
        reader.close()
    read = reading.result()
    prompt = pipeline.prompt(held_film.turns, read.visuals)
    rows = pipeline.embed(prompt, pipeline.encode_rest(read.visuals, read.rows))
    np.testing.assert_array_equal(rows.hidden, held_film.expected)
    if eager.case.family != "nvila":  # which averages groups of frames
        assert held_film.joined
        assert read.rows[0] is not None


def test_every_row_has_a_case() -> None:
    assert sorted(case.family for case in CASES) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize("name", ["mixed", pytest.param("video", marks=pytest.mark.slow)])
def test_torch_graphs(eager: Subject, name: str) -> None:
    conversation = read_conversation(eager, name)
    compare_prompt(eager, conversation)
    compare_pixels(eager, conversation)
    compare_features(eager, conversation)
    compare_answers(eager, conversation)
    compare_reduced(eager, conversation)


@pytest.mark.slow
def test_a_session_equals_one_request_for_the_whole_conversation(eager: Subject) -> None:
    pipeline = eager.pipeline
    session = pipeline.session()
    request = Request(3, cost=1.0, generation=replace(pipeline.manifest.generation, eos_token_ids=(), do_sample=False))
    for kinds, files in (((Visual.VIDEO,), [clip()]), ((), []), ((Visual.IMAGE,), [picture()]), ((), [])):
        turn = Turn("user", (*kinds, "What happens?"))
        turns, shown = [*session.turns, turn], [*session.files, *files]
        steps = [step for step in session.stream([turn], files, request, logits=True) if step.kind == "token"]
        whole = [step for step in pipeline.stream(turns, shown, request, logits=True) if step.kind == "token"]
        assert [step.token_id for step in steps] == [step.token_id for step in whole]
        logits, expected = (np.stack([np.asarray(step.logits) for step in steps]) for steps in (steps, whole))
        assert relative_error(logits, expected) < 1e-4
    assert [record.restart for record in session.records] == [None] * 4
    assert all(record.reused_tokens > 0 for record in session.records[1:])


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in ("video", "mixed")])
def test_prompts(eager: Subject, name: str) -> None:
    conversation = read_conversation(eager, name)
    compare_prompt(eager, conversation)
    compare_pixels(eager, conversation)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_frames(case: FamilyCase, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder, case.variants[0])
    checkpoint = Checkpoint(folder)
    (family,) = (family for family in FAMILIES if family.name == case.family)
    sampling = family.sampling(checkpoint)
    if case.family in ("llava_onevision", "llava_next_video") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 rounds the places of a film's frames in another way")
    for frames, rate in FILMS:
        film = write_film(tmp_path / f"{frames}-{rate}.mp4", frames=frames, fps=rate)
        assert read_video(film, sampling).indices.tolist() == case.indices(frames, rate), (frames, rate)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "variant"), variants(CASES))
def test_bundles(case: FamilyCase, variant: str, tmp_path: Path) -> None:
    """`ff-export build` with nothing but a cost: everything else is told by the checkpoint."""
    from framefusion.export.build import build

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder, variant)
    built = build(Checkpoint(folder), tmp_path / "bundle", OPTIONS)
    assert built.manifest.check["passed"]
    subject = Subject(case, folder, Pipeline(Bundle(built.folder), threads=1), case.reference(folder))
    bundle = subject.pipeline.bundle
    golden = require_golden(bundle)
    assert prove(bundle, subject.pipeline.backend, golden).right
    if variant == case.variants[0] and Machine.here().openvino is not None:  # held to the same numbers and limits
        assert prove(bundle, OpenVinoBackend(bundle.folder, threads=1, manifest=bundle.manifest), golden).right
    for name in CONVERSATIONS if variant in (case.variants[0], *case.thorough) else ("video",):
        conversation = read_conversation(subject, name)
        compare_prompt(subject, conversation)
        compare_features(subject, conversation)
        compare_answers(subject, conversation)
        compare_reduced(subject, conversation)
    compare_batched(subject, conversation)


def compare_prompt(subject: Subject, conversation: Conversation) -> None:
    """Ids and labels, token by token."""
    ids = np.maximum(conversation.prompt.token_ids, -2).tolist()
    assert ids == subject.case.prompt_ids(subject.folder, conversation.turns, conversation.media)
    assert conversation.prompt.labels.tolist() == subject.case.labels(subject.folder, ids, conversation.media)
    rule = subject.pipeline.manifest.preprocessing
    for item, visual in zip(conversation.media, conversation.visuals, strict=True):
        room = rule.video_tokens(len(item.frames)) if isinstance(item, Video) else 0
        placed = sum(piece.labels.size if isinstance(piece, Rows) else 1 for piece in visual.pieces)
        assert room == 0 or room >= placed, "a video of the sampling's own length would not fit --max-input-len"
    shown = sum(visual.num_rows for visual in conversation.visuals)
    assert shown == conversation.prompt.row_places.size == sum(rows.shape[1] for rows in conversation.features)


def compare_pixels(subject: Subject, conversation: Conversation) -> None:
    """What the tower sees, to one rounding of fp32."""
    for media, visual in zip(conversation.media, conversation.visuals, strict=True):
        expected = subject.case.pixels_among(subject.folder, media, conversation.media)
        assert [tiles.values.shape for tiles in visual.tiles] == [values.shape for values in expected]
        for tiles, values in zip(visual.tiles, expected, strict=True):
            np.testing.assert_allclose(tiles.values, values, rtol=0, atol=1e-6)


def compare_features(subject: Subject, conversation: Conversation) -> None:
    if conversation.media:
        ours = np.concatenate([rows[0] for rows in conversation.features])
        assert relative_error(ours, subject.reference.features(conversation.media)) < subject.case.limit


def compare_answers(subject: Subject, conversation: Conversation) -> None:
    """Dense: sixteen tokens, and the logits that each of them was chosen by."""
    pipeline, prompt = subject.pipeline, conversation.prompt
    prefilled = prefill(pipeline.segments, conversation.rows, None, NEW, Stopwatch())
    decoder = Decoder(pipeline.segments, prefilled.caches)
    places = prompt.token_ids.size + prompt.rope_delta + np.arange(NEW)
    cos, sin = pipeline.rope(np.broadcast_to(places, (3, NEW)))
    limit = min(pipeline.manifest.model.vocab_size, pipeline.tokenizer.vocab_size)
    logits, answer = [prefilled.logits[:limit].copy()], []
    for step in range(NEW):
        answer.append(int(logits[-1].argmax()))
        row = pipeline.embedding(np.array(answer[-1:]))[0]
        logits.append(decoder.step(row, cos[step], sin[step])[:limit].copy())
    expected = subject.reference.logits(prompt, conversation.media, answer)[-NEW - 1 :, :limit]
    assert relative_error(np.stack(logits), expected) < subject.case.limit
    assert answer == expected[:NEW].argmax(-1).tolist()


def compare_reduced(subject: Subject, conversation: Conversation) -> None:
    """Reduced: the cost is met, text is never dropped, and an answer comes."""
    pipeline, prompt = subject.pipeline, conversation.prompt
    answer = pipeline.answer(prompt, conversation.rows, Request(max_new_tokens=2))
    assert len(answer.token_ids) in (1, 2)
    if not prompt.num_visual:
        assert set(answer.kv_lengths) == {prompt.token_ids.size}
        return
    assert answer.cost == pytest.approx(COST, abs=0.01 + 1 / prompt.num_visual)
    reduction = pipeline.reduction(prompt, Request())
    kept = prefill(pipeline.segments, conversation.rows, reduction, 1, Stopwatch()).kept[-1]
    assert set(np.flatnonzero(prompt.labels == tracks.TEXT)) <= set(kept.tolist())
    assert len(kept) < prompt.token_ids.size


def compare_batched(subject: Subject, conversation: Conversation) -> None:
    """Dense and reduced side by side in a batch, each as it is alone, whatever the family has in its layers."""
    pipeline = subject.pipeline
    generation = replace(pipeline.manifest.generation, eos_token_ids=(), do_sample=False)
    requests = [Request(new_tokens, cost=cost, generation=generation) for new_tokens, cost in ((4, 1.0), (6, COST))]

    def steps(request: Request, batch: DecodeBatch | None) -> Iterator[Step]:
        stopwatch = Stopwatch()
        prefilled = pipeline.prefill(conversation.prompt, conversation.rows, request, stopwatch)
        return pipeline.decode(conversation.prompt, prefilled, request, stopwatch, logits=True, batch=batch)

    batch = DecodeBatch(pipeline.segments)
    rounds = zip_longest(*(steps(request, batch) for request in requests))
    for ours, alone in zip(zip(*rounds, strict=True), (steps(request, None) for request in requests), strict=True):
        for step, reference in zip((step for step in ours if step is not None), alone, strict=True):
            assert step.token_id == reference.token_id
            np.testing.assert_array_equal(step.logits, reference.logits)
    assert len(batch) == 0
