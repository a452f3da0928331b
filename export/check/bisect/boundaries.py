"""Graphs side by side at their boundaries: what eager torch gives for each, and how far another way of running is off.

A prompt with a drawn clip runs through the bundle's pipeline in eager torch, in fp32, and every call of a graph is
recorded. Another backend then gets the recorded inputs, call by call: an error stays in the graph that makes it. Knows
no node and no dialect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from framefusion.export.check.check import relative_error, tolerance_of
from framefusion.export.check.observation import QUESTION, draw_clip
from framefusion.export.check.quantized import rounding_of
from framefusion.export.eager.backend import EagerBackend, EagerSegment, Load
from framefusion.export.eager.pipeline import eager_loaders, in_fp32
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.backends.base import Backend, Device
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.host import HOST, host_array
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest, SegmentRecord
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual

_TOKENS = 2  # a prefill and one step
ALWAYS = ("logits", "similarity", "importance", "origin")  # outputs of one type in every bundle


@dataclass
class RecordedCall:
    """One run of a graph in eager torch: copies of its inputs and outputs, by name.

    Attributes:
        graph: name in the bundle.
        kind: "vision", "prefill" or "decode".
        inputs: without caches.
        past: caches before the run.
        outputs: the caches after it among them, as far as their slots are taken.
    """

    graph: str
    kind: str
    inputs: dict[str, Array]
    past: dict[str, Array]
    outputs: dict[str, Array]


@dataclass(frozen=True)
class Boundary:
    """One output of one call, in another way of running.

    Attributes:
        way: the backend.
        graph, kind: of the call.
        output: its name.
        error: relative to the largest magnitude of eager torch's.
        limit: of the error.
    """

    way: str
    graph: str
    kind: str
    output: str
    error: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the limit; a NaN is not."""
        return self.error <= self.limit


