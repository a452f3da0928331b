"""Judges what a backend or a device makes of the building blocks: error, limit, right or wrong.

Errors are relative to the largest number that is expected. A limit follows from the type and the length of the sums:

    4 eps(type)       a result is rounded once, and so are the shares that values are summed with, and scores up to 4
    N eps(float32)    each of N products is added in fp32, by whatever order

Products of weights in codes have a limit of their own: what rounding their activations to 8 bits may move, and

    4 eps(float16)     in fp32, whose scales may be in half types
    N eps(float16) / 2 in float16: each of N products may be added up in fp16, as a kernel for ARM does
    4 eps(bfloat16)    in bfloat16

Caches in 8 bits are the backend's own codes: they are not looked into, and what attends over them may be off by four
steps of the 127 that a number has on each side of 0.

Knows no bundle and no library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.reduction.plan import merge_plan, prune_plan
from framefusion.runtime.backends.base import Device, GraphRunner
from framefusion.runtime.backends.buffer import Buffer, float_type
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.proof.blocks import cases, codes, reference
from framefusion.runtime.proof.blocks.cases import Case

EPSILON: Mapping[str, float] = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_STEP: Mapping[str | None, float] = {None: 0.0, "uint8": 2.0**-7}
"""Of caches of a backend's own, as a share of the largest number in them."""
_ROUNDINGS = 4
_TERMS: Mapping[str, int] = {
    "normed": cases.WIDTH,
    "attended": cases.HEAD_DIM,
    "tower": cases.HEAD_DIM,
    "similarity": cases.WIDTH,
    "importance": cases.HEAD_DIM,
}
_EXACT = ("present_key_0", "present_value_0")  # moved, not computed
_IN_CODES: Mapping[str, float] = {
    "float32": _ROUNDINGS * EPSILON["float16"],
    "float16": codes.WIDTH * EPSILON["float16"] / 2,
    "bfloat16": _ROUNDINGS * EPSILON["bfloat16"],
}
_RECORD = SegmentRecord("blocks", "blocks", (0,), 0, scores=True, head=False, weight_bytes=0, buckets=None)
_IN_FP32 = ("similarity", "importance")  # whatever the type of the rows, unless a backend says otherwise


