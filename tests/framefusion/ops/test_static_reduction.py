"""The in-graph reduction against its numpy twin, eager and as ONNX in ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from framefusion.ops.static_reduction import (
    DECOMPOSITIONS,
    TokenState,
    exactly,
    merge_by_rank,
    prune_by_rank,
    track_similarity,
)
from framefusion.reduction import tracks
from framefusion.reduction.budget import FixedSchedule, drop_counts
from framefusion.reduction.plan import Scores, apply_plan, top
from framefusion.reduction.policy import FixedReduction
from framefusion.reduction.tracks import TEXT, IntArray

# What TensorRT refuses, and sorts, which no step needs.
FORBIDDEN = {"TopK", "NonZero", "Unique", "Compress", "ScatterND", "Loop", "If", "SequenceAt"}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    """A static bucket, and the schedule it is compiled for."""

    frames: int
    patches: int
    text: int
    padding: int  # tokens of the bucket that the fullest request leaves free
    schedule: FixedSchedule
    width: int = 6

    @property
    def size(self) -> int:
        return self.frames * self.patches + self.text + self.padding

    def labels(self, frames: int) -> IntArray:
        parts = [TEXT], np.tile(np.arange(self.patches), frames), np.full(self.text - 1, TEXT)
        return np.concatenate(parts, dtype=np.int64)

    def drops(self, frames: int) -> list[int]:
        return drop_counts(self.schedule, frames * self.patches, self.patches)

    def lengths(self) -> list[int]:
        """Static length after each event: what the largest drops leave."""
        return [self.size - dropped for dropped in itertools.accumulate(self.drops(self.frames))]


SMALL = Geometry(7, 11, 5, 3, FixedSchedule((0.4, 0.25), 2, 0.5))
# Chooses more than 3840 of more than 3840, the limit of TensorRT's TopK.
LARGE = Geometry(41, 198, 20, 5, FixedSchedule((0.5, 0.2), 2, 0.4))


class Reduce(torch.nn.Module):
    """All events of a geometry, one after the other; the scores come out too, so that the twin can use them."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(self, state: TokenState, importance: Tensor, drops: Tensor) -> tuple[Tensor, ...]:
        state, similarities = TokenState(*state), []
        *merges, prune = self.geometry.lengths()
        for event, length in enumerate(merges):
            similarities.append(track_similarity(state))
            drop = drops[event : event + 1]
            state = merge_by_rank(state, similarities[-1], drop, length, max_run=self.geometry.frames)
        state = prune_by_rank(state, importance, drops[-1:], prune)
        return (*state, *similarities)


def padded_state(labels: IntArray, hidden: Floats, size: int) -> TokenState:
    padded = np.r_[labels, np.full(size - labels.size, TEXT)]
    rows = torch.zeros(size, hidden.shape[1])
    rows[: labels.size] = torch.from_numpy(hidden)
    angle = torch.arange(size)[:, None] * torch.tensor([0.1, 0.01])
    order = torch.from_numpy(tracks.track_order(padded))
    return TokenState(rows, angle.cos(), angle.sin(), torch.from_numpy(padded), order, torch.arange(size))


def random_hidden(random: np.random.Generator, geometry: Geometry, frames: int) -> Floats:
    """A drifting picture: frames alike, but not equal."""
    picture = random.normal(size=(geometry.patches, geometry.width))
    noise = random.normal(size=(frames, geometry.patches, geometry.width)) * random.uniform(0.1, 2, (frames, 1, 1))
    tail = random.normal(size=(geometry.text - 1, geometry.width))
    return np.concatenate([np.ones((1, geometry.width)), *(picture + noise), tail]).astype(np.float32)


def twin(
    geometry: Geometry, labels: IntArray, hidden: Floats, similarities: list[Scores], importance: Scores
) -> tuple[IntArray, Floats]:
    """Run the numpy twin on the real tokens; return the survivors and their hidden states."""
    reduction, origin = FixedReduction(geometry.schedule, labels), np.arange(labels.size)
    for call in range(geometry.schedule.prune_layer + 2):
        similarity = similarities[call][: origin.size] if reduction.wants_similarity else None
        plan = reduction.step(similarity, importance[: origin.size] if reduction.wants_importance else None)
        hidden, origin = apply_plan(hidden, plan).astype(np.float32), origin[plan.kept]
    assert reduction.finished
    return origin, hidden


