"""Caches of static length, allocated once and handed from request to request.

Engines take a cache of one length only. What an earlier request left behind stays in the slots: it is finite, and
either overwritten or masked. Knows no engine and no library; the device may be the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from framefusion.errors import PromptError
from framefusion.runtime.backends.base import Device
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord


class Place(NamedTuple):
    """What a buffer is for."""

    segment: str
    part: str  # "keys" or "values"
    layer: int
    rows: int


class CachePool:
    """The caches of a bundle's segments, and the slabs of requests that are decoded together.

    A buffer returns when nobody holds it any more: at the end of a request, or when its tokens were moved into a slab.
    Who still holds those of an earlier request keeps them, and the next request gets new ones: two prefills may stand
    side by side where there is memory for both.

    Args:
        device: where they lie.
        capacities: slots of each attention layer, by the segment's name.

    Attributes:
        free: buffers that nobody holds, by what they are for.
    """

    def __init__(self, device: Device, capacities: Mapping[str, Sequence[int]]) -> None:
        self._device = device
        self._capacities = capacities
        self.free: dict[Place, list[Buffer]] = {}  # a request finds the addresses of the one before

    def take(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches for a request that asks for `shapes`, each [1, Hkv, C, hd], or a slab of more rows; all may be longer.

        Raises:
            PromptError: a layer needs more slots than there are.
        """
        slots = self._capacities[record.name]
        for layer, shape, most in zip(record.attention_layers, shapes, slots, strict=True):
            if shape[2] > most:
                raise PromptError(
                    f"layer {layer} needs {shape[2]} slots of KV cache, the engine has {most}: ask for fewer new "
                    "tokens or frames, or build with a larger --max-kv-cache-capacity"
                )
        full = [(*shape[:2], most, shape[3]) for shape, most in zip(shapes, slots, strict=True)]
        (keys, values) = (
            [self._lend(Place(record.name, part, layer, shape[0]), shape, dtype) for layer, shape in enumerate(full)]
            for part in ("keys", "values")
        )
        return SegmentCache(keys, values, np.zeros(len(slots), np.int64))

    def _lend(self, place: Place, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """A view of a buffer that comes back here when the view is gone."""
        free = self.free.setdefault(place, [])
        buffer = free.pop() if free else self._device.zeros(shape, dtype)
        lent = buffer[...]
        weakref.finalize(lent, free.append, buffer).atexit = False
        return lent
