"""Products of weights in codes: kernels that round activations pass, those that saturate or misread do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HostBackend, host_array
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.proof.blocks import codes
from framefusion.runtime.proof.blocks.checks import check_code_blocks
from framefusion.runtime.proof.blocks.codes import FORMATS, OUTPUTS, WEIGHTS, WIDTH, CodeFormat, code_cases

FOLDER = Path(codes.__file__).parent
Matrix = NDArray[np.float64]
Kernel = Callable[[Matrix, CodeFormat], Matrix]
HALF = np.float16
INT8 = {"int8_128"}
INT4 = {"int4_128", "int4_32", "int4_zeros"}
ALL = INT8 | INT4


class Kernels(HostBackend):
    """Computes each product by a kernel in numpy."""

    name = "kernels"

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> BoundSegment:
        """See `Backend.bind`."""
        return _Bound(self._kernel, host_array(inputs["hidden"]), dict(outputs))


class _Bound:
    def __init__(self, kernel: Kernel, hidden: NDArray[Any], outputs: dict[str, Buffer]) -> None:
        self.inputs: dict[str, Buffer] = {"hidden": hidden}
        self.outputs = outputs
        self._kernel = kernel

    def run(self) -> None:
        rows = host_array(self.inputs["hidden"])[0].astype(np.float64)
        for form in FORMATS:
            if form.output in self.outputs:
                host_array(self.outputs[form.output])[0] = self._kernel(rows, form)


def exact(rows: Matrix, form: CodeFormat) -> Matrix:
    return rows @ codes.weights(form).T


def by_blocks(rows: Matrix, form: CodeFormat) -> Matrix:
    """Activations of a block in 127 steps of its largest."""
    blocks = rows.reshape(len(rows), -1, form.size)
    steps = np.abs(blocks).max(-1, keepdims=True) / 127
    return exact((np.round(blocks / steps) * steps).reshape(rows.shape), form)


def by_rows(rows: Matrix, form: CodeFormat) -> Matrix:
    """Activations of a row in 255 steps from the smallest to the largest, 0 among them."""
    low = np.minimum(rows.min(-1, keepdims=True), 0)
    steps = (np.maximum(rows.max(-1, keepdims=True), 0) - low) / 255
    zero = np.round(-low / steps)
    return exact((np.clip(np.round(rows / steps) + zero, 0, 255) - zero) * steps, form)


def in_whole_numbers(rows: Matrix, form: CodeFormat, together: int, numbers: NDArray[Any] | None = None) -> Matrix:
    """Bytes times bytes, `together` of them added up in 16 bits, which stop at 32767; zero points are taken off behind.

    Codes are unsigned and activations signed, as `vpmaddubsw` has them.
    """
    steps = np.abs(rows).max(-1, keepdims=True) / 127
    units = np.round(rows / steps).astype(np.int64).reshape(len(rows), 1, -1, form.size // together, together)
    read = codes.codes(form) if numbers is None else numbers
    bytes_ = read.astype(np.int64).reshape(1, OUTPUTS, -1, form.size // together, together)
    sums = np.clip((units * bytes_).sum(-1), -32768, 32767).sum(-1)
    zeros = codes.zero_points(form).astype(np.int64)[None]
    blocks = (sums - zeros * units.sum((-1, -2))) * codes.scales(form).astype(np.float64)[None]
    result: Matrix = blocks.sum(-1) * steps
    return result


def wide(rows: Matrix, form: CodeFormat) -> Matrix:
    return in_whole_numbers(rows, form, 1)


def saturates_pairs(rows: Matrix, form: CodeFormat) -> Matrix:
    return in_whole_numbers(rows, form, 2)


def saturates_blocks(rows: Matrix, form: CodeFormat) -> Matrix:
    """As a kernel for 4 bits would that keeps a sum in 16 bits for too long."""
    return in_whole_numbers(rows, form, 32)


def other_half_first(rows: Matrix, form: CodeFormat) -> Matrix:
    swapped = codes.codes(form).reshape(OUTPUTS, -1, 2)[..., ::-1].reshape(OUTPUTS, -1)
    return in_whole_numbers(rows, form, 1, swapped) if form.bits == 4 else exact(rows, form)


def in_float16(rows: Matrix, form: CodeFormat) -> Matrix:
    """Each product added to the sum in fp16, scales and zero points among the products."""
    parts = (rows[:, None] * codes.weights(form)[None]).astype(HALF)
    total = np.zeros(parts.shape[:2], HALF)
    for column in range(parts.shape[-1]):
        total = total + parts[..., column]
    return total.astype(np.float64)


def overflows(rows: Matrix, form: CodeFormat) -> Matrix:
    """Codes times activations in fp16 for a block, scales behind: right until a sum is larger than fp16 has numbers."""
    numbers = codes.codes(form).reshape(OUTPUTS, -1, form.size).astype(np.float64) - codes.zero_points(form)[..., None]
    blocks = rows.reshape(len(rows), 1, -1, form.size)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = (blocks * numbers[None]).sum(-1).astype(HALF)
    return (sums * codes.scales(form).astype(np.float64)[None]).sum(-1)  # type: ignore[no-any-return]


def odd_block_lost(rows: Matrix, form: CodeFormat) -> Matrix:
    """Blocks two at a time: the last of an odd number is left out."""
    width = WIDTH // (2 * form.size) * 2 * form.size
    return rows[:, :width] @ codes.weights(form)[:, :width].T


def odd_rows_lost(rows: Matrix, form: CodeFormat) -> Matrix:
    """Outputs 32 at a time."""
    result = exact(rows, form)
    result[:, OUTPUTS // 32 * 32 :] = 0
    return result


def zeros_lost(rows: Matrix, form: CodeFormat) -> Matrix:
    middle = (form.largest + 1) // 2
    blocks = codes.codes(form).reshape(OUTPUTS, -1, form.size).astype(np.float64) - middle
    return rows @ (blocks * codes.scales(form)[..., None]).reshape(OUTPUTS, -1).T


def next_scales(rows: Matrix, form: CodeFormat) -> Matrix:
    blocks = codes.codes(form).reshape(OUTPUTS, -1, form.size) - codes.zero_points(form)[..., None].astype(np.float64)
    moved = np.roll(codes.scales(form), 1, 1)
    return rows @ (blocks * moved[..., None]).reshape(OUTPUTS, -1).T


def wrong_step(rows: Matrix, form: CodeFormat) -> Matrix:
    """The kernel of one row leaves out the last channels."""
    return exact(rows, form) if len(rows) > 1 else rows[:, :-128] @ codes.weights(form)[:, :-128].T


def wrong(kernel: Kernel, dtype: str = "float32") -> set[tuple[str, str]]:
    names = {form.block: form.output for form in FORMATS}
    found = [check for kind in WEIGHTS for check in check_code_blocks(Kernels(kernel), "gqa", dtype, kind)]
    assert {names[check.block] for check in found} == ALL
    return {(names[check.block], check.case) for check in found if not check.right}


@pytest.mark.parametrize("kernel", [exact, by_blocks, by_rows, wide])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_rounds_activations_is_right(kernel: Kernel, dtype: str) -> None:
    assert wrong(kernel, dtype) == set()


def test_sums_in_float16_are_right_in_float16_and_not_in_float32() -> None:
    """ONNX Runtime 1.24 has such a kernel for ARM."""
    assert wrong(in_float16, "float16") == set()
    assert {output for output, _ in wrong(in_float16)} == ALL


@pytest.mark.parametrize(
    ("kernel", "formats"),
    [
        (saturates_pairs, INT8),
        (saturates_blocks, ALL),
        (other_half_first, INT4),
        (zeros_lost, {"int4_zeros"}),
        (next_scales, ALL),
        (odd_block_lost, {"int8_128", "int4_128", "int4_zeros"}),
        (odd_rows_lost, ALL),
        (overflows, ALL - {"int4_32"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_kernel_that_is_wrong_is_found_in_its_formats_alone(kernel: Kernel, formats: set[str], dtype: str) -> None:
    assert {output for output, _ in wrong(kernel, dtype)} == formats


def test_a_kernel_of_one_row_is_judged_by_itself() -> None:
    steps = {name for name in codes._CASES if "step" in name}
    found = {place for place in wrong(wrong_step) if place[1] != "step"}  # where rounding may move more
    assert found == {(output, case) for output in ALL for case in steps - {"step"}}


def test_numbers_are_exact_in_every_type() -> None:
    import ml_dtypes

    for dtype in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(codes.activations().astype(dtype).astype(np.float64), codes.activations())
        assert all(
            np.abs(part).max() < 40_000 for case in code_cases(FORMATS, dtype) for part in case.expected.values()
        )
        for form in FORMATS:
            scales = codes.scales(form)
            np.testing.assert_array_equal(scales.astype(dtype).astype(np.float32), scales)


@pytest.mark.parametrize("dialect", ["gqa", "portable"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_is_right_here(dialect: str, dtype: str) -> None:
    backend = OnnxRuntimeBackend(FOLDER)
    found = [check for kind in WEIGHTS for check in check_code_blocks(backend, dialect, dtype, kind)]
    assert [check for check in found if not check.right] == []
    assert max(check.error for check in found) <= {"float32": 1e-5, "float16": 1e-3}[dtype]