Graph = Callable[[TokenState, Tensor, Tensor], list[npt.NDArray[np.float32]]]


def check_against_twin(graph: Graph, geometry: Geometry, frames: int, seed: int, ties: bool = False) -> None:
    random = np.random.default_rng(seed)
    labels, hidden = geometry.labels(frames), random_hidden(random, geometry, frames)
    if ties:
        hidden = np.sign(hidden).astype(np.float32)
    state = padded_state(labels, hidden, geometry.size)
    importance = random.random(geometry.lengths()[-2]).astype(np.float32)
    importance = np.round(importance * 4) if ties else importance
    outputs = graph(state, torch.from_numpy(importance), torch.tensor(geometry.drops(frames)))
    reduced, cos, sin, label, order, origin, *similarities = outputs
    kept, expected = twin(geometry, labels, hidden, list(similarities), importance)
    np.testing.assert_array_equal(origin[: kept.size], kept)
    np.testing.assert_allclose(reduced[: kept.size], expected, atol=1e-5)
    np.testing.assert_array_equal(label, np.r_[labels[kept], np.full(label.size - kept.size, TEXT)])
    np.testing.assert_array_equal(order, tracks.track_order(label.astype(np.int64)))
    np.testing.assert_array_equal(cos, state.cos.numpy()[origin.astype(np.int64)])
    np.testing.assert_array_equal(sin, state.sin.numpy()[origin.astype(np.int64)])
    np.testing.assert_allclose(similarities[0][: labels.size], tracks.track_similarity(hidden, labels), atol=1e-5)
    assert len(reduced) == geometry.lengths()[-1]


def eager(geometry: Geometry) -> Graph:
    module = Reduce(geometry)
    return lambda *operands: [output.numpy() for output in module(*operands)]


def exported(geometry: Geometry) -> torch.export.ExportedProgram:
    labels = geometry.labels(geometry.frames)
    hidden = random_hidden(np.random.default_rng(0), geometry, geometry.frames)
    importance = torch.zeros(geometry.lengths()[-2])
    operands = (padded_state(labels, hidden, geometry.size), importance, torch.tensor(geometry.drops(geometry.frames)))
    return torch.export.export(Reduce(geometry), operands)


@pytest.fixture(scope="module")
def compiled() -> onnx.ModelProto:
    program = exported(LARGE).run_decompositions(dict(DECOMPOSITIONS))
    converted = torch.onnx.export(program, (), dynamo=True, opset_version=18, verbose=False)
    assert converted is not None
    return converted.model_proto


def session(model: onnx.ModelProto) -> Graph:
    runner = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [operand.name for operand in runner.get_inputs()]

    def run(state: TokenState, importance: Tensor, drops: Tensor) -> list[npt.NDArray[np.float32]]:
        tensors = [tensor.numpy() for tensor in (*state, importance, drops)]
        return list(runner.run(None, dict(zip(names, tensors, strict=True))))

    return run


@settings(max_examples=40)
@given(st.integers(1, 7), st.integers(0, 2**20), st.booleans())
def test_eager_equals_the_twin(frames: int, seed: int, ties: bool) -> None:
    check_against_twin(eager(SMALL), SMALL, frames, seed, ties)


@settings(max_examples=20)
@given(
    st.lists(st.floats(0, 0.9), max_size=3), st.floats(0, 1), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99)
)
def test_eager_equals_the_twin_for_any_schedule(
    merges: list[float], prune: float, patches: int, padding: int, seed: int
) -> None:
    schedule = FixedSchedule((*merges, 0.3), len(merges), prune)
    geometry = Geometry(6, patches, 4, padding, schedule)
    check_against_twin(eager(geometry), geometry, 1 + seed % 6, seed, ties=seed % 2 == 0)


