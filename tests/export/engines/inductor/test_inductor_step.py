"""The decode step of several rows in inductor's engines: its parts, and requests that join and leave at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.export.engines.inductor import step
from framefusion.runtime.backends.inductor.backend import InductorBackend
from framefusion.runtime.backends.inductor.step import SLOTS_AT_ONCE, STEP, is_slotwise, whole_blocks
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine import cpu
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.text.prompt import Turn, Visual
from tests.films import write_film
from tests.runtime.generation.test_decode_batch import Bench, Plan, run

OPS = torch.ops.framefusion
ATTEND: Any = step.attend
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LENGTHS = (3, 512, 513, 1, 700, 1024)


def draw(seed: int) -> Callable[..., Tensor]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def operands(
    lengths: tuple[int, ...],
    slots: int,
    heads: int = HEADS,
    groups: int = KV_HEADS,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A token of each row and caches slot after slot in memory; slots that a row has not hold what others left."""
    new = [draw(1)(len(LENGTHS), 1, count * HEAD_DIM).to(dtype) for count in (heads, groups, groups)]
    held = [draw(2 + part)(len(LENGTHS), 1024, groups, HEAD_DIM).to(dtype) for part in range(2)]
    chosen = [LENGTHS.index(length) for length in lengths]
    caches = [cache[chosen, :slots].contiguous().transpose(1, 2) for cache in held]
    return [*(tensor[chosen] for tensor in new), *caches, torch.tensor(lengths)]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (7, 1), (1, 1), (16, 1), (14, 2)])
def test_a_token_of_each_row_attends_to_what_its_row_holds(heads: int, groups: int) -> None:
    given = operands(LENGTHS, 1024, heads, groups)
    found = ATTEND(*given, shown=1024)
    expected = OPS.cache_attention(*given, heads, groups)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32, sums in another order
    for cache, past in zip(found[1:], given[3:5], strict=True):  # a slot of each row is written, and no other
        assert [(row != 0).any(-1).any(0).nonzero().flatten().tolist() for row in cache - past] == [
            [length - 1] for length in LENGTHS
        ]


@pytest.fixture(params=[1, 2, 3, 8], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 1), (7, 1), (1, 1), (8, 4), (14, 2)])
def test_attention_of_a_row_is_its_own_whatever_is_beside_it(
    threads: int, heads: int, groups: int, dtype: torch.dtype
) -> None:
    together = ATTEND(*operands(LENGTHS, 1024, heads, groups, dtype), shown=1024)[0]
    for place, length in enumerate(LENGTHS):
        alone = ATTEND(*operands((length,), whole_blocks(length), heads, groups, dtype), shown=whole_blocks(length))[0]
        assert torch.equal(together[place], alone[0]), length


def test_one_block_of_keys_is_as_long_as_torch_takes_at_once() -> None:
    """Without whole blocks the bits are others: this is what the constant is for."""
    assert whole_blocks(1) == whole_blocks(SLOTS_AT_ONCE) == SLOTS_AT_ONCE
    assert whole_blocks(SLOTS_AT_ONCE + 1) == 2 * SLOTS_AT_ONCE


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)  # oneDNN of torch 2.11 splits a sum between 8
@pytest.mark.skipif(step.product_form(torch.float32, "cpu") != step.LINEAR, reason="this torch is without oneDNN")
@pytest.mark.skipif(
    "avx512f" not in cpu.features() and Version(torch.__version__) < Version("2.13"),
    reason="oneDNN of this torch, with AVX2 alone, adds up one to three rows behind the last six otherwise",
)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (896, 128), (1216, 224)])
def test_a_product_adds_up_a_row_alike_from_two_rows_on(threads: int, inputs: int, outputs: int) -> None:
    rows = draw(0)(9, inputs)
    weight = draw(1)(inputs, outputs)
    two = torch.cat([step.product(rows[[row, row]], weight)[:1] for row in range(9)])
    torch.testing.assert_close(two, rows @ weight, rtol=1e-4, atol=1e-4)
    for count in range(2, 10):
        assert torch.equal(step.product(rows[:count], weight), two[:count]), count
        assert torch.equal(step.product(rows[9 - count :], weight), two[9 - count :]), count


