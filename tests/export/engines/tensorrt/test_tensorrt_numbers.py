"""What an engine computes, asserted on the graph it is built from: ONNX Runtime runs the portable dialect on the CPU.

Static caches, prefills padded to every bucket, chunks, and decodes of one token and of two with a dummy behind, each
against the torch module over exact lengths. Tolerance 1e-5 of the largest value: fp32, a layer or two, and softmax sums
over a padded cache in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from framefusion.export.graphs.decoder import Segment
from framefusion.export.graphs.segments import SegmentPlan
from tests.conftest import made_once
from tests.export.engines.tensorrt.tensorrt_graphs import LOOKED_AT, REST, TINY, empty_caches, segment, write_segment

pytestmark = pytest.mark.slow  # two traces; tests/export/graphs/tracing/test_dialects.py asks the same of each op alone
Array = NDArray[Any]
TOLERANCE = 1e-5
LENGTH, BUCKETS, CAPACITY = 21, (21, 24, 32, 48), 64
STALE = 3.0  # what lies in slots that nobody wrote, and in rows of padding
PLANS = {"looked-at": LOOKED_AT, "rest": REST}


class Graph:
    """A segment in ONNX Runtime over static caches, updated in place, beside the same module in torch."""

    def __init__(self, path: Path, plan: SegmentPlan) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.module: Segment = segment(TINY, plan)
        self.plan, self.layers = plan, len(plan.attention_layers)
        self.empty()

    def empty(self) -> None:
        """New caches; ONNX Runtime's hold something else than zeros, as those of a request before would."""
        shape = (1, TINY.num_kv_heads, CAPACITY, TINY.head_dim)
        self.caches = {f"past_{part}_{j}": np.full(shape, STALE, np.float32)
                       for j in range(self.layers) for part in ("key", "value")}  # fmt: skip
        self.reference = empty_caches(self.layers, CAPACITY)

    def run(self, rows: Array, table: Array, kv_len: int, last: int, previous: Array) -> dict[str, Array]:
        """Outputs of the graph; what it left in the caches stays."""
        inputs = {
            "hidden": rows, "cos": np.cos(table), "sin": np.sin(table), "kv_len": np.full(self.layers, kv_len),
            "last": np.array([last]), "previous": previous, **self.caches,
        }  # fmt: skip
        names = [value.name for value in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, {v.name: inputs[v.name] for v in self.session.get_inputs()}),
                         strict=True))  # fmt: skip
        self.caches = {name: found.pop(name.replace("past", "present")) for name in self.caches}
        return found

    def exact(self, rows: Array, table: Array, kv_len: int, last: int, previous: Array) -> list[Tensor]:
        """Outputs of the module for rows without padding; its caches go on, too."""
        angles = torch.from_numpy(table)
        with torch.inference_mode():
            out = self.module(
                torch.from_numpy(rows), angles.cos(), angles.sin(), torch.full((self.layers,), kv_len),
                torch.from_numpy(previous) if self.plan.scores else None, torch.tensor([last]), self.reference,
            )  # fmt: skip
        first = len(out) - 2 * self.layers
        self.reference = list(zip(out[first::2], out[first + 1 :: 2], strict=True))
        return list(out[:first])


@pytest.fixture(scope="module", params=PLANS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    plan = PLANS[request.param]

    def make(folder: Path) -> None:
        write_segment(folder / "graph.onnx", plan=plan, dtype=torch.float32)

    return Graph(made_once(tmp_path_factory, f"fp32-{request.param}", make) / "graph.onnx", plan)


def drawn(length: int) -> tuple[Array, Array, Array]:
    """Rows, angles of their rotary tables, and tracks of three."""
    random = np.random.default_rng(length)
    rows = random.standard_normal((1, length, TINY.hidden_size)).astype(np.float32)
    table = random.uniform(0, 6, (1, length, TINY.head_dim // 2)).astype(np.float32)
    return rows, table, np.maximum(np.arange(length) - 3, -1)


def padded(rows: Array, size: int, axis: int = 1, value: float = STALE) -> Array:
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, size - rows.shape[axis])
    return np.pad(rows, widths, constant_values=value).astype(rows.dtype)


def assert_same(ours: dict[str, Array], reference: list[Tensor], valid: int) -> None:
    for found, tensor in zip(ours.values(), reference, strict=True):
        expected = tensor.numpy()
        rows = found if found.shape == expected.shape else found[:, :valid] if found.ndim == 3 else found[:valid]
        assert np.abs(rows - expected).max() <= TOLERANCE * np.abs(expected).max()


def prefill(graph: Graph, bucket: int) -> None:
    """A prompt in a bucket: kv_len is the bucket's, `last` the prompt's."""
    graph.empty()
    rows, table, previous = drawn(LENGTH)
    arguments = padded(rows, bucket), padded(table, bucket), bucket, LENGTH - 1, padded(previous, bucket, 0, -1)
    assert_same(graph.run(*arguments), graph.exact(rows, table, LENGTH, LENGTH - 1, previous), LENGTH)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_prompt_in_a_bucket_and_its_decode(graph: Graph, bucket: int, width: int) -> None:
    """The slots that padding left, and the dummy's, are overwritten before anybody may see them."""
    prefill(graph, bucket)
    none = np.full(width, -1)
    for step in range(6):
        rows, table, _ = drawn(100 + step)
        row, angle, place = rows[:, :1], table[:, :1], LENGTH + step
        found = graph.run(padded(row, width), padded(angle, width), place + width, 0, none)
        assert_same(found, graph.exact(row, angle, place + 1, 0, none[:1]), 1)


def test_a_prompt_in_chunks(graph: Graph) -> None:
    graph.empty()
    rows, table, _ = drawn(LENGTH)
    for start, end in ((0, 8), (8, 16), (16, LENGTH)):
        part, none = slice(start, end), np.full(end - start, -1)
        arguments = rows[:, part], table[:, part], end, end - start - 1, none
        assert_same(graph.run(*arguments), graph.exact(*arguments), end - start)


def test_the_valid_length_is_what_decides(graph: Graph) -> None:
    """With the length of the whole cache, as a network of the parser alone has it, a decode gives something else."""
    prefill(graph, LENGTH)
    rows, table, _ = drawn(7)
    wrong = graph.run(rows[:, :1], table[:, :1], CAPACITY, 0, np.array([-1]))
    expected = graph.exact(rows[:, :1], table[:, :1], LENGTH + 1, 0, np.array([-1]))
    first = next(iter(wrong.values()))
    assert np.abs(first - expected[0].numpy()).max() > 100 * TOLERANCE * np.abs(first).max()