def test_eager_of_a_long_video_equals_the_twin() -> None:
    assert LARGE.drops(41)[0] > 3840
    check_against_twin(eager(LARGE), LARGE, 41, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
def test_onnx_equals_the_twin(compiled: onnx.ModelProto, ties: bool) -> None:
    run = session(compiled)
    for seed, frames in enumerate([LARGE.frames, LARGE.frames - 1, LARGE.frames // 2, 1]):
        check_against_twin(run, LARGE, frames, seed, ties)


@pytest.mark.slow
def test_onnx_keeps_to_the_ops_that_engines_take(compiled: onnx.ModelProto) -> None:
    nodes = [*compiled.graph.node, *(node for function in compiled.functions for node in function.node)]
    assert {node.op_type for node in nodes}.isdisjoint(FORBIDDEN)
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes.get("reduction", b"none") == b"none"
        assert attributes.get("to") != onnx.TensorProto.DOUBLE


@pytest.mark.slow
def test_onnx_shapes_are_static(compiled: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(compiled, data_prop=True).graph
    for value in [*inferred.input, *inferred.output]:
        assert all(dimension.HasField("dim_value") for dimension in value.type.tensor_type.shape.dim), value.name
    assert inferred.output[0].type.tensor_type.shape.dim[0].dim_value == LARGE.lengths()[-1]


@pytest.mark.slow
def test_export_sees_opaque_ops_until_they_are_decomposed() -> None:
    program = exported(SMALL)
    targets = [str(node.target) for node in program.graph.nodes if "framefusion" in str(node.target)]
    assert targets == ["framefusion.merge_by_rank.default"] * 2 + ["framefusion.prune_by_rank.default"]
    plain = program.run_decompositions(dict(DECOMPOSITIONS))
    assert not [node for node in plain.graph.nodes if "framefusion" in str(node.target)]


def test_ops_fulfil_the_contract_of_custom_ops() -> None:
    state = padded_state(SMALL.labels(7), random_hidden(np.random.default_rng(0), SMALL, 7), SMALL.size)
    scores, drop = torch.rand(SMALL.size), torch.tensor([9])
    checks = ("test_schema", "test_faketensor")
    operands = (*state, scores, drop, SMALL.size - 9)
    torch.library.opcheck(torch.ops.framefusion.merge_by_rank.default, (*operands, 7), test_utils=checks)
    torch.library.opcheck(torch.ops.framefusion.prune_by_rank.default, operands, test_utils=checks)


SPECIAL = st.sampled_from([0.0, -0.0, 1e-45, 3e-39, -1e-30, 0.5, 0.50000006, 1.0, -1.0, 2.0, -2.0, float("nan")])


@settings(max_examples=150)
@given(st.lists(st.one_of(SPECIAL, st.floats(-4, 4, width=32)), min_size=1, max_size=40), st.data())
def test_exactly_is_top_to_the_last_bit(values: list[float], data: st.DataObject) -> None:
    among = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    count = data.draw(st.integers(0, int(among.sum())))
    scores = np.array(values, dtype=np.float32)
    chosen = exactly(torch.tensor([count]), torch.from_numpy(scores), torch.from_numpy(among))
    np.testing.assert_array_equal(chosen.numpy(), top(scores, count, among))


@settings(max_examples=60)
@given(st.integers(0, 2**20), st.integers(-40, 30))
def test_exactly_resolves_neighbouring_floats_at_any_magnitude(seed: int, exponent: int) -> None:
    random = np.random.default_rng(seed)
    scores = np.float32(random.choice([-1.0, 1.0]) * 10.0**exponent) * np.ones(30, dtype=np.float32)
    for _ in range(3):
        scores = np.where(random.random(30) < 0.5, np.nextafter(scores, np.float32(np.inf)), scores)
    count = int(random.integers(0, 31))
    everyone = np.full(30, True)
    chosen = exactly(torch.tensor([count]), torch.from_numpy(scores), torch.from_numpy(everyone))
    np.testing.assert_array_equal(chosen.numpy(), top(scores, count, everyone))


def test_half_precision_means_are_taken_in_fp32() -> None:
    labels = np.r_[np.zeros(200, dtype=np.int64), TEXT]
    state = padded_state(labels, np.full((201, 4), 300.0, dtype=np.float32), 201)
    state = state._replace(hidden=state.hidden.half())
    similarity = track_similarity(state)
    assert similarity[1:200].allclose(torch.ones(199))
    merged = merge_by_rank(state, similarity, torch.tensor([199]), 2, max_run=200)
    assert merged.hidden.dtype == torch.float16
    assert merged.hidden.tolist() == [[300.0] * 4] * 2  # the sum of 200 such values is no fp16 number
