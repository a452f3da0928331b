"""Where the codes of a linear map come from: chosen for a matrix of floats, or read from a checkpoint that holds them.

Knows no graph and no family. What a checkpoint holds is its own business: see `CodeReader`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.tensors.weights import STORED, AnySource, Reader
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized

Quantizer = Callable[[Tensor, BlockFormat], BlockQuantized]
"""A matrix [out, in] of floats, and how it is to be stored -> its codes."""


@dataclass(frozen=True, eq=False)
class Made:
    """Codes that are chosen for a matrix of floats.

    Attributes:
        source: of the matrix, [in, out] as a graph has it.
        form: how it is stored.
        dtype: of the bundle: scales are rounded to it before the codes are chosen.
        quantizer: what chooses them.
    """

    source: AnySource
    form: BlockFormat
    dtype: torch.dtype
    quantizer: Quantizer

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return self.source.keys

    @property
    def types(self) -> Collection[str]:
        """Floats, as any other parameter."""
        return STORED

    def shape(self, headers: Reader) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""
        inputs, outputs = self.source.make(headers).shape
        return outputs, inputs

    def blocks(self, checkpoint: Reader) -> BlockQuantized:
        """The matrix; [out, in].

        Raises:
            CheckpointError: it has no codes, naming its tensors.
        """
        weight = self.source.make(checkpoint).T
        names = ", ".join(self.keys)
        largest = max(abs(float(bound)) for bound in weight.aminmax()) if weight.numel() else 0.0
        if not math.isfinite(largest):
            raise CheckpointError(f"{names} has a weight that is infinite or no number, for which there is no code")
        if largest / (self.form.middle - 1) > torch.finfo(self.dtype).max:
            name = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{names} has weights up to {largest:.3g}, whose scales {name} cannot hold: build with --dtype float32"
            )
        return self.quantizer(weight, self.form)


@runtime_checkable
class CodeReader(Protocol):
    """A checkpoint that holds quantized linear maps, each under the key that its matrix of floats would have."""

    def quantized_format(self, key: str) -> BlockFormat | None:
        """How a matrix is stored, from configuration and headers alone; None for one of floats."""

    def quantized_keys(self, key: str) -> tuple[str, ...]:
        """Names of the tensors that hold it: codes, scales, zero points."""

    def quantized_shape(self, key: str) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""

    def quantized(self, key: str) -> BlockQuantized | None:
        """The matrix, [out, in]; None for one of floats."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Codes that a checkpoint holds; they go to the graph as they are.

    Attributes:
        key: that the matrix of floats would have.
        checkpoint: that holds them.
        form: how they are stored, as the checkpoint says.
        rows: outputs that are taken of a stacked matrix; None takes all.
    """

    key: str
    checkpoint: CodeReader
    form: BlockFormat
    rows: tuple[int, int] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return self.checkpoint.quantized_keys(self.key)

    @property
    def types(self) -> Collection[str]:
        """Floats and whole numbers: what reads them says which."""
        return (*STORED, "I32", "I8", "U8", "I64", "F8_E4M3")

    def shape(self, headers: Reader) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""
        outputs, inputs = self.checkpoint.quantized_shape(self.key)
        return (outputs if self.rows is None else self.rows[1] - self.rows[0]), inputs

    def blocks(self, checkpoint: Reader) -> BlockQuantized:
        """The matrix; [out, in]."""
        found = self.checkpoint.quantized(self.key)
        if found is None:
            raise CheckpointError(f"{self.key} holds floats, codes were expected: download the checkpoint again")
        if self.rows is None:
            return found
        part = slice(*self.rows)
        zeros = None if found.zero_points is None else found.zero_points[part]
        return BlockQuantized(found.codes[part], found.scales[part], zeros, found.bits, found.block)
