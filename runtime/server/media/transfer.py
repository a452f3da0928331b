"""A film on its way through the pipe from its decoder: some frames at a time, as they are decoded.

    child    {"part": [0, 4], ...} bytes | {"part": [4, 8], ...} bytes | facts, and the arrays that are left
    server   arrays of the whole film, filled from their beginning; whoever follows sees what is there

Lines are JSON, arrays are blocks of bytes. Nothing is believed: each size is compared with the limits before memory is
taken for it, and each block with the size that was announced before it is read. Knows no process and no decoder.
"""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.video.frames import FrameFollower

_LINE = 1 << 20  # bytes of a line of JSON
_BLOCK = 1 << 20  # bytes of an array that pass at once
_PART = 1 << 18  # bytes of frames that are worth a line
_NUMBERS = 64 << 20  # bytes of all that is said about a film's frames, beside their pixels
_DTYPES = {"uint8": np.uint8, "int64": np.int64, "float64": np.float64}


def send_line(pipe: Connection, facts: dict[str, Any]) -> None:
    """Send facts.

    Raises:
        BrokenPipeError: nobody waits any more.
    """
    pipe.send_bytes(json.dumps(facts).encode())


def send_array(pipe: Connection, array: NDArray[Any]) -> None:
    """Send the bytes of an array, which may have none.

    Raises:
        BrokenPipeError: nobody waits any more.
    """
    if not array.nbytes:
        return
    content = np.ascontiguousarray(array).data.cast("B")
    for start in range(0, len(content), _BLOCK):
        pipe.send_bytes(content[start : start + _BLOCK])


class FrameSender:
    """Sends the frames of a film as they are decoded, for as long as they are what the film will be.

    Attributes:
        sent: frames.
    """

    def __init__(self, pipe: Connection) -> None:
        self.sent = 0
        self._pipe = pipe
        self._is_over = False

    def begin(self) -> None:
        """Frames are picked; once some were sent, they are picked anew, and no more are sent."""
        self._is_over = self.sent > 0

    def add(self, kept: tuple[NDArray[np.uint8], ...], size: tuple[int, int], ready: int) -> None:
        """So many frames are there: see `FilmProgress.add`. The end of this process where nobody waits any more."""
        count = len(kept[0])
        waiting = sum(array[self.sent : ready].nbytes for array in kept)
        if self._is_over or not waiting or (waiting < _PART and ready < count):
            return
        pictures = [array.shape[1:3] for array in kept]
        try:
            send_line(self._pipe, {"part": [self.sent, ready], "of": count, "size": size, "pictures": pictures})
            for array in kept:
                send_array(self._pipe, array[self.sent : ready])
        except BrokenPipeError:
            raise SystemExit from None
        self.sent = ready

    def has_sent(self, count: int) -> bool:
        """Whether all frames of a film are sent."""
        return not self._is_over and self.sent == count


class FilmReceiver:
    """Takes what a child sends of one film or picture.

    Args:
        pipe: to the child.
        limits: of what it may send.
        follower: learns of frames as they come; None where none may come before the facts.

    Attributes:
        kept: what came of a film's frames in parts, each [N, h, w, 3].
    """

    def __init__(self, pipe: Connection, limits: MediaLimits, follower: FrameFollower | None) -> None:
        self.kept: tuple[NDArray[np.uint8], ...] = ()
        self._pipe = pipe
        self._limits = limits
        self._follower = follower
        self._size = (0, 0)
        self._ready = 0
        self._room = max(limits.film_bytes, 3 * limits.image_pixels) + _NUMBERS

    def facts(self) -> dict[str, Any]:
        """The facts, behind all parts.

        Raises:
            ValueError, LookupError, TypeError: what came is nothing that `FrameSender` sends.
            EOFError, OSError: the child is gone, or sends something longer than it said.
        """
        while "part" in (line := json.loads(self._pipe.recv_bytes(_LINE))):
            self._take_part(line)
        if not isinstance(line, dict):
            raise TypeError(f"facts are {type(line).__name__}")
        if not line.get("sent"):
            self._forget_parts()
        elif self._ready != len(self.kept[0]):
            raise ValueError(f"{self._ready} of {len(self.kept[0])} frames were sent")
        return line

    def array(self, about: dict[str, Any]) -> NDArray[Any]:
        """The next array, if it is one that the limits admit.

        Raises:
            ValueError, LookupError, TypeError, EOFError, OSError: see `facts`.
        """
        shape = tuple(int(side) for side in about["shape"])
        array = self._empty(shape, np.dtype(_DTYPES[about["dtype"]]))
        self._fill(array)
        return array

    def _forget_parts(self) -> None:
        """All of the film comes now, picked anew: parts make room for it, here and at whoever followed them."""
        if self._follower is not None and self._ready:
            self._follower.begin()
        self._room += sum(array.nbytes for array in self.kept)
        self.kept = ()

    def _take_part(self, line: dict[str, Any]) -> None:
        """Some frames of a film, into their place."""
        if self._follower is None:
            raise ValueError("frames came that nobody follows")
        start, end = (int(frame) for frame in line["part"])
        height, width = (int(side) for side in line["size"])
        count = int(line["of"])
        shapes = [(count, int(rows), int(columns), 3) for rows, columns in line["pictures"]]
        # 1. The first part says how large the film is; no other part may say anything else.
        if not self._ready:
            smallest = min((height, width, *(min(shape) for shape in shapes)))
            if not shapes or smallest < 1 or height * width > self._limits.frame_pixels:
                raise ValueError(f"frames of {width}x{height} as pictures {shapes}")
            self._size = (height, width)
            self.kept = tuple(self._empty(shape, np.dtype(np.uint8)) for shape in shapes)
        if (self._size, [array.shape for array in self.kept]) != ((height, width), shapes):
            raise ValueError(f"frames of {width}x{height} as pictures {shapes} behind others")
        # 2. Parts follow each other: what was shown to somebody is never written again.
        if not self._ready == start < end <= count:
            raise ValueError(f"frames {start} to {end} of {count} behind {self._ready}")
        for array in self.kept:
            self._fill(array[start:end])
        self._ready = end
        self._follower.add(self.kept, self._size, end)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Memory for an array, within what is left of the limits for all of them."""
        nbytes = dtype.itemsize
        for side in shape:
            nbytes *= side
        if min(shape, default=0) < 0 or len(shape) > 4 or nbytes > self._room:
            raise ValueError(f"an array of shape {shape}")
        self._room -= nbytes
        return np.empty(shape, dtype)

    def _fill(self, array: NDArray[Any]) -> None:
        """Read the bytes of an array, which lie one after the other."""
        if not array.nbytes:
            return
        content = array.data.cast("B")
        for start in range(0, len(content), _BLOCK):
            room = content[start : start + _BLOCK]
            block = self._pipe.recv_bytes(len(room))
            if len(block) != len(room):
                raise ValueError("an array is shorter than it was said to be")
            room[:] = block
