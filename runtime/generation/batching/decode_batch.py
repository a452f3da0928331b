"""Decode of many requests in one call: a row each, of its own length in every segment, over slabs that all rows share.

    request a, cost 1    segment 0 [#########.]   segment 1 [#########.]   segment 2 [#########.]
    request b, cost 0.3  segment 0 [#####.....]   segment 1 [####......]   segment 2 [##........]
                                slab 0, C slots         slab 1                   slab 2

A slab is one buffer [R, Hkv, C, hd] for the keys of a layer and one for its values. A row's caches are moved in when it
joins and out when it leaves, and the last row takes the place of one that left: a step copies no cache. Engines of
static shapes have slabs of one size, allocated once, and steps of some numbers of rows, each of which is bound once.
Rows are fed as their tokens are chosen; the first that wants its logits runs a step for all that were fed. So whoever
drives requests in rounds has them decoded together and need not know. Knows no sampling and no request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import repeat
from threading import RLock

import numpy as np

from framefusion.errors import BackendError, PromptError
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import SegmentRecord
from framefusion.runtime.generation.batching.batch_step import BatchStep
from framefusion.runtime.generation.segments import Rows, Segments

SLOTS = 256
"""Slots of a slab are a multiple of this, so that a request that is a little longer moves nothing."""


class BatchRow:
    """One request's place in a batch, from `DecodeBatch.join` to `leave`.

    Attributes:
        caches: of each segment; while the row is in the batch, views of the slabs.
        seconds: of the steps that it took part in.
        is_finite: all its logits were numbers.
    """

    def __init__(self, batch: DecodeBatch, index: int, caches: Sequence[SegmentCache]) -> None:
        self.caches = caches
        self.seconds = 0.0
        self.index = index
        self.capacities = [np.array(cache.capacities) - batch.spare for cache in caches]  # it may fill so many slots
        self._batch = batch
        self.inputs: tuple[Rows, Rows, Rows] | None = None  # of the step that comes: [D], [hd/2], [hd/2]
        self.scores: Rows | None = None  # [V] of the last step, until they are taken
        self.is_finite = True

    def feed(self, hidden: Rows, cos: Rows, sin: Rows) -> None:
        """Give the token chosen last, which the next step computes: embedding [D] and tables [hd/2].

        Raises:
            PromptError: a cache is full.
        """
        for cache, most in zip(self.caches, self.capacities, strict=True):
            if (cache.lengths + 1 > most).any():
                raise PromptError(f"a cache of {most.min()} tokens is full: ask for fewer new tokens")
        self.inputs = hidden, cos, sin

    def logits(self) -> Rows:
        """Of the token that was fed, valid until the next step.  [V]"""
        return self._batch.take_logits(self)

    def leave(self) -> None:
        """Take the caches out, as large as what they hold; leaving again does nothing."""
        self._batch.remove(self)


class DecodeBatch:
    """The requests that are decoded together. Threads may share it: one computes while the others wait.

    Args:
        segments: of a bundle whose backend batches (`Segments.batch_refusal`).
        on_step: called with the rows of each step.
    """

    def __init__(self, segments: Segments, on_step: Callable[[int], None] = lambda rows: None) -> None:
        self._segments = segments
        self._on_step = on_step
        self._rows: list[BatchRow] = []
        self._slabs: list[SegmentCache] = []  # of each segment; lengths are the rows'
        self._steps: dict[int, BatchStep] = {}  # by their rows, bound to these slabs
        self._lock = RLock()
        self.spare = 0 if segments.batch_sizes is None else 1
        """Slots that a row of static size keeps free, for the step in which it is not fed; others get one more."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs, free slots included; the CPU has pages of those alone that were written."""
        return sum(slab.nbytes for slab in self._slabs)

    def join(self, caches: Sequence[SegmentCache]) -> BatchRow:
        """Move the caches of a prefill into the slabs, and their buffers' memory away with them.

        Args:
            caches: of each segment; they become views of the slabs, and grow by a token with each step.

        Raises:
            BackendError: there are as many rows as a step may have.
        """
        for cache in caches:
            self._segments.check_lengths(cache)
        with self._lock:
            most = self._segments.max_batch_size
            if most is not None and len(self._rows) == most:
                raise BackendError(
                    f"{most} requests are decoded, the engines take no more in a step: wait for one of them, or "
                    "compile with a larger --max-batch-size"
                )
            row = BatchRow(self, len(self._rows), caches)
            self._resize([*self._rows, row])
            self._move(row, row.index)
            self._rows.append(row)
            return row

    def remove(self, row: BatchRow) -> None:
        """See `BatchRow.leave`."""
        with self._lock:
            if row not in self._rows:
                return
            # 1. What the row holds goes with it.
            device = self._segments.device
            for cache in row.caches:
                for layer, length in enumerate(cache.lengths):
                    for buffers in (cache.keys, cache.values):
                        held = buffers[layer][:, :, :length]
                        buffers[layer] = device.empty(held.shape, held.dtype)
                        device.copy(buffers[layer], held)
            # 2. Numbers that are none stay behind in no slot: a backend may multiply what it masks by zero.
            if not row.is_finite:
                for buffer in (buffer for slab in self._slabs for buffer in (*slab.keys, *slab.values)):
                    there = buffer[row.index : row.index + 1]
                    device.copy(there, device.zeros(there.shape, self._segments.cache_type))
            # 3. The last row takes its place.
            last = self._rows.pop()
            if last is not row:
                self._rows[row.index] = last
                self._move(last, row.index)
            # 4. Slabs that became far too large are given back.
            self._resize(self._rows)

    def take_logits(self, row: BatchRow) -> Rows:
        """See `BatchRow.logits`."""
        with self._lock:
            if row.scores is None:
                if row.inputs is None or row not in self._rows:
                    raise ValueError("a row that was not fed, or has left, has no logits")
                self._run()
            assert row.scores is not None  # the step computed it
            scores = row.scores
            row.scores = None
            return scores

    def _run(self) -> None:
        """One step of all rows; those that were not fed compute what nobody reads, in a slot that is free."""
        begun = time.perf_counter()
        # 1. A step overwrites the logits of the one before: rows that did not take theirs keep a copy.
        for row in self._rows:
            row.scores = None if row.scores is None else row.scores.copy()
        # 2. Bind once for so many rows, then write what differs from step to step.
        count = self._segments.padded_batch_size(len(self._rows))
        if count not in self._steps:
            if self._segments.batch_sizes is None:
                self._steps = {}  # there may be any number of others
            slabs = [part(slab, slice(0, count)) for slab in self._slabs]
            self._steps[count] = BatchStep(self._segments, slabs, count)
        step = self._steps[count]
        step.write(self._rows)
        # 3. Run, and count the tokens of those that were fed.
        logits = step.run()
        fed = [row for row in self._rows if row.inputs is not None]
        seconds = time.perf_counter() - begun
        for row in fed:
            for cache in row.caches:
                cache.lengths += 1
            row.inputs = None
            row.scores = logits[row.index]
            row.is_finite = row.is_finite and bool(np.isfinite(row.scores).all())
            row.seconds += seconds
        self._on_step(len(fed))

    def _move(self, row: BatchRow, index: int) -> None:
        """Copy what a row holds to a place in the slabs, and let its caches be views of that."""
        device = self._segments.device
        for cache, slab in zip(row.caches, self._slabs, strict=True):
            for layer, length in enumerate(cache.lengths):
                for buffers, shared in ((cache.keys, slab.keys), (cache.values, slab.values)):
                    there = shared[layer][index : index + 1]
                    device.copy(there[:, :, :length], buffers[layer][:, :, :length])
                    buffers[layer] = there
        row.index = index

    def _resize(self, rows: Sequence[BatchRow]) -> None:
        """Let the slabs fit these rows: as they are, larger, or smaller where less than a quarter is needed."""
        most_rows = self._segments.max_batch_size
        records = self._segments.manifest.segments
        if most_rows is not None:  # one size for good
            if not self._slabs:
                slots = [(capacities + self.spare).tolist() for capacities in rows[0].capacities]
                self._slabs = [self._slab(*each) for each in zip(records, repeat(most_rows), slots)]
            return
        if not rows:
            self._steps = {}
            self._slabs = []
            return
        count = 1 << (len(rows) - 1).bit_length()
        for index, record in enumerate(records):
            most = np.max([row.capacities[index] for row in rows], axis=0) + 1  # a row that is not fed has a free slot
            slots = (-(-most // SLOTS) * SLOTS).tolist()
            if index == len(self._slabs):
                self._steps = {}
                self._slabs.append(self._slab(record, count, slots))
                continue
            slab = self._slabs[index]
            rows_there = slab.keys[0].shape[0]
            fits = rows_there >= len(rows) and all(np.array(slab.capacities) >= slots)
            wasted = rows_there * sum(slab.capacities) > 4 * count * sum(slots)
            if not fits or wasted:
                self._replace(index, self._slab(record, count, slots))

    def _slab(self, record: SegmentRecord, rows: int, slots: Sequence[int]) -> SegmentCache:
        model = self._segments.manifest.model
        shapes = [(rows, model.num_kv_heads, most, model.head_dim) for most in slots]
        return self._segments.backend.cache(record, shapes, self._segments.cache_type)

    def _replace(self, index: int, larger: SegmentCache) -> None:
        """Move the rows of a segment to another slab, a layer at a time: no more than one is there twice."""
        device = self._segments.device
        self._steps = {}
        old = self._slabs[index]
        for layer in range(len(old.keys)):
            for before, after, name in ((old.keys, larger.keys, "keys"), (old.values, larger.values, "values")):
                for row in self._rows:
                    cache = row.caches[index]
                    there = after[layer][row.index : row.index + 1]
                    length = cache.lengths[layer]
                    device.copy(there[:, :, :length], before[layer][row.index : row.index + 1][:, :, :length])
                    getattr(cache, name)[layer] = there
                before[layer] = after[layer]
        self._slabs[index] = larger


def part(cache: SegmentCache, rows: slice) -> SegmentCache:
    """Some rows of a slab."""
    return SegmentCache([keys[rows] for keys in cache.keys], [values[rows] for values in cache.values], cache.lengths)
