"""What config.json says of a quantization, as untrusted input: where it stands, its fields, errors that name it.

Knows no format and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framefusion.console.plain_text import printable
from framefusion.errors import CheckpointError

KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json for what awq, gptq, fp8, bitsandbytes, compressed-tensors, ModelOpt and MLX did."""
BEFORE = "give the checkpoint before it was quantized"
_LARGEST = 1 << 20  # of a number in a configuration: no group and no count is larger


@dataclass(frozen=True)
class Setting:
    """One object of a configuration.

    Attributes:
        folder: of the checkpoint.
        values: the object.
        place: what it is called in errors: "quantization_config of config.json".
    """

    folder: Path
    values: Mapping[str, Any]
    place: str

    @property
    def method(self) -> str:
        """What quantized the model, in lower case; "" where the object does not say."""
        return str(self.values.get("quant_method") or self.values.get("quant_algo") or "").lower()[:40]

    def error(self, why: str) -> CheckpointError:
        """An error that says that the checkpoint is quantized, by what, and what is wrong with that."""
        return CheckpointError(f"{self.folder} is quantized ({method_of(self.values)}: {self.place}), {printable(why)}")

    def section(self, key: str) -> Setting | None:
        """An object within this one; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"and {key} is {value!r:.60}, an object is expected: download config.json again")
        return Setting(self.folder, value, f"{key} in {self.place}")

    def integer(self, key: str, default: int | None = None, known: Sequence[int] = ()) -> int:
        """A whole number, one of `known` where any are given.

        Raises:
            CheckpointError: it is absent without a default, another type, negative below -1, or not known.
        """
        value = self.values.get(key)
        if value is None and default is not None:
            value = default
        if type(value) is not int or not -1 <= value <= _LARGEST:
            raise self.error(f"and {key} is {value!r:.60}, a whole number is expected: download config.json again")
        if known and value not in known:
            raise self.error(f"and {key} {value} is not read, {' and '.join(map(str, known))} are: {BEFORE}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no; null is the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"and {key} is {value!r:.60}, true or false is expected: download config.json again")
        return value

    def text(self, key: str, default: str = "", known: Sequence[str] = ()) -> str:
        """A word in lower case, one of `known` where any are given; null is the default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.error(f"and {key} is {value!r:.60}, a word is expected: download config.json again")
        if known and value.lower() not in known:
            raise self.error(f"and {key} {value!r:.60} is not read, {' and '.join(filter(None, known))} are: {BEFORE}")
        return value.lower()

    def names(self, *keys: str) -> list[str]:
        """A list of names, of whichever of the keys are there."""
        found: list[str] = []
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.error(f"and {key} is {value!r:.60}, a list of names is expected: download config.json again")
            found += value
        return found


def method_of(values: object) -> str:
    """What quantized a model, and to how many bits, by the object of config.json; at most 60 characters."""
    if not isinstance(values, Mapping):
        return printable(str(values)[:40])
    name = values.get("quant_method") or values.get("quant_algo") or values.get("mode") or "an unnamed method"
    counts = [values[key] for key in ("bits", "w_bit", "weight_bits") if type(values.get(key)) is int]
    bits = next(iter(counts), None)
    return printable(str(name)[:40]) + (f", {bits} bits" if bits else "")
