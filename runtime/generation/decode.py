"""Decode: one token at a time through all segments, over the caches that a prefill left.

Knows no reduction, no sampling and no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from framefusion.errors import PromptError
from framefusion.runtime.backends.base import BoundSegment, Mirror
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.generation.segments import Rows, Segments


class Decoder:
    """One token at a time through all segments, bound once: a step writes a row, runs, and copies no cache.

    Where graphs take more than one token, those behind the first are padding: the next step overwrites their slots.

    Args:
        segments: of the bundle.
        caches: of each segment, as a prefill left them; a step adds a token to each.
    """

    def __init__(self, segments: Segments, caches: Sequence[SegmentCache]) -> None:
        # 1. Buffers of one step, which every segment reads: the host writes them, nothing is allocated later.
        model = segments.manifest.model
        device = segments.device
        self._width = segments.backend.decode_width
        half = model.head_dim // 2
        widths = {"hidden": model.hidden_size, "cos": half, "sin": half}
        self._caches = caches
        self._rows = {name: device.mirror((1, self._width, n), model.float_type) for name, n in widths.items()}
        self._kv_lens: list[Mirror] = []
        common = {name: mirror.there for name, mirror in self._rows.items()}
        common["last"] = device.upload(np.zeros(1, np.int64))
        common["previous"] = device.upload(np.full(self._width, -1, np.int64))
        # 2. Bind each segment to the very buffer that the one before it writes: no copy lies between two.
        bound: list[BoundSegment] = []
        for record, cache in zip(segments.manifest.segments, caches, strict=True):
            self._kv_lens.append(device.mirror((len(record.attention_layers),), np.int64))
            inputs = common | {"kv_len": self._kv_lens[-1].there}
            if record.deepstack:  # generated tokens have no visual features
                shape = (record.deepstack, self._width, model.hidden_size)
                inputs["deepstack"] = device.zeros(shape, model.float_type)
            outputs = segments.outputs(record, self._width)
            bound.append(segments.backend.bind(record.decode, inputs, outputs.bound, cache))
            common["hidden"] = outputs.hidden
        self._logits = outputs.small["logits"]
        # 3. One call for all of them: a device may record the launches and replay them.
        self._run = segments.backend.chain(bound)

    def step(self, hidden: Rows, cos: Rows, sin: Rows) -> Rows:
        """One token's embedding [D] and tables [hd/2] -> logits [V], valid until the next step.

        Raises:
            PromptError: a cache is full.
        """
        for mirror, row in zip(self._rows.values(), (hidden, cos, sin), strict=True):
            mirror.host[0, 0] = row
            mirror.push()
        for cache, kv_len in zip(self._caches, self._kv_lens, strict=True):
            np.add(cache.lengths, self._width, out=kv_len.host)
            for needed, capacity in zip(kv_len.host, cache.capacities, strict=True):
                if needed > capacity:
                    raise PromptError(f"a cache of {capacity} tokens is full: ask for fewer new tokens")
            kv_len.push()
        self._run()
        for cache in self._caches:
            cache.lengths += 1
        logits: Rows = self._logits.pull()[0]
        return logits
