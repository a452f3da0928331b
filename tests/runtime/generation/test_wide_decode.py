"""What engines ask of prefill and decode, on the CPU: steps of two tokens, caches of static length that are shared."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import PromptError
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.backends.tensorrt.cache_pool import CachePool
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared

STEPS = 6
SLOTS = 400
ROUNDING = 2e-5  # fp32 logits of magnitude 1: a sum over a longer, masked cache is rounded in another order


class StaticBackend(OnnxRuntimeBackend):
    """ONNX Runtime behind the caches and the step width of an engine."""

    def __init__(self, bundle: Bundle, slots: int = SLOTS) -> None:
        super().__init__(bundle.folder, threads=1, decode_width=2)
        layers = {s.name: [slots] * len(s.attention_layers) for s in bundle.manifest.segments}
        self.pool = CachePool(HOST, layers)

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
        return self.pool.take(record, shapes, dtype)


SLOW = pytest.mark.slow
KINDS = ["gqa", pytest.param("portable", marks=SLOW), pytest.param("fixed", marks=SLOW)]


@pytest.fixture(scope="module", params=KINDS)
def static(request: pytest.FixtureRequest) -> Bundle:
    """The adaptive mode in both dialects, and the fixed mode in the one that engines are compiled from."""
    return Bundle(shared({"gqa": "bundle"}.get(request.param, request.param)), verify=False)


def prefilled(pipeline: Pipeline, film: Path, question: str = "What happens?") -> tuple[Any, Prefilled]:
    prompt, rows = pipeline.read([Turn("user", (Visual.VIDEO, question))], [film])
    return prompt, pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch())


def decoded(pipeline: Pipeline, prompt: Any, done: Prefilled) -> list[np.ndarray[Any, Any]]:
    """Logits of the prefill and of steps that say fixed tokens."""
    decoder, found = Decoder(pipeline.segments, done.caches), [done.logits.copy()]
    cos, sin = pipeline.rope(decode_positions(prompt.token_ids.size, prompt.rope_delta, STEPS))
    for step in range(STEPS - 1):
        row = pipeline.embedding(np.array([7 * step + 5]))[0]
        found.append(decoder.step(row, cos[step], sin[step]).copy())
    return found


def test_steps_of_two_tokens_say_what_steps_of_one_say(static: Bundle, film: Path) -> None:
    narrow = Pipeline(static, OnnxRuntimeBackend(static.folder, threads=1))
    wide = Pipeline(static, StaticBackend(static))
    results = [(done.kept, decoded(pipeline, prompt, done)) for pipeline in (narrow, wide)
               for prompt, done in [prefilled(pipeline, film)]]  # fmt: skip
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=ROUNDING * np.abs(theirs).max())


def test_what_an_earlier_request_left_in_the_caches_does_not_show(static: Bundle, film: Path) -> None:
    pipeline = Pipeline(static, StaticBackend(static))
    prompt, done = prefilled(pipeline, film)
    fresh = decoded(pipeline, prompt, done)
    first = HOST.download(done.caches[0].keys[0]).ctypes.data
    del done
    prefilled(pipeline, film, "Something else, and longer than that?")
    prompt, again = prefilled(pipeline, film)
    assert HOST.download(again.caches[0].keys[0]).ctypes.data == first  # the very memory
    np.testing.assert_array_equal(decoded(pipeline, prompt, again), fresh)


def test_whoever_holds_caches_keeps_them(static: Bundle, film: Path) -> None:
    pipeline = Pipeline(static, StaticBackend(static))
    prompt, held = prefilled(pipeline, film)
    _, other = prefilled(pipeline, film, "Something else?")
    assert not np.shares_memory(HOST.download(other.caches[0].keys[0]), HOST.download(held.caches[0].keys[0]))
    _, alone = prefilled(pipeline, film)
    np.testing.assert_array_equal(decoded(pipeline, prompt, held), decoded(pipeline, prompt, alone))
    del held, other, alone
    gc.collect()
    assert prefilled(pipeline, film)[1].caches


def test_a_cache_that_is_too_short_is_refused_before_the_prefill(static: Bundle, film: Path) -> None:
    pipeline = Pipeline(static, StaticBackend(static, slots=32))
    with pytest.raises(PromptError, match=r"layer 0 needs \d+ slots of KV cache, the engine has 32: .*--max-kv-cache"):
        prefilled(pipeline, film)
