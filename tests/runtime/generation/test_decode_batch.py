"""Requests that decode together: whatever runs beside one of them, it gets the tokens and logits that it gets alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framefusion.errors import BackendError, PromptError
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeSegment
from framefusion.runtime.backends.tensorrt.cache_pool import CachePool
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.generation.batching.decode_batch import SLOTS, DecodeBatch
from framefusion.runtime.memory import slot_bytes
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Request, Step, Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.films import write_film
from tests.versions import needs_int8_caches, needs_portable

COSTS = (1.0, 0.6, 0.3)
MOST = 12  # new tokens


@dataclass(frozen=True)
class Plan:
    """One request of a trial."""

    prompt: int
    cost: float
    new_tokens: int
    begins: int  # round
    cancelled_after: int | None  # rounds


@dataclass
class Bench:
    """A pipeline, prompts of several lengths, and the answers that requests get alone."""

    pipeline: Pipeline
    prompts: list[tuple[Any, Any]]
    alone: dict[tuple[int, float], list[Step]] = field(default_factory=dict)

    def steps(self, prompt: int, request: Request, batch: DecodeBatch | None) -> Generator[Step, None, None]:
        (laid_out, rows) = self.prompts[prompt]
        stopwatch = Stopwatch()
        prefilled = self.pipeline.prefill(laid_out, rows, request, stopwatch)
        return self.pipeline.decode(laid_out, prefilled, request, stopwatch, logits=True, batch=batch)

    def expected(self, plan: Plan) -> list[Step]:
        """Token steps of the request by itself; a shorter answer is the beginning of a longer one."""
        key = plan.prompt, plan.cost
        if key not in self.alone:
            steps = self.steps(plan.prompt, self.request(plan, MOST), None)
            self.alone[key] = [step for step in steps if step.kind == "token"]
        return self.alone[key][: plan.new_tokens]

    def request(self, plan: Plan, new_tokens: int) -> Request:
        fixed = self.pipeline.manifest.reduction.mode == "fixed"  # its cost is built in
        return Request(new_tokens, cost=None if fixed else plan.cost)


@cache
def bench_of(name: str, folder: Path) -> Bench:
    pipeline = Pipeline(Bundle(shared(name), verify=False), threads=2)
    films = [write_film(folder / f"{frames}.mp4", seed=frames, frames=frames) for frames in (4, 12)]
    turns = [Turn("user", (Visual.VIDEO, "What happens?")), Turn("user", (Visual.VIDEO, "And then " * 9))]
    pairs = list(zip(turns, films, strict=True))[: 1 if name.startswith("fixed") else 2]  # the longer one does not fit
    prompts = [pipeline.read([turn], [film]) for turn, film in pairs]
    prompts += prompts[: 2 - len(prompts)]
    prompts.append(pipeline.read("Hello"))
    return Bench(pipeline, prompts)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench_of("bundle", tmp_path_factory.mktemp("films"))


def run(bench: Bench, plans: list[Plan], order: Iterator[float] | None = None) -> DecodeBatch:
    """All requests of a trial in rounds, each compared step by step with the one alone."""
    batch = DecodeBatch(bench.pipeline.segments)
    waiting = sorted(plans, key=lambda plan: plan.begins)
    running: list[tuple[Plan, Generator[Step, None, None], int]] = []
    taken = {id(plan): 0 for plan in plans}
    number = 0
    while waiting or running:
        while waiting and waiting[0].begins <= number:
            plan = waiting.pop(0)
            running.append((plan, bench.steps(plan.prompt, bench.request(plan, plan.new_tokens), batch), number))
        stay = []
        for plan, steps, begun in running:
            if plan.cancelled_after is not None and number - begun >= plan.cancelled_after:
                steps.close()
                continue
            if order is not None and next(order) < 0.3:  # a consumer that is slow: it is not fed in this round
                stay.append((plan, steps, begun))
                continue
            step = next(steps, None)
            if step is None:
                assert taken[id(plan)] == len(bench.expected(plan))
                continue
            if step.kind == "token":
                reference = bench.expected(plan)[taken[id(plan)]]
                assert step.token_id == reference.token_id
                assert step.logits is not None
                np.testing.assert_array_equal(step.logits, reference.logits)
                taken[id(plan)] += 1
            stay.append((plan, steps, begun))
        running = stay
        number += 1
    return batch


def test_requests_of_unequal_lengths_are_decoded_together(bench: Bench) -> None:
    rows: list[int] = []
    plans = [Plan(prompt, cost, 4, 0, None) for prompt, cost in ((0, 1.0), (1, 0.3), (2, 1.0))]
    batch = DecodeBatch(bench.pipeline.segments, rows.append)
    steps = [bench.steps(plan.prompt, bench.request(plan, 4), batch) for plan in plans]
    for _ in range(7):
        for each in steps:
            next(each, None)
    assert rows == [3, 3, 3]
    assert len(batch) == 0
    assert batch.nbytes == 0
    run(bench, plans)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed-gqa", pytest.param("fixed", marks=needs_portable)])
def test_layers_of_a_fixed_bundle_have_lengths_of_their_own(name: str, tmp_path: Path) -> None:
    """One segment, whose static prefill reduces inside: its decode graph is free in its rows."""
    bench = bench_of(name, tmp_path)
    run(bench, [Plan(prompt, 1.0, new_tokens, begins, None) for prompt, new_tokens, begins in ((0, 9, 0), (2, 6, 1))])


@pytest.mark.slow
@needs_int8_caches
def test_caches_in_int8_are_moved_and_shared_as_they_are(tmp_path: Path) -> None:
    """Also where one leaves and another takes its place in slabs of codes."""
    bench = bench_of("int8-caches", tmp_path)
    plans = [Plan(0, 1.0, 9, 0, None), Plan(1, 0.3, 4, 1, 2), Plan(2, 1.0, 6, 2, None), Plan(1, 0.6, 5, 5, None)]
    batch = run(bench, plans)
    assert (len(batch), batch.nbytes) == (0, 0)
    step = bench.steps(0, bench.request(plans[0], 4), batch)
    next(step)
    next(step)
    assert batch.nbytes > 0
    floats = bench_of("bundle", tmp_path).pipeline.manifest
    codes = bench.pipeline.manifest
    assert slot_bytes(floats) == 4 * slot_bytes(codes)
    step.close()


PLANS = st.builds(
    Plan,
    prompt=st.integers(0, 2),
    cost=st.sampled_from(COSTS),
    new_tokens=st.integers(1, MOST),
    begins=st.integers(0, 15),
    cancelled_after=st.one_of(st.none(), st.integers(0, MOST)),
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans=st.lists(PLANS, min_size=1, max_size=9), seed=st.one_of(st.none(), st.integers(0, 1 << 30)))
def test_whatever_runs_beside_a_request_its_tokens_are_those_of_itself_alone(
    bench: Bench, plans: list[Plan], seed: int | None
) -> None:
    random = np.random.default_rng(seed)
    order = None if seed is None else iter(random.random, 2.0)
    batch = run(bench, plans, order)
    assert len(batch) == 0
    assert batch.nbytes == 0


class StaticBackend(OnnxRuntimeBackend):
    """ONNX Runtime behind what engines have: slabs of one size, steps of some numbers of rows."""

    batch_sizes: Sequence[int] | None = (2, 4, 6)

    def __init__(self, bundle: Bundle, slots: int) -> None:
        super().__init__(bundle.folder, threads=2, manifest=bundle.manifest)
        layers = {record.name: [slots] * len(record.attention_layers) for record in bundle.manifest.segments}
        self.pool = CachePool(HOST, layers)
        self.bound: list[int] = []  # rows of each step that was bound

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: Any) -> SegmentCache:
        return self.pool.take(record, shapes, dtype)

    def bind(self, graph: str, inputs: Any, outputs: Any, cache: SegmentCache | None) -> OnnxRuntimeSegment:
        if inputs["hidden"].shape[1] == 1 and cache is not None and graph.startswith("segments/rest"):
            self.bound.append(inputs["hidden"].shape[0])
        return super().bind(graph, inputs, outputs, cache)


@pytest.mark.slow
def test_steps_of_some_numbers_of_rows_are_padded_and_bound_once(tmp_path: Path) -> None:
    """Slabs of one size, whose rows are full but for one slot; a prefill's caches are free once they were moved."""
    bundle = Bundle(shared("bundle"), verify=False)
    free = bench_of("bundle", tmp_path)
    longest = max(rows.length for _, rows in free.prompts) + MOST
    backend = StaticBackend(bundle, longest)
    bench = Bench(Pipeline(bundle, backend), free.prompts, free.alone)
    batch = DecodeBatch(bench.pipeline.segments)
    rows = [batch.join(bench.pipeline.prefill(*bench.prompts[2], Request(2), Stopwatch()).caches) for _ in range(6)]
    with pytest.raises(BackendError, match=r"6 requests are decoded, .*--max-batch-size"):
        batch.join(bench.pipeline.prefill(*bench.prompts[2], Request(2), Stopwatch()).caches)
    for row in rows:
        row.leave()
    assert {len(buffers) for place, buffers in backend.pool.free.items() if place.rows == 1} == {1}
    plans = [Plan(n % 3, COSTS[n % 2], 4 + n, n // 2, 3 if n == 2 else None) for n in range(6)]
    backend.bound.clear()
    batch = run(bench, plans)
    assert len(batch) == 0
    assert batch.nbytes > 0
    assert [backend.bound.count(rows) for rows in (2, 4, 6)] == [1, 1, 1]


@needs_portable
@pytest.mark.slow
def test_graphs_of_the_portable_dialect_decode_together(tmp_path: Path) -> None:
    """Standard operators over caches of unequal lengths: each request gets the logits that it gets alone."""
    bench = bench_of("portable-512", tmp_path)
    plans = [Plan(prompt, cost, 9 - 2 * place, place, None) for place, (prompt, cost) in enumerate(
        ((0, 1.0), (1, 0.3), (2, 1.0), (0, 0.6)))]  # fmt: skip
    run(bench, plans)


@pytest.mark.slow
def test_a_cache_of_its_own_comes_back_as_it_was_written(bench: Bench) -> None:
    """Moved in, moved to another row, grown over, and out again: equal to the caches of the request alone."""
    request = Request(MOST, cost=1.0)
    laid_out, rows = bench.prompts[0]
    alone = bench.pipeline.prefill(laid_out, rows, request, Stopwatch())
    list(bench.pipeline.decode(laid_out, alone, request, Stopwatch()))
    batch = DecodeBatch(bench.pipeline.segments)
    first = bench.steps(2, request, batch)
    together = bench.pipeline.prefill(laid_out, rows, request, Stopwatch())
    steps = bench.pipeline.decode(laid_out, together, request, Stopwatch(), batch=batch)
    for _ in range(4):
        next(first)
        next(steps)
    first.close()  # the second one takes its row
    grown = bench.steps(1, Request(SLOTS, cost=1.0), batch)  # longer than a slab: all of it is replaced
    for _ in range(3):
        next(grown)
    list(steps)
    for ours, theirs in zip(together.caches, alone.caches, strict=True):
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)
        for layer, length in enumerate(theirs.lengths):
            assert ours.capacities[layer] == length
            for name in ("keys", "values"):
                np.testing.assert_array_equal(getattr(ours, name)[layer], getattr(theirs, name)[layer][:, :, :length])
    grown.close()
    assert batch.nbytes == 0


@pytest.mark.slow
def test_rows_refuse_what_they_have_no_room_for(bench: Bench) -> None:
    laid_out, rows = bench.prompts[2]
    done = bench.pipeline.prefill(laid_out, rows, Request(1), Stopwatch())
    batch = DecodeBatch(bench.pipeline.segments)
    row = batch.join(done.caches)
    model = bench.pipeline.manifest.model
    inputs = [np.zeros(width, np.float32) for width in (model.hidden_size, *[model.head_dim // 2] * 2)]
    row.feed(*inputs)
    assert np.isfinite(row.logits()).all()
    with pytest.raises(PromptError, match="is full"):
        row.feed(*inputs)
    with pytest.raises(ValueError, match="not fed"):
        row.logits()
    row.leave()
    row.leave()
    assert len(batch) == 0


@pytest.mark.slow
def test_numbers_that_are_none_stay_in_no_slot(bench: Bench) -> None:
    """Else a backend that masks what another row left would multiply them by zero."""
    laid_out, rows = bench.prompts[2]
    batch = DecodeBatch(bench.pipeline.segments)
    first, second = (
        batch.join(bench.pipeline.prefill(laid_out, rows, Request(4), Stopwatch()).caches) for _ in range(2)
    )
    values: Any = first.caches[0].values[0]
    values[:, :, 1] = np.inf
    model = bench.pipeline.manifest.model
    inputs = [np.zeros(width, np.float32) for width in (model.hidden_size, *[model.head_dim // 2] * 2)]
    for row in (first, second):
        row.feed(*inputs)
    assert [bool(np.isfinite(row.logits()).all()) for row in (first, second)] == [False, True]
    first.leave()
    slabs: Any = [buffer for slab in batch._slabs for buffer in (*slab.keys, *slab.values)]
    assert all(np.isfinite(buffer).all() for buffer in slabs)
    second.leave()


@pytest.mark.slow
def test_sessions_share_a_batch_and_keep_their_conversations(bench: Bench, film: Path) -> None:
    """Two conversations of two turns in lockstep, one of which gives a turn up and puts it again."""
    pipeline = bench.pipeline
    request = Request(6)
    turns = ("What happens?", "And then?")

    def alone() -> list[Any]:
        session = pipeline.session()
        return [session.ask(turns[0], [film], request), session.ask(turns[1], (), request)]

    expected = alone()
    batch = DecodeBatch(pipeline.segments)
    sessions = [pipeline.session(batch=batch) for _ in range(2)]
    first = [session.stream([Turn("user", (Visual.VIDEO, turns[0]))], [film], request) for session in sessions]
    given_up = pipeline.session(batch=batch).stream("Hello", (), request)
    tokens: list[list[int]] = [[], []]
    for _ in range(9):  # prefill, six tokens, the end, and behind it
        next(given_up, None)
        for found, steps in zip(tokens, first, strict=True):
            found += [step.token_id for step in [next(steps, None)] if step is not None and step.token_id is not None]
    assert tokens == [list(expected[0].token_ids)] * 2
    half = sessions[0].stream(turns[1], (), request)
    for _ in range(4):
        next(half)
    half.close()
    assert len(batch) == 0
    for session in sessions:
        answer = session.ask(turns[1], (), request)
        assert answer.token_ids == expected[1].token_ids
        assert session.records[-1].reused_tokens > expected[0].prompt_tokens
