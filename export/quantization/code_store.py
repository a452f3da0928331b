"""Codes that were chosen before a build and wait in a folder, a file for each matrix. Knows no way to choose any."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.tensors.weights import Reader
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.recipes import Made


@dataclass(frozen=True)
class CodeStore:
    """The codes of a decoder's linear maps.

    Attributes:
        folder: with a file for each matrix.
        films: SHA-256 of each film or picture that they were chosen by.
        rows: that entered the first linear map, those of answers among them.
        answer_rows: of these, of answers.
        prompts: conversations about the films.
        texts: SHA-256 over the tokens of these prompts and of their answers.
        held_out: prompts of these that took no part in the choice.
        divergence, search_divergence: from floats on those, behind these codes and behind the search's; nats a token.
        taken: whether a build takes these codes; else it searches its own.
    """

    folder: Path
    films: tuple[str, ...]
    rows: int = 0
    answer_rows: int = 0
    prompts: int = 0
    texts: str = ""
    held_out: int = 0
    divergence: float | None = None
    search_divergence: float | None = None
    taken: bool = True

    def write(self, name: str, blocks: BlockQuantized) -> None:
        """Keep the codes of a matrix."""
        tensors = {"codes": blocks.codes, "scales": blocks.scales.contiguous()}
        zeros = {} if blocks.zero_points is None else {"zero_points": blocks.zero_points}
        save_file(tensors | zeros, self.folder / f"{name}.safetensors")

    def read(self, name: str, form: BlockFormat) -> BlockQuantized:
        """The codes of a matrix."""
        tensors = load_file(self.folder / f"{name}.safetensors")
        return BlockQuantized(tensors["codes"], tensors["scales"], tensors.get("zero_points"), form.bits, form.block)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Codes of a matrix of floats that were chosen by films.

    Attributes:
        matrix: and its format, whose quantizer is not used.
        name: of the matrix in the store.
        store: None where there are no codes, since nothing but shapes is wanted.
    """

    matrix: Made
    name: str
    store: CodeStore | None

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return self.matrix.keys

    @property
    def form(self) -> BlockFormat:
        """How it is stored: in whole numbers, which error feedback is about."""
        assert isinstance(self.matrix.form, BlockFormat)
        return self.matrix.form

    @property
    def types(self) -> Collection[str]:
        """Floats, as any other parameter."""
        return self.matrix.types

    def shape(self, headers: Reader) -> tuple[int, int]:
        """Outputs and inputs, from the headers alone."""
        return self.matrix.shape(headers)

    def parts(self, checkpoint: Reader) -> Iterator[BlockQuantized]:
        """The matrix, as one part.

        Raises:
            CheckpointError: the films that chose its codes are not at hand.
        """
        if self.store is None:
            raise CheckpointError(
                f"the codes of {', '.join(self.keys)} were chosen by calibration films: build with --calibrate"
            )
        yield self.store.read(self.name, self.form)
