"""What a format of quantized checkpoints has to say, and one linear map's stored tensors, proven by their headers.

Knows no format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.quantized.linear import QuantizedLinear, Stored
from framefusion.export.checkpoints.quantized.patterns import ModuleNames, PatternError
from framefusion.export.checkpoints.quantized.setting import Setting
from framefusion.export.checkpoints.tensors.tensor_file import TensorEntry

FLOATS = ("F16", "BF16", "F32")
_SHORT = 1 << 16  # elements of a tensor that is read before anything is planned


@dataclass(frozen=True)
class Module:
    """A linear map's tensors.

    Attributes:
        name: of the module.
        parts: what stands behind its name -> whole key: "qweight" -> "model.layers.0.mlp.up_proj.qweight".
        stored: where the tensors are.
        setting: what config.json says, for errors.
    """

    name: str
    parts: Mapping[str, str]
    stored: Stored
    setting: Setting

    def error(self, why: str) -> CheckpointError:
        """An error that names the module."""
        return self.setting.error(f"and {self.name} {why}")

    def entry(self, part: str, types: Sequence[str], shape: tuple[int, ...] | None = None) -> TensorEntry:
        """Type and shape of a tensor that must be there.

        Args:
            part: which.
            types: as safetensors names them, of which it must have one.
            shape: that it must have; None: any matrix with an element.

        Raises:
            CheckpointError: it is missing, or of another type or shape.
        """
        found = self.stored.entry(self.parts[part]) if part in self.parts else None
        if found is None:
            raise self.error(f"has {', '.join(sorted(self.parts))} and no {part}: the checkpoint is incomplete")
        wanted = "a matrix" if shape is None else str(shape)
        fits = found.shape == shape if shape is not None else len(found.shape) == 2 and 0 not in found.shape
        if found.dtype not in types or not fits:
            raise self.error(
                f"has {part} {found.dtype} {found.shape}, {' or '.join(types)} {wanted} is expected: config.json and "
                "the tensors are of different models"
            )
        return found

    def read(self, part: str) -> Tensor:
        """A small tensor whose values decide how the others are read.

        Raises:
            CheckpointError: it is missing or larger than what decides anything.
        """
        found = self.stored.entry(self.parts[part])
        if found is None or torch.Size(found.shape).numel() > _SHORT:
            raise self.error(f"has {part} of a shape that no such tensor has: download the checkpoint again")
        return self.stored.read(self.parts[part])

    def check_order(self, part: str, inputs: int, group: int) -> None:
        """Refuse inputs that are not in the order of their groups (act order), if the tensor that says so is there."""
        if part not in self.parts:
            return
        self.entry(part, ("I32", "I64"), (inputs,))
        if not torch.equal(self.read(part).long(), torch.arange(inputs) // group):
            raise self.error(
                f"is stored in the order of its activations (act order, {part}), which no kernel here computes: give a "
                "checkpoint that was quantized without it (desc_act false), or build from the one before"
            )

    def keys(self, *known: str) -> tuple[str, ...]:
        """The keys of its parts; parts of another format are refused."""
        foreign = sorted(self.parts.keys() - set(known))
        if foreign:
            raise self.error(f"holds {', '.join(foreign)}, which this format does not have: two models are mixed here")
        return tuple(self.parts.values())


class Layout(ABC):
    """A format, with what config.json says of it.

    Attributes:
        title: its name, for people.
        parts: what stands behind a module's name in the keys of its tensors; `weight` and `bias` are not among them.
    """

    title: str
    parts: tuple[str, ...]

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def linear(self, module: Module) -> QuantizedLinear:
        """The linear map that a module's tensors stand for.

        Raises:
            CheckpointError: they are incomplete, or contradict config.json or each other.
        """

    @abstractmethod
    def leaves(self, module: str) -> bool:
        """Whether config.json says that this module is not quantized.

        Raises:
            PatternError: a pattern there takes too long.
        """

    def names(self, patterns: Sequence[str], *, within: bool = False) -> ModuleNames:
        """Patterns of config.json.

        Raises:
            CheckpointError: one is not read.
        """
        try:
            return ModuleNames(patterns, within=within)
        except PatternError as error:
            raise self.setting.error(f"and {error}") from None


def groups_of(inputs: int, group: int) -> int:
    """How many groups a row of so many inputs has."""
    return -(-inputs // group)