@dataclass(frozen=True)
class Check:
    """A comparison.

    Attributes:
        block: what was compared.
        case: in which situation.
        error: the largest, relative to the largest number that is expected; NaN where a result is.
        limit: that it may reach.
    """

    block: str
    case: str
    error: float
    limit: float

    @property
    def right(self) -> bool:
        """Whether it is within the limit; NaN is not."""
        return self.error <= self.limit

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values; an error that is no number, or infinite, is null."""
        error = self.error if np.isfinite(self.error) else None
        return {"block": self.block, "case": self.case, "error": error, "limit": self.limit, "right": self.right}


def limit_of(output: str, dtype: str, importance: str = "float32", caches: str | None = None) -> float:
    """The largest error of an output in graphs of a type; importance and caches may be in types of their own."""
    if output in _EXACT:
        return 0.0
    if output == "attended" and caches is not None:
        return _ROUNDINGS * max(_STEP[caches], EPSILON[dtype]) + cases.HEAD_DIM * EPSILON["float32"]
    rounding = EPSILON["float32" if output in _IN_FP32 else dtype]
    rounding = EPSILON[importance] if output == "importance" else rounding
    return _ROUNDINGS * rounding + _TERMS.get(output, 1) * EPSILON["float32"]


def check_graph_blocks(
    backend: GraphRunner, graph: str, dtype: str, importance: str = "float32", caches: str | None = None
) -> Iterator[Check]:
    """Run all cases through a graph of building blocks.

    Args:
        backend: that opens the graph.
        graph: its name.
        dtype: of the graph, "float16", ...
        importance: type that the backend computes it in.
        caches: type of caches that are the backend's own codes.

    Raises:
        BackendError: the backend refuses it.
        BundleError: the library cannot load it.
    """
    element = float_type(dtype)
    cache: SegmentCache | None = None
    for case in cases.block_cases(element):
        # 1. The first case of a prompt begins with slots that hold anything; the others go on with what is there.
        if case.cache is not None:
            cache = backend.cache(replace(_RECORD, graph=graph), [part.shape for part in case.cache[:1]], element)
            for target, part in zip((cache.keys[0], cache.values[0]), case.cache, strict=True):
                if caches is None:
                    backend.device.copy(target, backend.device.upload(part))
        assert cache is not None, "the first case has a cache"
        # 2. Run it as a segment is run: every buffer bound, caches in place.
        results = _run(backend, graph, case, cache, element)
        # 3. Compare what counts.
        for name, expected in case.expected.items():
            if caches is not None and name in _EXACT:
                continue
            limit = limit_of(name, dtype, importance, caches)
            yield compare(cases.BLOCKS[name], case.name, _counting(results[name], expected), expected, limit)


def check_code_blocks(backend: GraphRunner, dialect: str, dtype: str, weights: str) -> Iterator[Check]:
    """Run all cases of products through the graph of weights in codes of a type.

    Args:
        backend: that opens the graph.
        dialect: of it.
        dtype: of it, "float16", ...
        weights: type of the codes, "int8" or "int4".

    Raises:
        BackendError: the backend refuses it.
        BundleError: the library cannot load it.
    """
    device = backend.device
    element = float_type(dtype)
    graph = codes.codes_name(dialect, dtype, weights)
    forms = codes.formats_of(dialect, weights)
    for case in codes.code_cases(forms, element):
        shape = (*case.hidden.shape[:2], codes.OUTPUTS)
        outputs: dict[str, Buffer] = {form.output: device.zeros(shape, element) for form in forms}
        backend.bind(graph, {"hidden": device.upload(case.hidden)}, outputs, None).run()
        for form in forms:
            result = device.download(outputs[form.output])[0]
            limit = case.rounded[form.output] + _IN_CODES[dtype]
            yield compare(form.block, case.name, result, case.expected[form.output], limit)


def _run(
    backend: GraphRunner, graph: str, case: Case, cache: SegmentCache, element: np.dtype[Any]
) -> dict[str, NDArray[Any]]:
    device = backend.device
    length = case.inputs["hidden"].shape[1]
    inputs = {name: device.upload(np.ascontiguousarray(part)) for name, part in case.inputs.items()}
    widths = dict.fromkeys(cases.ROW_OUTPUTS, cases.QUERY_WIDTH) | {"normed": cases.WIDTH, "activated": cases.WIDTH}
    outputs: dict[str, Buffer] = {name: device.zeros((1, length, width), element) for name, width in widths.items()}
    outputs |= {name: device.zeros((length,), np.float32) for name in _IN_FP32}
    backend.bind(graph, inputs, outputs, cache).run()
    return {name: device.download(buffer) for name, buffer in (outputs | cache.named("present")).items()}


def _counting(result: NDArray[Any], expected: NDArray[Any]) -> NDArray[Any]:
    """The rows or slots of a result that something is expected of."""
    if result.ndim == 4:
        return result[0, :, : expected.shape[1]]
    return result.reshape(-1, result.shape[-1])[: len(expected)] if result.ndim == 3 else result[: len(expected)]


def check_device_blocks(device: Device, dtype: str) -> Iterator[Check]:
    """What is done to rows between segments: moved, added up, averaged, compared with the frame before.

    Args:
        device: to prove.
        dtype: of the rows.
    """
    element = float_type(dtype)
    random = np.random.default_rng(14)
    length = 300
    width = 640
    rows = random.standard_normal((length, width)).astype(element)
    labels = np.arange(length) % 25 - 5
    labels[labels < 0] = -1
    there = device.upload(rows)
    index = random.permutation(length)[:77]
    places = random.integers(0, length, (50, 4))
    weights = random.random((50, 4)).astype(np.float32)
    wide = rows.astype(np.float64)
    computed = _ROUNDINGS * EPSILON[dtype]
    # 1. Moved: not a bit may change.
    yield compare("take rows", "", device.download(device.take(there, index))[:77], wide[index], 0)
    target = device.zeros((length, width), element)
    device.put(target, index, device.take(there, index))
    placed = np.zeros_like(wide)
    placed[index] = wide[index]
    yield compare("put rows", "", device.download(target), placed, 0)
    yield compare("pad rows", "", device.download(device.padded(there, length, 320))[:length], wide, 0)
    yield compare("change of type", "", device.download(device.typed(there, np.float32)), wide, 0)
    # 2. Added up, and rounded once.
    mixed = (wide[places] * weights[..., None].astype(np.float64)).sum(1)
    yield compare("weighted sums", "", device.download(device.mix(there, places, weights))[:50], mixed, computed)
    # 3. Reduced: means of runs, and tokens that are dropped.
    merged = (random.random(length) < 0.6) & (labels >= 0) & (np.arange(length) >= 25)
    for name, plan in (
        ("merge", merge_plan(labels, merged)),
        ("prune", prune_plan(labels, random.random(length), 90)),
    ):
        result = device.download(device.reduced(there, plan))[: plan.kept.size]
        yield compare("reduction", name, result, reference.reduced(rows, plan), computed)
    # 4. Scored.
    previous = reference_previous(labels)
    limit = _ROUNDINGS * EPSILON["float32"] + width * EPSILON["float32"]
    yield compare("similarity", "", device.similarity(there, labels), reference.similarity(wide, previous), limit)


def reference_previous(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token before each in its track by the definition: the last one before it with its label; -1 without one."""
    latest: dict[int, int] = {}
    previous = np.full(labels.size, -1, np.int64)
    for place, label in enumerate(labels.tolist()):
        if label >= 0:
            previous[place] = latest.get(label, -1)
            latest[label] = place
    return previous


def compare(block: str, case: str, result: NDArray[Any], expected: NDArray[Any], limit: float) -> Check:
    """A check of a result; one of another shape is infinitely wrong."""
    if result.shape != expected.shape:
        return Check(block, case, float("inf"), limit)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(result.astype(np.float64) - expected).max()
    return Check(block, case, float(error / np.abs(expected).max()), limit)


def host_blocks() -> Iterator[Check]:
    """The CPU as a device."""
    return check_device_blocks(HOST, "float32")
