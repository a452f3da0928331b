"""Caches of static length, allocated once and handed from request to request.

Engines take a cache of one length only. What an earlier request left behind stays in the slots: it is finite, and
either overwritten or masked. Knows no engine and no library; the device may be the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from framefusion.errors import PromptError
from framefusion.runtime.backends.base import Device, empty_cache
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord

Buffers = tuple[list[Buffer], list[Buffer]]


class CachePool:
    """The caches of a bundle's segments.

    A request's caches return when nobody holds them any more. Who still holds those of an earlier request keeps them,
    and the next request gets new ones: two prefills may stand side by side where there is memory for both.

    Args:
        device: where they lie.
        capacities: slots of each attention layer, by the segment's name.
    """

    def __init__(self, device: Device, capacities: Mapping[str, Sequence[int]]) -> None:
        self._device = device
        self._capacities = capacities
        self._free: dict[str, list[Buffers]] = {}

    def take(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches for a request that asks for `shapes`, each [1, Hkv, C, hd]; theirs may be longer.

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
        free = self._free.setdefault(record.name, [])
        keys, values = free.pop() if free else self._allocate(shapes, slots, dtype)
        cache = SegmentCache(keys, values, np.zeros(len(slots), np.int64))
        weakref.finalize(cache, free.append, (keys, values)).atexit = False
        return cache

    def _allocate(self, shapes: Sequence[tuple[int, ...]], slots: Sequence[int], dtype: DTypeLike) -> Buffers:
        full = [(*shape[:2], most, shape[3]) for shape, most in zip(shapes, slots, strict=True)]
        cache = empty_cache(self._device, full, dtype)
        return cache.keys, cache.values
