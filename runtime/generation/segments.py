"""The segments of one bundle over one backend: their buffers, and the sizes in which they are run.

What prefill and decode share. Knows no prompt, no policy and no order of runs; holds no state of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import PromptError
from framefusion.reduction.policy import ReductionState
from framefusion.runtime.backends.base import Backend, Mirror
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.format.manifest import Manifest, SegmentRecord

Rows = NDArray[np.floating[Any]]  # in the bundle's type, scores and logits always fp32
Scores = NDArray[np.float32]


class Segments:
    """Buffers for the segments of a bundle on the device of a backend.

    Args:
        manifest: of the bundle.
        backend: that its graphs are bound to.
    """

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self.manifest = manifest
        self.backend = backend
        self.device = backend.device
        self.float_type = manifest.model.float_type
        self.cache_type = manifest.cache_type

    def outputs(self, record: SegmentRecord, size: int) -> Outputs:
        """Buffers for what a segment gives for `size` tokens."""
        model = self.manifest.model
        mirror = self.device.mirror
        if record.head:
            return Outputs(None, {"logits": mirror((1, model.vocab_size), np.float32)})
        hidden = self.device.empty((1, size, model.hidden_size), self.float_type)
        names = ("similarity", "importance") if record.scores else ()
        return Outputs(hidden, {name: mirror((size,), np.float32) for name in names})

    def cache(self, record: SegmentRecord, capacities: Sequence[int]) -> SegmentCache:
        """An empty cache of a segment, with at least as many slots for each of its attention layers."""
        model = self.manifest.model
        shapes = [(1, model.num_kv_heads, capacity, model.head_dim) for capacity in capacities]
        return self.backend.cache(record, shapes, self.cache_type)

    def extend(self, record: SegmentRecord, cache: SegmentCache, capacities: Sequence[int]) -> None:
        """Give a cache at least as many slots for each layer, in place; what it holds is copied if it has fewer."""
        if all(has >= needed for has, needed in zip(cache.capacities, capacities, strict=True)):
            return
        larger = self.cache(record, capacities)
        for layer, length in enumerate(cache.lengths):
            for old, new in ((cache.keys, larger.keys), (cache.values, larger.values)):
                self.device.copy(new[layer][:, :, :length], old[layer][:, :, :length])
                old[layer] = new[layer]

    def check_lengths(self, cache: SegmentCache) -> None:
        """Hold a cache to what graphs of the adaptive mode count on: they read the length of the first layer alone.

        Raises:
            ValueError: its layers hold different numbers of tokens.
        """
        if self.manifest.reduction.mode != "fixed" and (cache.lengths != cache.lengths[:1]).any():
            raise ValueError(f"layers of one segment hold {cache.lengths.tolist()} tokens: they must hold as many")

    @property
    def batch_refusal(self) -> str | None:
        """Why several requests cannot be decoded in one call; None where they can."""
        refusal = getattr(self.backend, "batch_refusal", None)
        if refusal is None:  # a backend of another package, from before there were batches
            return f"the backend {self.backend.name} decodes one row at a time"
        reasons = (refusal(record.decode) for record in self.manifest.segments)
        return next((reason for reason in reasons if reason is not None), None)

    @property
    def batch_sizes(self) -> Sequence[int] | None:
        """See `Backend.batch_sizes`."""
        sizes: Sequence[int] | None = getattr(self.backend, "batch_sizes", None)
        return sizes

    @property
    def max_batch_size(self) -> int | None:
        """Rows of a step at most; None takes any number."""
        return None if self.batch_sizes is None else max(self.batch_sizes, default=1)

    def padded_batch_size(self, rows: int) -> int:
        """Rows of the smallest step that takes so many."""
        return rows if self.batch_sizes is None else next(size for size in self.batch_sizes if size >= rows)

    def slots(self, length: int, max_new_tokens: int) -> int:
        """Slots for a prompt of `length` tokens and its answer; padding of the last step is written, too."""
        return length + max_new_tokens + self.backend.decode_width - 1


@dataclass
class Outputs:
    """What a segment gives: hidden states, which stay on the device, or what the host reads."""

    hidden: Buffer | None  # [1, S, D]
    small: Mapping[str, Mirror]  # logits [1, V], or similarity and importance [S]

    @property
    def bound(self) -> dict[str, Buffer]:
        """Buffers by the graph's names."""
        rows = {} if self.hidden is None else {"hidden_out": self.hidden}
        return rows | {name: mirror.buffer for name, mirror in self.small.items()}

    def scores(self, reduction: ReductionState | None) -> tuple[Scores | None, Scores | None]:
        """Similarity and importance [S], as far as the next call reads them: what it does not, stays on the device."""
        if reduction is None or "similarity" not in self.small:
            return None, None
        wanted = {"similarity": reduction.wants_similarity, "importance": reduction.wants_importance}
        for name, wants in wanted.items():
            if wants:
                self.small[name].request()
        similarity = self.small["similarity"].pull() if wanted["similarity"] else None
        importance = self.small["importance"].pull() if wanted["importance"] else None
        return similarity, importance


def chunks_of(record: SegmentRecord, size: int, chunk: int | None) -> list[tuple[int, int]]:
    """Begin and end of each chunk of a prefill; only a segment that ends in logits and has no buckets has several."""
    step = chunk if chunk is not None and record.head and record.buckets is None else size
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def bucket_for(record: SegmentRecord, length: int) -> int:
    """The size a prefill of `length` tokens takes in a segment.

    Raises:
        PromptError: no bucket is large enough.
    """
    if record.buckets is None:
        return length
    for bucket in record.buckets:
        if bucket >= length:
            return bucket
    raise PromptError(
        f"segment {record.name} got {length} tokens, its largest bucket takes {max(record.buckets)}: "
        "sample fewer frames, or rebuild with larger --buckets"
    )
