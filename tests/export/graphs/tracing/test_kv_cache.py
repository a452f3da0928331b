"""Attention over caches in int8: the graph in ONNX Runtime, in place, against its eager kernel and plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from framefusion.export.graphs.graph_plan import GraphModule, Signature
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.kv_cache import OPSET
from framefusion.export.graphs.tracing.trace import trace
from framefusion.ops.kv_cache import dequantize, quantize
from tests.versions import needs_int8_caches

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 6, 2, 8, 21
TOLERANCE = {"float32": 2e-6, "float16": 2e-3}  # relative to the largest number: sums in another order, in that type
SCALES = [torch.linspace(0.01, 0.03, KV_HEADS * HEAD_DIM).view(1, KV_HEADS, 1, HEAD_DIM).flip(d) for d in (1, 3)]
FREE = torch.export.Dim.DYNAMIC


class Attention(GraphModule):
    """The op with free tokens and rows, as a segment has it."""

    def forward(self, *operands: Tensor) -> Any:
        return torch.ops.framefusion.quantized_cache_attention(*operands, HEADS, KV_HEADS)

    def signature(self) -> Signature:
        rows = [torch.empty(3, 9, n * HEAD_DIM, device="meta") for n in (HEADS, KV_HEADS, KV_HEADS)]
        caches = [torch.empty(3, KV_HEADS, 17, HEAD_DIM, device="meta", dtype=torch.int8) for _ in range(2)]
        scales = [scale.to("meta") for scale in SCALES]
        arguments = (*rows, *caches, *scales, torch.empty(3, device="meta", dtype=torch.int64))
        shapes = (*({0: FREE, 1: FREE},) * 3, *({0: FREE, 2: FREE},) * 2, None, None, {0: FREE})
        names = ("query", "key", "value", "past_key", "past_value", "key_scale", "value_scale", "kv_len")
        return Signature(arguments, (shapes,), names, ("out", "present_key", "present_value"))


@pytest.fixture(scope="module", params=["float32", "float16"])
def attention(request: pytest.FixtureRequest) -> tuple[str, Any]:
    dialect = replace(DIALECTS["gqa"], opset=OPSET)
    model = trace(Attention(), dialect, getattr(torch, request.param)).model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return request.param, onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def attend(session: Any, dtype: str, rows: Sequence[Tensor], caches: list[NDArray[Any]], lengths: list[int]) -> Any:
    """One run over caches that are bound as input and as output."""
    binding = session.io_binding()
    names = ("query", "key", "value")
    feeds = {name: row.numpy().astype(dtype) for name, row in zip(names, rows, strict=True)}
    feeds |= {name: s.numpy().astype(dtype) for name, s in zip(("key_scale", "value_scale"), SCALES, strict=True)}
    feeds["kv_len"] = np.array(lengths, np.int64)
    out = np.zeros(rows[0].shape, dtype)
    for name, array in {**feeds, "past_key": caches[0], "past_value": caches[1]}.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in {"out": out, "present_key": caches[0], "present_value": caches[1]}.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return out


def draw(batch: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    return [torch.randn(batch, length, n * HEAD_DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.slow
@needs_int8_caches
def test_prompt_chunk_and_tokens_equal_the_eager_kernel(attention: tuple[str, Any]) -> None:
    """A prompt and a chunk behind it take one branch, single tokens the other; both write the same codes in place."""
    (dtype, session) = attention
    ours = [np.full((1, KV_HEADS, CAPACITY, HEAD_DIM), 77, np.int8) for _ in range(2)]
    theirs = [torch.from_numpy(cache.copy()) for cache in ours]
    held = 0
    for length in (11, 5, 1, 1):
        rows = [row.to(getattr(torch, dtype)).float() for row in draw(1, length)]
        held += length
        out = attend(session, dtype, rows, ours, [held])
        scales = [scale.to(getattr(torch, dtype)).float() for scale in SCALES]
        expected, *theirs = Attention().forward(*rows, *theirs, *scales, torch.tensor([held]))
        assert np.abs(out - expected.numpy()).max() <= TOLERANCE[dtype] * expected.abs().max()
        for mine, reference in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine[:, :, :held], reference.numpy()[:, :, :held])
            assert (mine[:, :, held:] == 77).all()


@pytest.mark.slow
@needs_int8_caches
def test_a_token_of_each_of_several_rows_is_what_it_is_alone(attention: tuple[str, Any]) -> None:
    (dtype, session) = attention
    lengths = [3, CAPACITY, 1, 12]
    generator = np.random.default_rng(0)
    shape = (len(lengths), KV_HEADS, CAPACITY, HEAD_DIM)
    together = [generator.integers(-128, 128, shape, np.int8) for _ in range(2)]
    before = [cache.copy() for cache in together]
    rows = draw(len(lengths), 1)
    out = attend(session, dtype, rows, together, lengths)
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        alone = [cache[part].copy() for cache in before]
        np.testing.assert_array_equal(attend(session, dtype, [r[part] for r in rows], alone, [length]), out[part])
        for mine, shared in zip(alone, together, strict=True):
            np.testing.assert_array_equal(mine, shared[part])


def test_codes_are_the_nearest_and_what_lies_beyond_is_clipped() -> None:
    scale = torch.tensor([0.5])
    values = torch.tensor([0.0, 0.24, 0.26, 0.75, 1.25, -63.4, 63.4, 1e9, -1e9])
    codes = quantize(values, scale)
    assert codes.tolist() == [0, 0, 1, 2, 2, -127, 127, 127, -128]
    inside = values.abs() < 64
    assert ((dequantize(codes, scale) - values).abs()[inside] <= 0.25).all()


def test_the_eager_kernel_reads_what_codes_stand_for() -> None:
    """Against softmax written out, over caches whose past was there before."""
    held = 6
    rows = draw(1, 4)
    generator = torch.Generator().manual_seed(1)
    past = [torch.randint(-128, 128, (1, KV_HEADS, CAPACITY, HEAD_DIM), generator=generator).char() for _ in range(2)]
    out, keys, values = Attention().forward(*rows, *past, *SCALES, torch.tensor([held + 4]))
    read = [(codes.double() * scale.double())[0] for codes, scale in ((keys, SCALES[0]), (values, SCALES[1]))]
    query = rows[0].double().view(4, HEADS, HEAD_DIM)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for row in range(4):
            seen = held + row + 1
            weights = (read[0][group, :seen] @ query[row, head] / HEAD_DIM**0.5).softmax(0)
            expected = weights @ read[1][group, :seen]
            ours = out[0, row, head * HEAD_DIM : (head + 1) * HEAD_DIM].double()
            assert torch.allclose(ours, expected, atol=1e-6)
    new = keys[0, :, held : held + 4].float() * SCALES[0][0]
    written = rows[1].view(4, KV_HEADS, HEAD_DIM).transpose(0, 1)
    assert torch.allclose(new, written.clamp(-128 * SCALES[0][0], 127 * SCALES[0][0]), atol=0.0151)  # half a step
