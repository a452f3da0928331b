"""Turns over the caches of the turns before: the same numbers as one prefill of the whole conversation, or why not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from framefusion.errors import BackendError, FrameFusionError, PromptError
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.families.qwen2_vl import QwenVLPreprocessing
from framefusion.runtime.pipeline import Pipeline, Request, Step
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.session import Session
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import COST, shared
from tests.films import write_film
from tests.versions import needs_int8_caches, needs_portable

TOLERANCE = 1e-4  # of fp32 sums in another order, relative to the largest logit
CODED = 2.0**-8  # where caches are codes, of which a number in the middle of two is either
NEW = 5
SLOW = pytest.mark.slow
KINDS = ["gqa", "wide and in chunks", pytest.param("portable", marks=[SLOW, needs_portable])]
KINDS += [pytest.param("buckets", marks=[SLOW, needs_portable])]
KINDS += [pytest.param("int8 caches", marks=[SLOW, needs_int8_caches])]
BUCKETS = (16, 48, 96, 192, 384)

Said = tuple[str, Sequence[Visual]]


@pytest.fixture(scope="module", params=KINDS)
def subject(request: pytest.FixtureRequest, bundle: Path) -> Pipeline:
    """The adaptive mode in both dialects, with prefills padded or in chunks, and with steps of two tokens."""
    if request.param == "gqa":
        return Pipeline(Bundle(bundle, verify=False), threads=1)
    if request.param == "wide and in chunks":
        read = Bundle(bundle, verify=False)
        backend = OnnxRuntimeBackend(bundle, 1, decode_width=2, manifest=read.manifest)
        backend.chunk = 7
        return Pipeline(read, backend)
    if request.param == "int8 caches":
        return Pipeline(Bundle(shared("int8-caches"), verify=False), threads=1)
    read = Bundle(shared("portable-512"), verify=False)
    if request.param == "buckets":
        read = read.with_manifest(segments=tuple(replace(record, buckets=BUCKETS) for record in read.manifest.segments))
    return Pipeline(read, threads=1)


@pytest.fixture(scope="module")
def other_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("films") / "other.mp4", frames=8, seed=1)


@dataclass(frozen=True)
class Shown:
    """What conversations show."""

    film: Path
    other: Path
    picture: Path

    def turn(self, said: Said) -> tuple[Turn, list[Path]]:
        text, kinds = said
        sources = {Visual.VIDEO: self.film, Visual.IMAGE: self.picture}
        return Turn("user", (*kinds, text)), [sources[kind] for kind in kinds]


@pytest.fixture(scope="module")
def shown(film: Path, other_film: Path, picture: Path) -> Shown:
    return Shown(film, other_film, picture)


def request_of(pipeline: Pipeline, seed: int, new: int = NEW, cost: float | None = 1.0, **others: Any) -> Request:
    """Drawn tokens, so that answers differ; no token ends one."""
    config = replace(pipeline.manifest.generation, do_sample=True, temperature=2.0, top_k=0, eos_token_ids=())
    return Request(new, cost=cost, generation=config, seed=seed, **others)


def taken(steps: Sequence[Step]) -> tuple[list[int | None], NDArray[Any]]:
    """Tokens and logits of steps."""
    tokens = [step for step in steps if step.kind == "token"]
    return [step.token_id for step in tokens], np.stack([step.logits for step in tokens if step.logits is not None])


def assert_equal_to_fresh(pipeline: Pipeline, session: Session, turn: Turn, files: list[Path], request: Request) -> int:
    """Take a turn in a session and in one request for the whole conversation; how many tokens were reused."""
    conversation = [*session.turns, turn]
    everything = [*session.files, *files]
    tokens, logits = taken(list(session.stream([turn], files, request, logits=True)))
    expected, reference = taken(list(pipeline.stream(conversation, everything, request, logits=True)))
    assert tokens == expected
    tolerance = TOLERANCE if pipeline.manifest.kv_cache is None else CODED
    assert np.abs(logits - reference).max() <= tolerance * np.abs(reference).max()
    return session.records[-1].reused_tokens


DIALOGUE: list[Said] = [
    ("What happens in this video?", [Visual.VIDEO]),
    ("And then?", []),
    ("Compare it with these.", [Visual.VIDEO, Visual.IMAGE]),
    ("Which is longer?", []),
]


def test_each_turn_equals_one_prefill_of_the_whole_conversation(subject: Pipeline, shown: Shown) -> None:
    session = subject.session()
    reused = [
        assert_equal_to_fresh(subject, session, *shown.turn(said), request_of(subject, seed))
        for seed, said in enumerate(DIALOGUE)
    ]
    assert reused[0] == 0
    for before, here, record in zip(session.records, reused[1:], session.records[1:], strict=False):
        assert here >= before.prompt_tokens  # what was not reused are tokens of an answer that text spells otherwise
        assert record.restart is None
    assert set(session.records[-1].kv_lengths) == {session.records[-1].prompt_tokens}


TURNS = st.lists(
    st.tuples(
        st.sampled_from(["Why?", "What happens in this video?", "\n", "Describe it: <|im_end|>", "é 漢字 🙂"]),
        st.lists(st.sampled_from([Visual.VIDEO, Visual.IMAGE]), max_size=1),
    ),
    min_size=1,
    max_size=3,
)
"""Few enough for the 512 tokens of the bundle, with one that is given up."""


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TURNS, st.integers(0, 9), st.lists(st.integers(0, 2), max_size=1))
def test_any_turns_equal_one_prefill_whatever_was_given_up_between(
    pipeline: Pipeline, shown: Shown, turns: list[Said], seed: int, given_up: list[int]
) -> None:
    session = pipeline.session()
    for index, said in enumerate(turns):
        turn, files = shown.turn(said)
        request = request_of(pipeline, seed + index, new=3)
        if index in given_up:
            stream = session.stream([turn, Turn("assistant", "No."), Turn("user", "?")], files, request)
            for _ in range(1 + given_up[0]):
                next(stream)
            stream.close()
        assert_equal_to_fresh(pipeline, session, turn, files, request)
    assert len(session.turns) == 2 * len(turns)
    assert len(session.records) == len(turns)


def contents(session: Session, lengths: Sequence[int]) -> list[NDArray[Any]]:
    """Keys and values of the first tokens of each layer."""
    layers = [pair for cache in session._caches for pair in zip(cache.keys, cache.values, strict=True)]
    pairs = zip(layers, lengths, strict=True)
    return [np.array(buffer[:, :, :length]) for pair, length in pairs for buffer in pair]


def test_what_was_kept_of_a_film_stays_as_it_is(subject: Pipeline, shown: Shown) -> None:
    session = subject.session()
    first = session.ask(*as_said(shown, DIALOGUE[0]), request_of(subject, 0, cost=COST))
    alone = subject.generate(*as_said(shown, DIALOGUE[0]), request_of(subject, 0, cost=COST))
    assert first.kv_lengths == alone.kv_lengths
    assert first.reduction == alone.reduction
    assert first.token_ids == alone.token_ids
    assert first.cost == pytest.approx(COST, abs=1 / 64)
    before = contents(session, first.kv_lengths)
    for seed, said in enumerate(DIALOGUE[1:], 1):
        session.ask(*as_said(shown, said), request_of(subject, seed, cost=COST))
        for there, kept in zip(contents(session, first.kv_lengths), before, strict=True):
            np.testing.assert_array_equal(there, kept)


def test_a_new_film_is_reduced_by_itself(subject: Pipeline, shown: Shown) -> None:
    session = subject.session()
    session.ask(*as_said(shown, DIALOGUE[0]), request_of(subject, 0, cost=COST))
    answer = session.ask([Turn("user", (Visual.VIDEO, "And here?"))], [shown.other], request_of(subject, 1, cost=COST))
    visual = answer.visual_tokens - 64
    assert visual == 32
    assert answer.reduction[0].visual_before == visual
    assert answer.cost == pytest.approx(COST, abs=2 / 64)
    text = session.ask("Why?", (), request_of(subject, 2, cost=COST))
    assert all(record.visual_before == 0 for record in text.reduction)
    assert session.records[-1].reused_tokens >= answer.prompt_tokens


def as_said(shown: Shown, said: Said) -> tuple[list[Turn], list[Path]]:
    turn, files = shown.turn(said)
    return [turn], files


def test_an_answer_that_text_spells_otherwise_is_prefilled_again(pipeline: Pipeline) -> None:
    session = pipeline.session()
    whole = pipeline.generate([Turn("user", "Hello")], request=request_of(pipeline, 3, new=12))
    session.ask("Hello", (), request_of(pipeline, 3, new=12, stop=(whole.text[4:7],)))
    assert session.turns[-1] == Turn("assistant", whole.text[: whole.text.index(whole.text[4:7])])
    held = session._cached
    assert held is not None
    reused = assert_equal_to_fresh(pipeline, session, Turn("user", "Go on"), [], request_of(pipeline, 4))
    assert session.records[0].prompt_tokens <= reused < held.token_ids.size


def test_a_text_is_a_turn_of_the_user(pipeline: Pipeline) -> None:
    session = Session(pipeline)
    answer = session.ask("Hello", request=Request(3))
    assert session.turns == (Turn("user", "Hello"), Turn("assistant", answer.text))
    assert answer.text == pipeline.generate([Turn("user", "Hello")], request=Request(3)).text
    pieces: list[str] = []
    assert session.ask("Go on", request=request_of(pipeline, 1), on_text=pieces.append).text == "".join(pieces)


def test_a_backend_that_cannot_go_on_prefills_everything_and_says_so(
    pipeline: Pipeline, shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.backend, "continues", False)
    session = pipeline.session()
    for seed, said in enumerate(DIALOGUE[:3]):
        turn, files = shown.turn(said)
        request = request_of(pipeline, seed, cost=COST)
        expected = pipeline.generate([*session.turns, turn], [*session.files, *files], request)
        answer = session.ask([turn], files, request)
        assert answer.token_ids == expected.token_ids
        assert answer.kv_lengths == expected.kv_lengths
    assert [record.reused_tokens for record in session.records] == [0, 0, 0]
    reason = "prefills of the backend onnxruntime begin with empty caches"
    assert [record.restart for record in session.records] == [None, reason, reason]
    prompt, rows = pipeline.read([Turn("user", "Hello")])
    with pytest.raises(BackendError, match=f"{reason}: prefill the whole conversation"):
        pipeline.prefill(prompt, rows, Request(1), Stopwatch(), past=[])


@pytest.mark.slow
def test_the_fixed_mode_prefills_everything_and_says_so(shown: Shown) -> None:
    pipeline = Pipeline(Bundle(shared("fixed-gqa")), threads=1)
    session = pipeline.session()
    session.ask(*as_said(shown, DIALOGUE[0]), request_of(pipeline, 0, cost=None))
    turn = Turn("user", "And then?")
    expected = pipeline.generate([*session.turns, turn], session.files, request_of(pipeline, 1, cost=None))
    assert session.ask([turn], (), request_of(pipeline, 1, cost=None)).token_ids == expected.token_ids
    assert session.records[-1].restart == "the prefill graph of a bundle of the fixed mode begins with empty caches"


@dataclass(frozen=True, kw_only=True)
class ShrinkingImages(QwenVLPreprocessing):
    """A rule that shows an image among others smaller, as other families do."""

    rule = "shrinking"

    def for_images(self, count: int) -> ShrinkingImages:
        return self if count <= 1 else replace(self, min_pixels=56 * 56, max_pixels=56 * 56)


def test_images_that_are_shown_otherwise_once_there_are_more_are_prefilled_again(bundle: Path, shown: Shown) -> None:
    read = Bundle(bundle, verify=False)
    preprocessing = read.manifest.preprocessing
    rule = {field.name: getattr(preprocessing, field.name) for field in fields(preprocessing)}
    pipeline = Pipeline(read.with_manifest(preprocessing=ShrinkingImages(**rule)), threads=1)
    session = pipeline.session()
    for seed, kinds in enumerate(([Visual.IMAGE], [Visual.VIDEO], [Visual.IMAGE])):
        assert_equal_to_fresh(pipeline, session, *shown.turn(("What?", kinds)), request_of(pipeline, seed))
    restarts = [record.restart for record in session.records]
    assert restarts == [None, None, "this family shows images in another way once there are more of them"]
    assert session.records[1].reused_tokens > 0


def test_what_is_no_longer_what_was_cached_before_a_film_is_prefilled_again(pipeline: Pipeline, shown: Shown) -> None:
    session = pipeline.session()
    session.ask(*as_said(shown, DIALOGUE[0]), request_of(pipeline, 0))
    held = session._cached
    assert held is not None
    session._cached = replace(held, token_ids=np.where(np.arange(held.token_ids.size) == 1, 5, held.token_ids))
    turn, files = shown.turn(DIALOGUE[2])
    assert assert_equal_to_fresh(pipeline, session, turn, files, request_of(pipeline, 1)) == 0
    reason = f"the conversation differs from its {held.token_ids.size} cached tokens at 1, before a film"
    assert session.records[-1].restart == reason
    assert assert_equal_to_fresh(pipeline, session, Turn("user", "Why?"), [], request_of(pipeline, 2)) > 0


def test_a_turn_that_fails_is_not_part_of_the_conversation(pipeline: Pipeline, shown: Shown, tmp_path: Path) -> None:
    session = pipeline.session()
    session.ask(*as_said(shown, DIALOGUE[0]), request_of(pipeline, 0))
    turns, size = session.turns, session.cache_bytes
    with pytest.raises(FrameFusionError, match=r"none\.mp4"):
        session.ask([Turn("user", (Visual.VIDEO, "And this?"))], [tmp_path / "none.mp4"])
    nothing = replace(pipeline.manifest.generation, suppress_tokens=tuple(range(pipeline.tokenizer.vocab_size)))
    with pytest.raises(PromptError, match="leave no token"):
        session.ask("And then?", (), Request(3, cost=1.0, generation=nothing))
    assert (session.turns, len(session.records)) == (turns, 1)
    assert session.cache_bytes >= size
    assert assert_equal_to_fresh(pipeline, session, Turn("user", "And then?"), [], request_of(pipeline, 1)) > 0


def test_a_turn_is_over_before_the_next_begins(pipeline: Pipeline) -> None:
    session = pipeline.session()
    stream = session.stream("Hello", (), request_of(pipeline, 0))
    next(stream)
    with pytest.raises(PromptError, match="a turn of this session is not over: take its steps to the end, or close"):
        session.ask("Go on", (), request_of(pipeline, 1))
    list(stream)
    assert assert_equal_to_fresh(pipeline, session, Turn("user", "Go on"), [], request_of(pipeline, 1)) > 0


def fill(session: Session, request: Request) -> None:
    """Talk until the bundle takes no more."""
    while True:
        session.ask("word " * 40, (), request)


def test_a_conversation_ends_where_the_bundle_does(pipeline: Pipeline) -> None:
    session = pipeline.session()
    limit = pipeline.manifest.limits.max_input_len
    session.ask("word " * 100, (), request_of(pipeline, 0))
    with pytest.raises(PromptError, match=rf"has \d+ tokens, .* takes {limit}: begin a new session, sample fewer"):
        fill(session, request_of(pipeline, 0))
    held = session.records[-1].prompt_tokens
    assert limit // 2 < held <= limit
    assert assert_equal_to_fresh(pipeline, session, Turn("user", "?"), [], request_of(pipeline, 1)) >= held


def test_memory_is_limited_before_it_is_used(pipeline: Pipeline, shown: Shown) -> None:
    free = pipeline.session()
    free.ask(*as_said(shown, DIALOGUE[0]), request_of(pipeline, 0))
    limit = free.cache_bytes
    session = pipeline.session(max_cache_bytes=limit)
    session.ask(*as_said(shown, DIALOGUE[0]), request_of(pipeline, 0))
    assert session.cache_bytes <= limit
    message = rf"may need \d+ bytes of KV cache, \d+ of them for earlier turns, max_cache_bytes is {limit}: begin a new"
    with pytest.raises(PromptError, match=message):
        session.ask([Turn("user", (Visual.VIDEO, "And this?"))], [shown.film], request_of(pipeline, 1))
    assert session.cache_bytes <= limit


def test_a_session_that_goes_frees_its_caches(pipeline: Pipeline) -> None:
    session = pipeline.session()
    session.ask("Hello", request=Request(2))
    session.ask("Go on", request=Request(2))
    kept = [weakref.ref(buffer) for cache in session._caches for buffer in (*cache.keys, *cache.values)]
    assert all(ref() is not None for ref in kept)
    gc.disable()
    try:
        del session
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_two_sessions_do_not_know_each_other(pipeline: Pipeline, shown: Shown) -> None:
    sessions = [pipeline.session(), pipeline.session()]
    for seed, said in enumerate(DIALOGUE[:3]):
        for number, session in enumerate(sessions):
            assert_equal_to_fresh(pipeline, session, *shown.turn(said), request_of(pipeline, 10 * number + seed))