class _Recorder(EagerBackend):
    """Eager torch that writes its calls down."""

    def __init__(self, loaders: Mapping[str, Load], decode_width: int, vision: str) -> None:
        super().__init__(loaders)
        self.calls: list[RecordedCall] = []
        self._vision = vision
        self.chunk = None
        self.decode_width = decode_width
        self.prefilled = False

    def bind(  # type: ignore[override]
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> _Recorded:
        """See `Backend.bind`."""
        return _Recorded(super().bind(graph, inputs, outputs, cache), graph, self)

    def kind(self, graph: str) -> str:
        """What a graph is run for at present."""
        if graph == self._vision:
            return "vision"
        return "decode" if self.prefilled else "prefill"


@dataclass
class _Recorded:
    bound: EagerSegment
    graph: str
    recorder: _Recorder

    @property
    def inputs(self) -> Mapping[str, Array]:
        return {name: host_array(buffer) for name, buffer in self.bound.inputs.items()}

    @property
    def outputs(self) -> Mapping[str, Array]:
        return {name: host_array(buffer) for name, buffer in self.bound.outputs.items()}

    def run(self) -> None:
        cache = self.bound.cache
        inputs = {name: array.copy() for name, array in self.inputs.items()}
        if "previous" in inputs and (inputs["previous"] < 0).all():  # nobody reads the similarity: compare all the same
            inputs["previous"] = np.arange(inputs["previous"].size) - 1
            self.inputs["previous"][...] = inputs["previous"]
        past = {} if cache is None else _caches("past", cache)
        self.bound.run()
        outputs = {name: array.copy() for name, array in self.outputs.items()}
        outputs |= {} if cache is None else _caches("present", cache, inputs["kv_len"])
        self.recorder.calls.append(RecordedCall(self.graph, self.recorder.kind(self.graph), inputs, past, outputs))


def record(bundle: Bundle, plan: BuildPlan, decode_width: int = 1) -> list[RecordedCall]:
    """All graphs of a bundle in eager torch, in the order they run: vision, prefill, one step.

    Args:
        bundle: of which tokenizer and embedding table are read.
        plan: of the bundle.
        decode_width: tokens of a step, padding included: the widest of the backends that will get the inputs.
    """
    recorder = _Recorder(eager_loaders(plan, written=bundle.folder), decode_width, bundle.manifest.vision.graph)
    pipeline = Pipeline(in_fp32(bundle, plan), recorder)
    prompt, rows = pipeline.read([Turn("user", (Visual.VIDEO, QUESTION))], [draw_clip()])
    request = pipeline.clamp_new_tokens(Request(_TOKENS), prompt)
    prefilled = pipeline.prefill(prompt, rows, request, Stopwatch())
    recorder.prefilled = True
    token = np.array([int(prefilled.logits.argmax())])
    place = np.full((3, 1), prompt.token_ids.size + prompt.rope_delta)
    cos, sin = pipeline.rope(place)
    Decoder(pipeline.segments, prefilled.caches).step(pipeline.embedding(token)[0], cos[0], sin[0])
    return recorder.calls


def compare(call: RecordedCall, backend: Backend, manifest: Manifest) -> Iterator[Boundary]:
    """The errors of one call's outputs on a backend that is given the recorded inputs."""
    limit = limit_of(manifest, call.graph)
    for name, array in run(call, backend, manifest).items():
        yield Boundary(backend.name, call.graph, call.kind, name, relative_error(array, call.outputs[name]), limit)


def limit_of(manifest: Manifest, graph: str) -> float:
    """The limit of a graph's errors: that of a model with its number of layers; see `check`."""
    record = segment_of(manifest, graph)
    layers = manifest.model.num_layers if record is None else max(len(record.attention_layers), 1)
    rounded = 0.0 if record is None else rounding_of(manifest.quantization, manifest.dialect)
    coded = manifest.kv_cache is not None and record is not None
    return tolerance_of(getattr(torch, manifest.model.dtype), layers, rounded=rounded, coded_caches=coded)


def segment_of(manifest: Manifest, graph: str) -> SegmentRecord | None:
    """The segment that a graph belongs to, None for the vision tower's."""
    return next((s for s in manifest.segments if graph in s.graphs), None)


def run(call: RecordedCall, backend: Backend, manifest: Manifest) -> dict[str, Array]:
    """What a backend gives for the recorded inputs, in fp32; of caches the slots that are taken."""
    device = backend.device
    float_type = manifest.model.float_type
    record = segment_of(manifest, call.graph)
    inputs = {name: device.upload(typed(array, float_type)) for name, array in call.inputs.items()}
    given = {name: array for name, array in call.outputs.items() if not name.startswith("present_")}
    outputs = {
        name: device.zeros(array.shape, array.dtype if name in ALWAYS else float_type) for name, array in given.items()
    }
    cache = None if record is None else _filled(call, backend, record, manifest)
    backend.bind(call.graph, inputs, outputs, cache).run()
    found = {name: np.asarray(device.download(buffer)) for name, buffer in outputs.items()}
    found |= {} if cache is None else _caches("present", cache, call.inputs["kv_len"], device)
    return {name: array.astype(np.float32) for name, array in found.items()}


def typed(array: Array, float_type: Any) -> Array:
    """A recorded array as graphs of a type take it."""
    return np.ascontiguousarray(array.astype(float_type) if array.dtype == np.float32 else array)


def _filled(call: RecordedCall, backend: Backend, record: SegmentRecord, manifest: Manifest) -> SegmentCache:
    """Caches that hold what was in the recorded ones."""
    shapes = [call.past[f"past_key_{j}"].shape for j in range(len(record.attention_layers))]
    cache = backend.cache(record, shapes, manifest.cache_type)
    for name, buffer in cache.named("past").items():
        past = backend.device.upload(typed(call.past[name], manifest.model.float_type))
        backend.device.copy(buffer[:, :, : past.shape[2]], past)
    return cache


def _caches(prefix: str, cache: SegmentCache, taken: Array | None = None, device: Device = HOST) -> dict[str, Array]:
    """Copies by the graphs' names: all slots, or those that `taken` says of each layer."""
    found = {name: np.array(device.download(buffer)) for name, buffer in cache.named(prefix).items()}
    if taken is None:
        return found
    lengths = {name: int(taken[int(name.rsplit("_", 1)[1])]) for name in found}
    return {name: array[:, :, : lengths[name]] for name, array in found.items()}
