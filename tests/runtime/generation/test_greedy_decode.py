"""Tokens that the device chooses against those that the host chooses from the same logits, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError, PromptError
from framefusion.runtime.backends.base import StepBuffers
from framefusion.runtime.backends.host import HOST, HostDevice, HostGreedyTokens
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.decode import Decoder, GreedyDecoder
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn
from framefusion.runtime.text.sampling import DEFAULTS, GenerationConfig
from tests.bundles import shared

STEPS = 7
TURNS = [Turn("user", ("What happens?",))]


class RoomyDevice(HostDevice):
    """The CPU as a device that takes a copy of the embedding table."""

    def spare_memory(self) -> int:
        return 1 << 30


@pytest.fixture(scope="module", params=["bundle", pytest.param("fixed", marks=pytest.mark.slow)])
def opened(request: pytest.FixtureRequest) -> Bundle:
    return Bundle(shared(request.param), verify=False)


def make_pipeline(bundle: Bundle, device: HostDevice = HOST) -> Pipeline:
    backend = OnnxRuntimeBackend(bundle.folder, threads=1)
    backend.device = device
    return Pipeline(bundle, backend)


def endless(pipeline: Pipeline, **settings: Any) -> Request:
    """A request whose answer ends at its limit."""
    config = replace(pipeline.manifest.generation, eos_token_ids=(), **settings)
    return Request(STEPS, generation=config)


def tokens(pipeline: Pipeline, request: Request, *, logits: bool = False) -> list[int]:
    steps = pipeline.stream(TURNS, request=request, logits=logits)
    return [step.token_id for step in steps if step.token_id is not None]


@pytest.mark.parametrize("device", [HOST, RoomyDevice()], ids=["rows from the host", "rows from the device"])
def test_the_device_chooses_what_the_host_chooses(opened: Bundle, device: HostDevice) -> None:
    pipeline = make_pipeline(opened, device)
    request = endless(pipeline)
    chosen = tokens(pipeline, request)
    assert len(chosen) == STEPS
    assert chosen == tokens(pipeline, request, logits=True)  # whose logits come to the host


def test_caches_of_a_segment_whose_layers_hold_different_numbers_are_refused() -> None:
    """Graphs read the length of the first layer alone: attention over another number would be wrong in silence."""
    pipeline = make_pipeline(Bundle(shared("bundle"), verify=False))
    prompt, rows = pipeline.read(TURNS)
    prefilled = pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch())
    Decoder(pipeline.segments, prefilled.caches)
    prefilled.caches[-1].lengths[-1] -= 1
    for refused in (
        lambda: Decoder(pipeline.segments, prefilled.caches),
        lambda: DecodeBatch(pipeline.segments).join(prefilled.caches),
        lambda: pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch(), past=prefilled.caches),
    ):
        with pytest.raises(ValueError, match="layers of one segment hold"):
            refused()


def test_where_more_than_the_largest_logit_counts_the_host_chooses() -> None:
    assert DEFAULTS.takes_largest
    assert replace(DEFAULTS, do_sample=True, temperature=0).takes_largest
    others: list[Mapping[str, Any]] = [
        {"do_sample": True},
        {"repetition_penalty": 1.1},
        {"suppress_tokens": (1,)},
        {"begin_suppress_tokens": (1,)},
        {"bad_words_ids": ((1,),)},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 1},
    ]
    assert not any(replace(DEFAULTS, **other).takes_largest for other in others)
    harmless = {"temperature", "top_k", "top_p", "min_p", "eos_token_ids", "pad_token_id"}  # of the best token, or none
    assert {name for other in others for name in other} | harmless == {field.name for field in fields(DEFAULTS)}
    assert GenerationConfig().takes_largest  # what is not said has Hugging Face's default


def test_a_penalty_is_heeded_behind_the_first_token(opened: Bundle) -> None:
    pipeline = make_pipeline(opened)
    request = endless(pipeline, no_repeat_ngram_size=1)
    assert len(set(tokens(pipeline, request))) == STEPS


def step_buffers(logits: np.ndarray[Any, Any]) -> StepBuffers:
    return StepBuffers(
        np.zeros((1, 2, 4), np.float32),
        np.zeros((1, 2, 3), np.float32),
        np.zeros((1, 2, 3), np.float32),
        np.full((2, 32), 5, np.int64),
        logits,
    )


def test_the_first_of_equal_logits_is_taken_and_none_behind_the_limit() -> None:
    logits = np.array([[0, 3, 1, 3, 9]], np.float32)
    step = step_buffers(logits)
    table = np.arange(8, dtype=np.float32).reshape(2, 4)
    rotary = (np.arange(9, dtype=np.float32).reshape(3, 3), -np.arange(9, dtype=np.float32).reshape(3, 3))
    chooser = HostGreedyTokens(step, rotary, table, limit=4)
    chooser.run()
    assert chooser.pull() == (1, 3.0)
    np.testing.assert_array_equal(step.hidden[0, 0], table[1])
    np.testing.assert_array_equal(step.cos[0, 0], rotary[0][1])
    np.testing.assert_array_equal(step.sin[0, 0], rotary[1][1])
    assert (np.asarray(step.lengths) == 6).all()
    logits[0, 2] = 4  # behind the table
    for _ in range(3):
        chooser.run()
    assert not np.asarray(step.hidden).any()
    np.testing.assert_array_equal(step.cos[0, 0], rotary[0][2])


def test_logits_that_are_no_numbers_are_refused(opened: Bundle) -> None:
    pipeline = make_pipeline(opened)
    decoder, greedy = greedy_decoder(pipeline, new_tokens=STEPS)
    logits: Any = decoder.buffers.logits

    def spoil() -> None:
        logits[0, 3] = np.nan

    spoiling = Behind(spoil)
    greedy._run = decoder.chain(spoiling, greedy._tokens)
    with pytest.raises(BackendError, match="largest logit is nan: build with"):
        greedy.step(1)


class Behind:
    """A link of the chain that does something."""

    def __init__(self, run: Any) -> None:
        self.inputs: Mapping[str, Any] = {}
        self.outputs: Mapping[str, Any] = {}
        self.run = run


def greedy_decoder(
    pipeline: Pipeline, new_tokens: int, device: HostDevice | None = None
) -> tuple[Decoder, GreedyDecoder]:
    prompt, rows = pipeline.read(TURNS)
    request = Request(new_tokens)
    prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    active = pipeline.activate(prompt, request)
    decoder = Decoder(pipeline.segments, prefilled.caches)
    if device is not None:
        decoder.device = device
    greedy = GreedyDecoder(decoder, pipeline.embedding, None, active.rotary_tables, pipeline.manifest.model.vocab_size)
    return decoder, greedy


class WrongTokens(HostGreedyTokens):
    """Takes the smallest logit."""

    def run(self) -> None:
        self._logits *= -1
        super().run()
        self._logits *= -1


class WrongLengths(HostGreedyTokens):
    """Forgets that the caches grow."""

    def run(self) -> None:
        super().run()
        self._lengths -= 1


@pytest.mark.parametrize("kind", [WrongTokens, WrongLengths])
def test_a_device_that_chooses_wrongly_is_found_at_its_first_token(opened: Bundle, kind: Any) -> None:
    class WrongDevice(HostDevice):
        def greedy_tokens(self, *arguments: Any) -> HostGreedyTokens:
            chooser: HostGreedyTokens = kind(*arguments)
            return chooser

    pipeline = make_pipeline(opened, WrongDevice())
    with pytest.raises(BackendError, match=r"the device chose token \d+, .* this is a fault of the device's kernels"):
        tokens(pipeline, endless(pipeline))


def test_a_full_cache_is_refused(bundle: Path) -> None:
    pipeline = make_pipeline(Bundle(bundle, verify=False))
    decoder, greedy = greedy_decoder(pipeline, new_tokens=2)
    held = [int(cache.lengths[0]) for cache in decoder._caches]
    token = greedy.step(1)
    token = greedy.step(token)
    with pytest.raises(PromptError, match=r"a cache of \d+ tokens is full"):
        greedy.step(token)
    assert [int(cache.lengths[0]) for cache in decoder._caches] == [length + 2 for length in held]
