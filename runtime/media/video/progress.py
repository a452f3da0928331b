"""The frames of a film while another thread decodes it: whoever follows takes parts of them as they come.

Frames that were shown may turn out to be others: where a film's packets lied it is picked anew. Then nothing more is
shown, and whoever took parts compares them with the film. Decodes nothing.
"""

from __future__ import annotations

from threading import Condition

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.video.frames import Video


class FilmProgress:
    """What one film has come to. A film whose frames are not shrunk as they are read shows nothing."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._kept: tuple[NDArray[np.uint8], ...] = ()
        self._size = (0, 0)
        self._ready = 0
        self._is_over = False

    def begin(self) -> None:
        """The decoder picks frames; a second time, it picks them anew."""
        if self._ready:
            self.end()

    def add(self, kept: tuple[NDArray[np.uint8], ...], size: tuple[int, int], ready: int) -> None:
        """The decoder has so many frames.

        Args:
            kept: what is kept of the frames, whole arrays [N, h, w, 3] whose first `ready` are there.
            size: height and width of the frames themselves.
            ready: frames.
        """
        with self._changed:
            if self._is_over:  # it was picked anew
                return
            self._kept = kept
            self._size = size
            self._ready = ready
            self._changed.notify_all()

    def end(self) -> None:
        """No more frames come, whatever the reason."""
        with self._changed:
            self._is_over = True
            self._kept = ()  # they are large
            self._changed.notify_all()

    def part(self, start: int, count: int) -> Video | None:
        """Some frames as a film of their own, once they are there; None where the film is not that long, or decoded.

        Its times are made up: only its pixels count.
        """
        with self._changed:
            while not self._is_over and self._ready < start + count:
                if self._kept and start + count > len(self._kept[0]):
                    return None
                self._changed.wait()
            if self._is_over:
                return None
            shrunk = tuple(array[start : start + count] for array in self._kept)
            frames = np.empty((count, *self._size, 0), np.uint8)
        return Video(frames, np.arange(count), 1.0, count, float(count), 0.0, shrunk=shrunk)
