"""Products of weights in 4 and 8 bits, as building blocks: the weights, the inputs, and what has to come out of them.

Kernels for them are chosen by the processor's instructions. One that adds up products of bytes in 16 bits is right for
ordinary numbers and wrong for large ones (`vpmaddubsw` of x86 stops at 32767), so rows of the largest codes meet rows
of the largest activations here, with signs alike and in turn. All numbers follow from formulas: the file of a graph and
this module have the same on every machine.

A kernel may round activations to 8 bits: by blocks or rows, to 127 steps of the largest or to 255 from the smallest to
the largest, or not at all. A step is at most 2/254 of the largest, and half of one is what each activation may be off
by. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

OUTPUTS = 35  # and no multiple of what a kernel has at once
WIDTH = 384  # an odd number of blocks of 128
STEP = 1 / 254
"""Half a step of an activation, as a share of the largest of its row."""
LEAST_BLOCK = 16  # inputs that a kernel may round together: each has the row's largest, so that all steps are alike
_ROWS = 40
_PATTERNS = 4  # of rows: all that is largest, all that is smallest, the two in turn, others


class CodeFormat(NamedTuple):
    """How a matrix is stored: see `framefusion.export.quantization.blocks`."""

    output: str  # of the graph
    block: str  # what the product is called
    bits: int
    size: int  # of a block
    has_zeros: bool

    @property
    def weights(self) -> str:
        """The type of the codes."""
        return f"int{self.bits}"

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


FORMATS = (
    CodeFormat("int8_128", "product of int8, blocks of 128", 8, 128, has_zeros=False),
    CodeFormat("int4_128", "product of int4, blocks of 128", 4, 128, has_zeros=False),
    CodeFormat("int4_32", "product of int4, blocks of 32", 4, 32, has_zeros=False),
    CodeFormat("int4_zeros", "product of int4, blocks of 128, zero points", 4, 128, has_zeros=True),
)
WEIGHTS = ("int8", "int4")
_LARGE = 128  # times as large: sums of codes times activations are beyond float16 then, and results are not
_CASES: Mapping[str, tuple[slice, int]] = {
    "prompt": (slice(0, _ROWS), 1),
    "large prompt": (slice(0, _ROWS), _LARGE),
    "batch": (slice(1, 4), 1),
    "step, largest": (slice(0, 1), 1),
    "large step": (slice(0, 1), _LARGE),
    "step, smallest": (slice(1, 2), 1),
    "step, in turn": (slice(2, 3), 1),
    "step": (slice(7, 8), 1),
}


class CodeCase(NamedTuple):
    """A run of the graph."""

    name: str
    hidden: NDArray[np.floating]  # [1, S, WIDTH], in the type of the graph, which holds each number exactly
    expected: Mapping[str, NDArray[np.float64]]  # output -> [S, OUTPUTS]
    rounded: Mapping[str, float]  # output -> how far rounded activations may move it, as a share of its largest


def codes_name(dialect: str, dtype: str, weights: str) -> str:
    """The file of a graph, beside this module: a library may have one type of codes and not the other."""
    return f"{dialect}-{weights}-{dtype}.onnx"


def formats_of(dialect: str, weights: str) -> tuple[CodeFormat, ...]:
    """Those of a type that a dialect can say: zero points are of `gqa` alone."""
    said = (form for form in FORMATS if dialect == "gqa" or not form.has_zeros)
    return tuple(form for form in said if form.weights == weights)


def codes(form: CodeFormat) -> NDArray[np.uint8]:
    """Codes of a matrix.  [OUTPUTS, WIDTH]"""
    (row, column) = np.indices((OUTPUTS, WIDTH))
    others = (31 * row + 17 * column + 7 * (column // LEAST_BLOCK) * row + 3) % (form.largest + 1)
    return _patterns(form.largest, 0, others).astype(np.uint8)


def scales(form: CodeFormat) -> NDArray[np.float32]:
    """Of four binary digits, which every type holds.  [OUTPUTS, B]"""
    (row, block) = np.indices((OUTPUTS, WIDTH // form.size))
    digits = 1 + (5 * row + 3 * block) % 8 / 8
    return (digits / 2.0 ** (form.bits + (row + block) % 3)).astype(np.float32)


def zero_points(form: CodeFormat) -> NDArray[np.uint8]:
    """The codes of zero; the middle where none are stored.  [OUTPUTS, B]"""
    (row, block) = np.indices((OUTPUTS, WIDTH // form.size))
    drawn = (3 * row + 5 * block) % (form.largest + 1)
    return (drawn if form.has_zeros else np.full_like(drawn, (form.largest + 1) // 2)).astype(np.uint8)


def weights(form: CodeFormat) -> NDArray[np.float64]:
    """The matrix that the codes stand for.  [OUTPUTS, WIDTH]"""
    blocks = codes(form).reshape(OUTPUTS, -1, form.size).astype(np.float64)
    return ((blocks - zero_points(form)[..., None]) * scales(form)[..., None]).reshape(OUTPUTS, WIDTH)


def activations() -> NDArray[np.float64]:
    """Whole numbers of 8 bits, divided by 128.  [rows, WIDTH]"""
    (row, column) = np.indices((_ROWS, WIDTH))
    others = (37 * row + 29 * column + 11 * (column // LEAST_BLOCK) * row) % 255 - 127
    others[:, ::LEAST_BLOCK] = np.where(others[:, ::LEAST_BLOCK] < 0, -127, 127)
    return _patterns(127, -127, others) / 128


def _patterns(largest: int, smallest: int, others: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of the largest number, of the smallest, of both in turn, and others, over and over."""
    (row, column) = np.indices(others.shape)
    in_turn = np.where(column % 2, smallest, largest)
    kinds = [np.full_like(others, largest), np.full_like(others, smallest), in_turn]
    return np.select([row % _PATTERNS == kind for kind in range(len(kinds))], kinds, others)


def code_cases(forms: Sequence[CodeFormat], dtype: DTypeLike) -> Iterator[CodeCase]:
    """All cases for a graph of some formats."""
    matrices = {form.output: weights(form) for form in forms}
    drawn = activations()
    for name, (part, factor) in _CASES.items():
        rows = factor * drawn[part]
        expected = {output: rows @ matrix.T for output, matrix in matrices.items()}
        moved = {output: STEP * np.abs(rows).max() * np.abs(matrix).sum(1).max() for output, matrix in matrices.items()}
        rounded = {output: float(moved[output] / np.abs(result).max()) for output, result in expected.items()}
        yield CodeCase(name, rows[None].astype(dtype), expected, rounded)
