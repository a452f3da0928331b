"""One decode step of B rows: its buffers, bound to the graphs of all segments.

Knows neither who joins nor who leaves: whoever changes the rows binds another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from framefusion.runtime.backends.base import Mirror
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.generation.segments import Rows, Segments

_LENGTHS = 32  # see decode.py


class FedRow(Protocol):
    """What a step reads of a row.

    Attributes:
        index: its place in the step.
        caches: of each segment, whose lengths are without the step's token.
        inputs: the token's embedding [D] and tables [hd/2]; None computes what nobody reads.
    """

    index: int
    caches: Sequence[SegmentCache]
    inputs: tuple[Rows, Rows, Rows] | None


class BatchStep:
    """One step of B rows, bound to its buffers: it is written, then run, as often as the slabs stay the same.

    Rows that it has too many are padding: they write the first slot of a row that nobody has.

    Args:
        segments: of the bundle.
        caches: the B rows of each segment's slab.
        count: B.
    """

    def __init__(self, segments: Segments, caches: Sequence[SegmentCache], count: int) -> None:
        # 1. Buffers that every segment reads: the host writes them.
        model = segments.manifest.model
        device = segments.device
        self._count = count
        half = model.head_dim // 2
        widths = {"hidden": model.hidden_size, "cos": half, "sin": half}
        self._rows = {name: device.mirror((count, 1, width), model.float_type) for name, width in widths.items()}
        records = segments.manifest.segments
        self._layers = [len(record.attention_layers) for record in records]
        slots = -(-max(self._layers) * count // _LENGTHS) * _LENGTHS
        self._lengths = device.mirror((len(records), slots), np.int64)
        common: dict[str, Buffer] = {name: mirror.buffer for name, mirror in self._rows.items()}
        common["last"] = device.upload(np.zeros(1, np.int64))
        common["previous"] = device.upload(np.full(1, -1, np.int64))
        # 2. Each segment reads what the one before it writes; scores are of no use here, and not computed.
        bound = []
        for index, (record, cache) in enumerate(zip(records, caches, strict=True)):
            inputs = common | {"kv_len": self._lengths.buffer[index, : self._layers[index] * count]}
            if record.deepstack:  # generated tokens have no visual features
                inputs["deepstack"] = device.zeros((record.deepstack, 1, model.hidden_size), model.float_type)
            outputs: dict[str, Buffer] = {}
            if record.head:
                self._logits: Mirror = device.mirror((count, model.vocab_size), np.float32)
                outputs["logits"] = self._logits.buffer
            else:
                outputs["hidden_out"] = device.empty((count, 1, model.hidden_size), model.float_type)
            bound.append(segments.backend.bind(record.decode, inputs, outputs, cache))
            common["hidden"] = outputs.get("hidden_out", common["hidden"])
        self._run = segments.backend.chain(bound)

    def write(self, rows: Sequence[FedRow]) -> None:
        """What the step reads: embeddings and tables of the rows that were fed, and all lengths behind it."""
        for row in rows:
            for mirror, values in zip(self._rows.values(), row.inputs or (), strict=False):
                mirror.host[row.index, 0] = values
        for index, layers in enumerate(self._layers):
            lengths = np.ones((layers, self._count), np.int64)  # [A, B]
            for place, row in enumerate(rows):
                lengths[:, place] += row.caches[index].lengths
            self._lengths.host[index, : lengths.size] = lengths.ravel()
        for mirror in (*self._rows.values(), self._lengths):
            mirror.push()

    def run(self) -> Rows:
        """Logits of all rows, valid until the next run.  [B, V]"""
        self._run()
        logits: Rows = self._logits.pull()
        return logits
