"""What an engine's decode step of several rows is given: how many slots of each cache it looks at. Knows no graph.

A package holds it beside the model that takes a prompt, over the same weights; its record has an option of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.inductor.tokens import tensor_of
from framefusion.runtime.format.engine_record import EngineRecord, TensorRecord
from framefusion.storage.bounded_json import parse_json
from framefusion.storage.records import from_json

MODEL = "model"
"""torch's name of a package's model where it has one."""
STEP = "step"
"""Name of the step among a package's models, and of the option of a record that has one."""
TENSORS = "framefusion.tensors"
"""Among the metadata of a step: its inputs and outputs, in order."""
SLOTS_AT_ONCE = 512
"""Keys that torch's attention on a CPU takes at once. Caches have whole blocks of them, so that the last block of a row
has the shape that it has beside longer ones."""
_SHOWN = "shown_"


def whole_blocks(slots: int) -> int:
    """Slots, rounded up to whole blocks."""
    return -(-slots // SLOTS_AT_ONCE) * SLOTS_AT_ONCE


def shown_name(layer: int) -> str:
    """The input of a step whose size says how many slots of a layer's caches are looked at."""
    return f"{_SHOWN}{layer}"


def shown_names(record: EngineRecord) -> list[str]:
    """Those inputs, layer by layer; none of an engine that is no step."""
    return [tensor.name for tensor in record.tensors if tensor.name.startswith(_SHOWN)]


def step_record(record: EngineRecord, metadata: Mapping[str, str]) -> EngineRecord:
    """The record of an engine with the inputs and outputs of its step.

    Raises:
        KeyError, ValueError: a package's metadata do not say them.
    """
    tensors = parse_json(metadata[TENSORS].encode())
    return replace(record, tensors=tuple(from_json(TensorRecord, tensor) for tensor in tensors))


def is_slotwise(cache: Buffer) -> bool:
    """Whether a tensor [B, Hkv, C, hd] lies slot after slot in memory, row after row.

    Engines read addresses by the sizes: another order would be read wrongly, without an error.
    """
    (_, heads, slots, width) = cache.shape
    strides = tensor_of(cache).stride()
    expected = (slots * heads * width, width, heads * width, 1)
    sizes = zip(cache.shape, strides, expected, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in sizes)
