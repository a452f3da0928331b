"""One request from the caller's side: what it says, the answer it gets, and the seconds that went into it.

Knows no graph and no bundle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from framefusion.reduction.policy import CallRecord
from framefusion.runtime.media.video.frames import VideoFacts
from framefusion.runtime.text.sampling import GenerationConfig

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """What may differ from one generation to the next; None takes the bundle's own value.

    `generation` as well: what it leaves None, such as the tokens that end an answer, is as the bundle says.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    cost: float | None = None
    similarity_lower_bound: float | None = None
    ratio_lower_bound: float | None = None
    generation: GenerationConfig | None = None
    seed: int | None = None
    reducer: str | None = None  # a name of framefusion.reducers


@dataclass(frozen=True)
class Generation:
    """An answer and how it came about."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    visual_tokens: int
    reduction: tuple[CallRecord, ...]
    kv_lengths: tuple[int, ...]  # tokens in each layer's cache after the prefill
    seconds: dict[str, float]
    videos: tuple[VideoFacts, ...] = ()  # the films shown, in order

    @property
    def cost(self) -> float:
        """The share of the computation over visual tokens that was kept; 1 where there was nothing to drop."""
        text = self.prompt_tokens - self.visual_tokens
        kept = sum(length - text for length in self.kv_lengths)
        return kept / (self.visual_tokens * len(self.kv_lengths)) if self.visual_tokens else 1.0


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