def test_caches_lie_slot_after_slot() -> None:
    cache: Any = torch.empty(3, 9, 2, 8).transpose(1, 2)
    assert is_slotwise(cache)
    assert is_slotwise(cache[:2])
    assert not is_slotwise(cache[:, :, :5])
    assert is_slotwise(cache[:1, :, :5])  # one row of a cut cache is read by its slots alone
    other: Any = torch.empty(1, 2, 9, 8)
    assert not is_slotwise(other)


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def bench(compiled: Callable[..., Bundle], tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    bundle = compiled(steps=True, cost=0.6, depth=2, max_input_len=1024)
    pipeline = Pipeline(bundle, InductorBackend(bundle, threads=request.param))
    films = [write_film(tmp_path / f"{frames}.mp4", seed=frames, frames=frames) for frames in (4, 12)]
    turns = [
        Turn("user", (Visual.VIDEO, "What happens?")),
        Turn("user", (Visual.VIDEO, "And then " * 60)),
    ]  # beyond a block of slots
    prompts = [pipeline.read([turn], [film]) for turn, film in zip(turns, films, strict=True)]
    return Bench(pipeline, [*prompts, pipeline.read("Hello")])


@pytest.mark.slow
def test_whatever_runs_beside_a_request_its_tokens_are_those_of_itself_alone(bench: Bench) -> None:
    """Requests that join, leave, are slow and are cancelled at random: every logit is compared, bit by bit."""
    assert bench.pipeline.segments.batch_refusal is None
    random = np.random.default_rng(0)
    for trial in range(60):
        plans = [
            Plan(
                prompt=int(random.integers(3)),
                cost=float(random.choice([1.0, 0.8, 0.6])),
                new_tokens=int(random.integers(1, 13)),
                begins=int(random.integers(16)),
                cancelled_after=int(random.integers(13)) if random.random() < 0.4 else None,
            )
            for _ in range(int(random.integers(1, 10)))
        ]
        batch = run(bench, plans, iter(random.random, 2.0) if trial % 2 else None)
        assert len(batch) == 0
        assert batch.nbytes == 0
    refused(bench.pipeline)


def refused(pipeline: Pipeline) -> None:
    """What an engine would read wrongly without an error, and engines that were compiled before there were steps."""
    backend: Any = pipeline.backend
    (first, *_) = pipeline.manifest.segments
    model = pipeline.manifest.model
    shape = (2, model.num_kv_heads, 256, model.head_dim)
    cache = backend.cache(first, [shape], np.float32)
    assert cache.keys[0].shape == (2, model.num_kv_heads, SLOTS_AT_ONCE, model.head_dim)
    rows = {"hidden": model.hidden_size, "cos": model.head_dim // 2, "sin": model.head_dim // 2}
    inputs: dict[str, Any] = {name: np.zeros((2, 1, width), np.float32) for name, width in rows.items()}
    inputs |= {"kv_len": np.ones(2, np.int64)}
    outputs = {"hidden_out": np.zeros((2, 1, model.hidden_size), np.float32)}
    backend.bind(first.decode, inputs, outputs, cache).run()
    with pytest.raises(BackendError, match=r"kv_len is int64 \(1,\)"):
        backend.bind(first.decode, inputs | {"kv_len": np.ones(1, np.int64)}, outputs, cache)
    with pytest.raises(BackendError, match=r"past_key_0 is float32 \(1,"):
        backend.bind(first.decode, inputs, outputs, backend.cache(first, [(1, *shape[1:])], np.float32))
    apart = np.zeros((2, 2 * SLOTS_AT_ONCE, model.num_kv_heads, model.head_dim), np.float32)
    cache.keys[0] = apart[:, :SLOTS_AT_ONCE].swapaxes(1, 2)  # the second row does not follow the first
    with pytest.raises(BackendError, match="past_key_0 does not lie slot after slot"):
        backend.bind(first.decode, inputs, outputs, cache)
    bundle = backend._bundle
    older = tuple(
        replace(engine, options={name: value for name, value in engine.options.items() if name != STEP})
        for engine in bundle.manifest.engines
    )
    bundle.manifest = replace(bundle.manifest, engines=older)
    reason = backend.batch_refusal(first.decode)
    assert "was compiled before there were batches: compile it again, ff-export compile" in str(reason)
