"""Conversations whose keys and values are kept between requests: a request that goes on where one ended prefills only
what is new.

    request: system, user (film), assistant, user
             [.... a kept conversation ....]  [new]

A client names a conversation, or none: then the longest one that the request begins with is continued, equal in every
text, in the content of every film and in how it was reduced. What is kept has a budget in bytes; what was used least
lately goes first. Knows no protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.session import Session
from framefusion.runtime.text.prompt import Turn

_log = logging.getLogger("framefusion.server")

TurnKey = tuple[str, ...]
"""What a turn is known by: its role, its texts, the digests of what it shows, and how that was reduced."""


@dataclass(eq=False)
class Conversation:
    """One conversation, kept or about to be.

    Attributes:
        session: with its caches.
        turns: what was said, by keys; empty at first.
        name: that the client gave.
    """

    session: Session
    turns: tuple[TurnKey, ...] = ()
    name: str | None = None

    @property
    def nbytes(self) -> int:
        """Keys and values, and the frames that a prefill from the start would read again."""
        return self.session.cache_bytes + sum(_pixel_bytes(file) for file in self.session.files)


def _pixel_bytes(file: object) -> int:
    if isinstance(file, Video):
        return file.frames.nbytes + sum(array.nbytes for array in file.shrunk)
    return file.nbytes if isinstance(file, np.ndarray) else 0


def answer_key(text: str) -> TurnKey:
    """The key of an answer of ours, as a client sends it back."""
    return ("assistant", f"text {text}")


@dataclass
class Conversations:
    """The conversations of a server that no request works on now.

    Attributes:
        pipeline: whose sessions they are.
        budget: bytes at most for all that are kept.
        batch: in which answers are decoded together; None where each is by itself.
        evicted: how many went for room.
    """

    pipeline: Pipeline
    budget: int
    batch: DecodeBatch | None = None
    evicted: int = 0
    _kept: list[Conversation] = field(default_factory=list)  # used least lately first
    _lock: Lock = field(default_factory=Lock)

    @property
    def nbytes(self) -> int:
        """Bytes of all that are kept."""
        with self._lock:
            return sum(conversation.nbytes for conversation in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def make_room(self, nbytes: int) -> None:
        """Let conversations go until so many bytes of the budget are free, or none is left."""
        with self._lock:
            total = sum(kept.nbytes for kept in self._kept)
            while self._kept and total > self.budget - nbytes:
                gone = self._kept.pop(0)
                total -= gone.nbytes
                self.evicted += 1
                name = "a conversation" if gone.name is None else f"conversation {gone.name!r}"
                _log.info("evicted %s of %d turns, %d bytes, for room", name, len(gone.turns), gone.nbytes)

    def take(self, turns: Sequence[TurnKey], name: str | None) -> Conversation:
        """The conversation that a request continues, or a new one; nobody else gets it until it is given back.

        Args:
            turns: of the whole request.
            name: that the client gave, None for none: named and nameless ones are never mixed.
        """
        best: Conversation | None = None
        with self._lock:
            for conversation in self._kept:
                count = len(conversation.turns)
                begins = conversation.name == name and count < len(turns)
                begins = begins and tuple(turns[:count]) == conversation.turns
                if begins and (best is None or count > len(best.turns)):
                    best = conversation
            if best is not None:
                self._kept.remove(best)
        return best or Conversation(self.pipeline.session(max_cache_bytes=self.budget, batch=self.batch), name=name)

    def give_back(self, conversation: Conversation) -> None:
        """Keep a conversation, if the bundle can go on behind caches and there is room; what is older may go for it."""
        if not conversation.turns or self.pipeline.restart_reason is not None:
            return
        if len(conversation.session.turns) != len(conversation.turns):  # a turn ended between the two: not known again
            return
        with self._lock:
            self._kept = [
                kept for kept in self._kept if kept.name is None or kept.name != conversation.name
            ]  # a name is one conversation: the new one
            self._kept.append(conversation)
        self.make_room(0)

    def clear(self) -> None:
        """Let all of them go."""
        with self._lock:
            self._kept.clear()


def turn_keys(turns: Sequence[Turn], media_keys: Sequence[str], reduction: str) -> list[TurnKey]:
    """What each turn of a request is known by.

    Args:
        turns: of the whole request.
        media_keys: of what they show, in order.
        reduction: how films are reduced.
    """
    remaining = iter(media_keys)
    keys: list[TurnKey] = []
    for turn in turns:
        names: list[str] = []
        for part in turn.parts:
            if not isinstance(part, str):
                names.append(f"media {next(remaining)} {reduction}")
            else:
                names.append(f"text {part}")
        keys.append((turn.role, *names))
    return keys
