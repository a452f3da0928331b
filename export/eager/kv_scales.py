"""Scales for KV caches in int8: the largest number of each channel that films leave in caches of floats, and some room.

    all films but one --eager model, caches of floats--> keys and values --largest of a channel * ROOM / 127--> scales
    the last film     --the same model-------------------> keys and values --share beyond 127 steps----------> clipped

Keys are cached behind their rotation, and so are they measured. Drawn clips come first, and films of the user are
added: what a channel reaches is mostly the model's doing. Of the tiny trained model's own films 0.007 % of the numbers
lie beyond what four drawn clips and ROOM leave, the furthest 1.2 times as far; beyond what four of its own films leave
it is 0.013 %. What lies beyond is clipped, so its share is measured on a film that the scales were not, and kept in the
manifest; too much of it ends the build.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from framefusion.errors import BudgetError, CheckpointError
from framefusion.export.check.observation import FRAMES, QUESTION, Doing, draw_clip, ignore
from framefusion.export.check.verify import memory_of_check, memory_of_streamed
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.calibration.prompts import named
from framefusion.export.eager.pipeline import eager_loaders, in_fp32, uncompiled_bundle
from framefusion.export.machine import available_memory
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.kv_cache import KEY, VALUE, KvScales
from framefusion.ops.kv_cache import MOST_CODE
from framefusion.runtime.backends.host import host_array
from framefusion.runtime.pipeline import Pipeline, Request, dense_pipeline, dense_request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual

ROOM = 1.5
"""Times the largest that was measured: a step is larger by as much, and what nobody measured is clipped less."""
MOST_CLIPPED = 1e-3
"""Share of the numbers of further tokens beyond the codes from where on a build is refused."""
STREAMED_FRAMES = 4
Film = Path | NDArray[np.uint8]
Caches = dict[tuple[int, str], NDArray[np.float32]]
"""Layer and part -> what a prompt left there, [Hkv, S, hd]."""


def measure_scales(plan: BuildPlan, scratch: Path, films: Sequence[Path] = (), doing: Doing = ignore) -> None:
    """Measure the scales of a plan, which its graphs get when they are written.

    Args:
        plan: with caches in int8.
        scratch: a folder in which something is written for a while.
        films: of the user, beside drawn clips; the last one says how much is clipped.
        doing: called with what runs now.

    Raises:
        BudgetError: the eager model does not fit the memory that is free, or too much of a further film is clipped.
        CheckpointError: a number of a cache is infinite, or none.
        VideoError: a film cannot be read.
    """
    assert plan.kv_scales is not None
    assert plan.in_floats is not None  # there are codes: those of caches
    # 1. the eager model with caches of floats, whole or with weights read as they are used
    streamed = _is_streamed(plan.in_floats)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".scales-") as folder:
        bundle = in_fp32(uncompiled_bundle(plan.in_floats, Path(folder) / "bundle"), plan.in_floats)
        pipeline = dense_pipeline(Pipeline(bundle, EagerBackend(eager_loaders(plan.in_floats, streamed=streamed))))
        shown: list[Film] = [*_drawn(STREAMED_FRAMES if streamed else FRAMES), *films]
        *measured, last = shown
        # 2. scales from all films but the last one
        tokens = 0
        largest: Caches = {}
        for number, film in enumerate(measured, 1):
            doing(f"scales of the KV cache, film {number}")
            caches = _caches(pipeline, film)
            tokens += next(iter(caches.values())).shape[1]
            largest = {place: _larger(largest.get(place), held, place) for place, held in caches.items()}
        _put(plan.kv_scales, largest)
        # 3. what of the last film lies beyond them; then it counts as well
        doing("scales of the KV cache, clipped")
        caches = _caches(pipeline, last)
        clipped = clipped_share(plan.kv_scales, caches)
        _put(plan.kv_scales, {place: _larger(largest[place], held, place) for place, held in caches.items()})
    plan.kv_scales.measured(tokens, clipped)
    if clipped > MOST_CLIPPED:
        raise BudgetError(
            f"--kv-cache-dtype int8: {clipped:.2%} of a further film's keys and values lie beyond the scales, at most "
            f"{MOST_CLIPPED:.2%} may: give more films like yours with --calibrate, or build without it"
        )


def clipped_share(scales: KvScales, caches: Caches) -> float:
    """Share of the numbers of caches whose nearest code would lie beyond the last one."""
    beyond = 0
    for (layer, part), held in caches.items():
        steps = np.abs(held) / scales.scale(layer, part)[0].float().numpy()
        beyond += int(np.count_nonzero(steps > MOST_CODE + 0.5))
    return beyond / sum(held.size for held in caches.values())


def _is_streamed(plan: BuildPlan) -> bool:
    """Whether weights are to stay on the disk.

    Raises:
        BudgetError: the eager model fits in neither way.
    """
    free = available_memory()
    if memory_of_check(plan) <= free:
        return False
    least = memory_of_streamed(plan)
    if least > free:
        raise BudgetError(
            f"--kv-cache-dtype int8 measures scales with the eager model, which needs {least / 1e9:.1f} GB of memory; "
            f"{free / 1e9:.1f} GB are free: build where there is more, or without it"
        )
    return True


def _put(scales: KvScales, largest: Caches) -> None:
    """Scales by which the largest numbers of each channel, [Hkv, hd], have a code, and ROOM times as large ones."""
    for (layer, part), most in largest.items():
        scales.put(layer, part, torch.from_numpy(most * np.float32(ROOM / MOST_CODE)))


def _drawn(frames: int) -> Iterator[NDArray[np.uint8]]:
    """Clips of unlike pictures: the check's, its negative and its mirror image in other colours, noise, and patches."""
    clip = draw_clip(frames)
    generator = np.random.default_rng(1)
    yield clip
    yield 255 - clip
    yield generator.integers(0, 256, clip.shape, np.uint8)
    yield np.ascontiguousarray(clip[:, ::-1, :, ::-1])
    patches = generator.integers(0, 256, (frames, 4, 6, 3), np.uint8)
    yield patches.repeat(clip.shape[1] // 4, 1).repeat(clip.shape[2] // 6, 2)


def _caches(pipeline: Pipeline, film: Film) -> Caches:
    """What a prompt about a film leaves in the caches, without a reduction."""
    turns = [Turn("user", (Visual.VIDEO, QUESTION))]
    with named(str(film) if isinstance(film, Path) else "a drawn clip"):
        visuals = pipeline.read_visuals(turns, [film], pipeline.manifest.sampling, Stopwatch())
        prompt = pipeline.prompt(turns, visuals)
    rows = pipeline.embed(prompt, [pipeline.encode_visual(patches) for patches in visuals])
    request = dense_request(pipeline.manifest, Request(max_new_tokens=1))
    prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    found: Caches = {}
    for record, cache in zip(pipeline.manifest.segments, prefilled.caches, strict=True):
        for index, layer in enumerate(record.attention_layers):
            length = int(cache.lengths[index])
            found[layer, KEY] = host_array(cache.keys[index])[0, :, :length]
            found[layer, VALUE] = host_array(cache.values[index])[0, :, :length]
    return found


def _larger(
    before: NDArray[np.float32] | None, held: NDArray[np.float32], place: tuple[int, str]
) -> NDArray[np.float32]:
    """The largest magnitude of each channel so far.  [Hkv, hd], [Hkv, S, hd] -> [Hkv, hd]"""
    largest: NDArray[np.float32] = np.abs(held).max(1)
    if not np.isfinite(largest).all():
        raise CheckpointError(
            f"keys or values of layer {place[0]} are infinite or no numbers, for which there is no scale"
        )
    return largest if before is None else np.maximum(before, largest)
