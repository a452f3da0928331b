"""The tokens of one answer out of a batch: fed as soon as they are chosen, so that a step has those of all requests.

Knows no sampling but that of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.generation.batching.decode_batch import BatchRow, DecodeBatch
from framefusion.runtime.generation.decode import ActiveRequest
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.generation.segments import Rows
from framefusion.runtime.request import Stopwatch


def tokens_together(
    batch: DecodeBatch,
    embedding: Callable[[NDArray[np.int64]], Rows],
    prefilled: Prefilled,
    active: ActiveRequest,
    stopwatch: Stopwatch,
) -> Generator[tuple[str, Rows], None, None]:
    """The text of each token, and the logits it was chosen from, which a later step overwrites.

    Args:
        batch: that the request joins with its first token, and leaves behind its last one.
        embedding: [S] -> [S, D].
        prefilled: its caches are in the batch meanwhile.
        active: the request.
        stopwatch: gets the stage "decode": the steps that the request takes part in, whoever runs them.
    """
    row: BatchRow | None = None
    try:
        last = prefilled.logits
        while True:
            # 1. Choose the token, and feed it before it is given away: the step that comes has it beside the others'.
            with stopwatch.stage("decode"):
                text = active.accept(last)
                if active.finish_reason is None:
                    row = row or batch.join(prefilled.caches)
                    row.feed(embedding(np.array(active.token_ids[-1:]))[0], *active.rotary)
            yield text, last
            if active.finish_reason is not None or row is None:
                return
            # 2. The first request that comes back runs the step for all.
            before = row.seconds
            last = row.logits()
            stopwatch.add("decode", row.seconds - before)
    finally:
        if row is not None:
            row.leave()
