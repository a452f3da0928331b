"""An answer step by step: what each step says, what stays when nobody wants the rest, and requests that take turns."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framefusion.errors import PromptError
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.pipeline import Generation, Pipeline, Request, Step
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from framefusion.runtime.text.tokenizer import StoppableText

TURN = Turn("user", (Visual.VIDEO, "What happens?"))
DRAWN = 24


def drawn(pipeline: Pipeline, seed: int = 7, new: int = DRAWN, **fields: Any) -> Request:
    """A request whose answer is long and different with each seed."""
    config = replace(pipeline.manifest.generation, do_sample=True, temperature=2.0, top_k=0, eos_token_ids=())
    return Request(new, generation=config, seed=seed, **fields)


@pytest.fixture
def caches(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to all caches, and to their buffers, that the backend gives from now on."""
    given_out: list[weakref.ref[Any]] = []
    make = pipeline.backend.cache

    def cache(*arguments: Any) -> Any:
        built = make(*arguments)
        given_out.extend(weakref.ref(kept) for kept in (built, *built.keys, *built.values))
        return built

    monkeypatch.setattr(pipeline.backend, "cache", cache)
    return given_out


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed, is freed because nothing refers to it any more."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_streamed_text_is_the_generated_one(pipeline: Pipeline, film: Path, seed: int) -> None:
    request = drawn(pipeline, seed)
    steps = list(pipeline.stream([TURN], [film], request))
    answer = pipeline.generate([TURN], [film], request)
    assert "".join(step.text for step in steps) == answer.text
    assert [step.token_id for step in steps if step.kind == "token"] == list(answer.token_ids)
    assert steps[-1].finish_reason == answer.finish_reason
    assert steps[0].prefill is not None
    assert steps[0].prefill.kv_lengths == answer.kv_lengths
    assert steps[0].prefill.reduction == answer.reduction
    assert steps[0].prefill.videos == answer.videos


def test_steps_come_in_order(pipeline: Pipeline, film: Path) -> None:
    steps = list(pipeline.stream([TURN], [film], drawn(pipeline, new=5)))
    assert [step.kind for step in steps] == ["prefilled", *["token"] * 5, "end"]
    assert [step.prefill is not None for step in steps] == [True, *[False] * 6]
    assert [step.finish_reason for step in steps] == [*[None] * 6, "length"]
    assert all(step.logits is None for step in steps)


def test_an_end_token_is_a_step_without_text(pipeline: Pipeline) -> None:
    likely = pipeline.generate([Turn("user", "What?")], request=Request(3)).token_ids
    config = replace(pipeline.manifest.generation, eos_token_ids=likely[:1])
    steps = list(pipeline.stream([Turn("user", "What?")], request=Request(3, generation=config)))
    assert [(step.kind, step.token_id, step.text) for step in steps[1:]] == [
        ("token", likely[0], ""),
        ("end", None, ""),
    ]
    assert steps[-1].finish_reason == "stop"


def test_seconds_grow_and_leave_the_consumer_out(pipeline: Pipeline, film: Path) -> None:
    steps = list(pipeline.stream([TURN], [film], drawn(pipeline, new=4)))
    assert set(steps[0].seconds) == {"video", "preprocess", "vision", "embed", "reduction", "prefill"}
    spent = [step.seconds["decode"] for step in steps[1:]]
    assert all(before <= after for before, after in pairwise(spent))
    assert steps[-1].seconds == Generation.from_steps(iter(steps)).seconds


def test_logits_are_what_each_token_was_chosen_from(pipeline: Pipeline, film: Path) -> None:
    request = Request(6, generation=replace(pipeline.manifest.generation, do_sample=False, eos_token_ids=()))
    steps = [step for step in pipeline.stream([TURN], [film], request, logits=True) if step.kind == "token"]
    scores = [step.logits for step in steps]
    assert all(row is not None and row.shape == (pipeline.manifest.model.vocab_size,) for row in scores)
    limit = pipeline.tokenizer.vocab_size
    assert [int(np.argmax(row[:limit])) for row in scores if row is not None] == [step.token_id for step in steps]


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_who_stops_early_frees_the_caches(
    pipeline: Pipeline, film: Path, caches: list[weakref.ref[Any]], no_collector: None, taken: int
) -> None:
    request = drawn(pipeline)
    before = pipeline.generate([TURN], [film], request)
    caches.clear()
    stream = pipeline.stream([TURN], [film], request)
    for _ in range(taken):
        next(stream)
    layers = pipeline.manifest.model.num_layers
    assert sum(ref() is not None for ref in caches) == len(caches) == 2 * layers + len(pipeline.manifest.segments)
    stream.close()
    assert all(ref() is None for ref in caches)
    assert pipeline.generate([TURN], [film], request).token_ids == before.token_ids


def test_a_loop_that_breaks_frees_them_too(
    pipeline: Pipeline, film: Path, caches: list[weakref.ref[Any]], no_collector: None
) -> None:
    for step in pipeline.stream([TURN], [film], drawn(pipeline)):
        if step.kind == "token":
            break
    assert caches
    assert all(ref() is None for ref in caches)


