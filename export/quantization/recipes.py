"""Where the codes of a linear map come from: chosen for a matrix of floats, or read from a checkpoint that holds them.

Knows no graph and no family. What a checkpoint holds is its own business: see `CodeReader`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.tensors.weights import STORED, AnySource, Reader, Source
from framefusion.export.quantization.float8 import (
    LARGEST,
    Float8Format,
    Float8Quantized,
    Quantized,
    WeightFormat,
    check_scales,
)

Quantizer = Callable[[Tensor, Any], Quantized]
"""A matrix [out, in] of floats, and how it is to be stored -> its codes."""
WEIGHTS_AT_ONCE = 1 << 23  # of a matrix that is read by rows: 32 MiB in fp32


@dataclass(frozen=True, eq=False)
class Made:
    """Codes that are chosen for a matrix of floats.

    Attributes:
        source: of the matrix, [in, out] as a graph has it.
        form: how it is stored.
        dtype: of the bundle: scales are rounded to it before the codes are chosen.
        quantizer: what chooses them, for each row by itself where `by_rows`.
        by_rows: `parts` reads some rows of the matrix at a time, where its source is nothing but a tensor's rows.
    """

    source: AnySource
    form: WeightFormat
    dtype: torch.dtype
    quantizer: Quantizer
    by_rows: bool = False

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

    @property
    def is_read_by_rows(self) -> bool:
        """Whether the matrix is never whole in memory: its source is a tensor's rows, as they lie in the file."""
        source = self.source
        return self.by_rows and isinstance(source, Source) and source.transpose and not source.flatten

    def parts(self, checkpoint: Reader) -> Iterator[Quantized]:
        """See `Recipe.parts`; errors are those of `blocks`."""
        for source in self._pieces(checkpoint):
            yield self._coded(source.make(checkpoint).T)

    def blocks(self, checkpoint: Reader) -> Quantized:
        """The matrix as a whole; [out, in].

        Raises:
            CheckpointError: it has no codes, naming its tensors.
        """
        return self._coded(self.source.make(checkpoint).T)

    def _pieces(self, checkpoint: Reader) -> Iterator[AnySource]:
        """Sources of some rows of the matrix each, or the one of all."""
        source = self.source
        if not isinstance(source, Source) or not self.is_read_by_rows:
            yield source
            return
        outputs, inputs = checkpoint.shape(source.key)
        first, last = source.rows or (0, outputs)
        step = max(1, WEIGHTS_AT_ONCE // max(inputs, 1))
        for start in range(first, last, step):
            yield replace(source, rows=(start, min(start + step, last)))

    def _coded(self, weight: Tensor) -> Quantized:
        """Codes of some rows.  [n, in]"""
        names = ", ".join(self.keys)
        largest = max(abs(float(bound)) for bound in weight.aminmax()) if weight.numel() else 0.0
        if not math.isfinite(largest):
            raise CheckpointError(f"{names} has a weight that is infinite or no number, for which there is no code")
        most = LARGEST if isinstance(self.form, Float8Format) else self.form.middle - 1
        if largest / most > torch.finfo(self.dtype).max:
            name = str(self.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{names} has weights up to {largest:.3g}, whose scales {name} cannot hold: build with --dtype float32"
            )
        return self.quantizer(weight, self.form)


@runtime_checkable
class CodeReader(Protocol):
    """A checkpoint that holds quantized linear maps, each under the key that its matrix of floats would have."""

    def quantized_format(self, key: str) -> WeightFormat | None:
        """How a matrix is stored, from configuration and headers alone; None for one of floats."""

    def quantized_keys(self, key: str) -> tuple[str, ...]:
        """Names of the tensors that hold it: codes, scales, zero points."""

    def quantized_shape(self, key: str) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""

    def quantized(self, key: str) -> Quantized | None:
        """The matrix, [out, in]; None for one of floats."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Codes that a checkpoint holds; they go to the graph as they are.

    Attributes:
        key: that the matrix of floats would have.
        checkpoint: that holds them.
        form: how they are stored, as the checkpoint says.
        dtype: of the bundle, which the scales become.
        rows: outputs that are taken of a stacked matrix; None takes all.
    """

    key: str
    checkpoint: CodeReader
    form: WeightFormat
    dtype: torch.dtype
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

    def _check_products(self, found: Quantized) -> None:
        """Refuse scales with which a code would stand for an infinite number: graphs multiply in the bundle's type."""
        scales = found.scales.to(self.dtype).float()
        largest = float(scales.abs().max()) if scales.numel() else 0.0
        bound = largest * found.farthest
        limit = torch.finfo(self.dtype).max
        if bound > limit:
            name = str(self.dtype).removeprefix("torch.")
            fits_wider = bound <= torch.finfo(torch.bfloat16).max
            remedy = (
                "build with --dtype bfloat16 or float32" if fits_wider else "the file is damaged, download it again"
            )
            raise CheckpointError(
                f"{self.key} has a scale of {largest:.3g}, by which a code stands for up to {bound:.3g}, and {name} "
                f"ends at {limit:.3g}: {remedy}"
            )

    def parts(self, checkpoint: Reader) -> Iterator[Quantized]:
        """The matrix, as one part.

        Raises:
            CheckpointError: it holds floats, or the bundle's type cannot hold its scales or what they stand for.
        """
        found = self.checkpoint.quantized(self.key)
        if found is None:
            raise CheckpointError(f"{self.key} holds floats, codes were expected: download the checkpoint again")
        if isinstance(found, Float8Quantized):
            check_scales(found.scales, self.dtype, self.key)
        self._check_products(found)
        if self.rows is None:
            yield found
            return
        yield found.rows(slice(*self.rows))