def test_nothing_happens_before_the_first_step(pipeline: Pipeline, caches: list[weakref.ref[Any]]) -> None:
    stream = pipeline.stream([TURN], [Path("there is no such film.mp4")])
    stream.close()
    assert not caches


def test_errors_arrive_where_the_step_is_asked_for(pipeline: Pipeline, film: Path) -> None:
    with pytest.raises(PromptError, match=r"shows 1 video\(s\) and image\(s\), 0 were given"):
        next(pipeline.stream([TURN]))
    before = pipeline.generate([TURN], [film], Request(3))
    nothing = replace(pipeline.manifest.generation, suppress_tokens=tuple(range(pipeline.tokenizer.vocab_size)))
    stream = pipeline.stream([TURN], [film], Request(3, generation=nothing))
    assert next(stream).kind == "prefilled"
    with pytest.raises(PromptError, match="leave no token"):
        next(stream)
    assert pipeline.generate([TURN], [film], Request(3)).token_ids == before.token_ids


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_stop_string_ends_an_answer_before_it_is_said(pipeline: Pipeline, film: Path, seed: int) -> None:
    whole = pipeline.generate([TURN], [film], drawn(pipeline, seed))
    stop = whole.text[len(whole.text) // 2 :][:5]  # over several tokens: those of the tiny model are short
    steps = list(pipeline.stream([TURN], [film], drawn(pipeline, seed, stop=(stop,))))
    assert "".join(step.text for step in steps) == whole.text[: whole.text.index(stop)]
    assert steps[-1].finish_reason == "stop"
    assert len(steps) - 2 < len(whole.token_ids)


def test_a_stop_string_that_never_comes_changes_nothing(pipeline: Pipeline, film: Path) -> None:
    request = drawn(pipeline)
    whole = pipeline.generate([TURN], [film], request)
    held = pipeline.generate([TURN], [film], replace(request, stop=(whole.text[-3:] + "never", "\0")))
    assert held.text == whole.text
    assert held.finish_reason == whole.finish_reason


@pytest.mark.parametrize("stop", [("",), "end", (3,)])
def test_a_stop_that_is_no_text_is_refused(pipeline: Pipeline, stop: Any) -> None:
    with pytest.raises(PromptError, match="give texts that are not empty"):
        pipeline.generate([Turn("user", "What?")], request=Request(2, stop=stop))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", "5"), ("max_new_tokens", 2.5), ("max_new_tokens", None), ("max_new_tokens", True),
        ("seed", 1.5), ("seed", -1), ("cost", "0.3"), ("similarity_lower_bound", "high"), ("ratio_lower_bound", False),
        ("stop", 3),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_where_the_request_is_made(name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"{name} is {value!r}: give "):
        Request(**{name: value})


class Pieces:
    """A stream of texts that are there already."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def push(self, index: int) -> str:
        return self.texts[index]

    def flush(self) -> str:
        return ""


@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_at_the_first_stop_string_however_it_comes(texts: list[str], stop: list[str]) -> None:
    text = StoppableText(Pieces(texts), stop)
    said = ""
    for index in range(len(texts)):
        said += text.push(index)
        assert not any(string in said for string in stop)
        if text.stopped:
            break
    said += text.flush()
    whole = "".join(texts)
    ends = [end for string in stop for end in range(len(whole) + 1) if whole[:end].endswith(string)]
    if not ends:
        assert (said, text.stopped) == (whole, False)
        return
    assert text.stopped
    first = "".join(texts[: index + 1])
    assert said == first[: min(place for string in stop if (place := first.find(string)) >= 0)]


def test_requests_can_take_turns(pipeline: Pipeline, film: Path) -> None:
    """What a server does: each request is one object, and nothing else remembers it."""
    texts = ("What happens?", "Who?", "Describe it in a few words.")
    turns = [Turn("user", (Visual.VIDEO, text)) for text in texts]
    requests = [drawn(pipeline, seed, new) for seed, new in ((1, 5), (2, 9), (3, 7))]
    alone = [pipeline.generate([turn], [film], request) for turn, request in zip(turns, requests, strict=True)]
    running = []
    for turn, request in zip(turns, requests, strict=True):
        prompt, rows = pipeline.read([turn], [film])
        prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
        active = pipeline.activate(prompt, request)
        running.append((active, Decoder(pipeline.segments, prefilled.caches), [active.accept(prefilled.logits)]))
    while any(active.finish_reason is None for active, _, _ in running):
        for active, decoder, pieces in running:
            if active.finish_reason is None:
                row = pipeline.embedding(np.array(active.token_ids[-1:]))[0]
                pieces.append(active.accept(decoder.step(row, *active.rotary)))
    assert [tuple(active.token_ids) for active, _, _ in running] == [answer.token_ids for answer in alone]
    assert ["".join([*pieces, active.flush()]) for active, _, pieces in running] == [answer.text for answer in alone]


def test_steps_that_do_not_end_are_no_answer() -> None:
    with pytest.raises(ValueError, match="steps go from prefilled to end"):
        Generation.from_steps([Step("token", "a", 1)])
