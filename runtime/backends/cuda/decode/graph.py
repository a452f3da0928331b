"""A sequence of launches captured once and replayed with one call to the driver: what a decode step is.

Addresses are captured, not contents: whoever replays writes new values to the same buffers before. Run the sequence
plainly first: kernels that are compiled or memory that is allocated on the first run cannot be captured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from framefusion.errors import BackendError
from framefusion.runtime.backends.cuda.driver import Cuda, Handle
from framefusion.runtime.backends.cuda.memory import DeviceMemory


class Captured:
    """What `run` enqueues on a stream, as a CUDA graph. Buffers that it names must be kept alive by the caller.

    Raises:
        BackendError: something in the sequence cannot be captured; the stream is usable all the same.
    """

    def __init__(self, cuda: Cuda, stream: Handle, memory: DeviceMemory, run: Callable[[], object]) -> None:
        self._cuda = cuda
        self._stream = stream
        graph = self._capture(memory, run)
        self._graph = cuda.call("cuGraphInstantiate", graph, 0)
        cuda.call("cuGraphDestroy", graph)
        weakref.finalize(self, cuda.call, "cuGraphExecDestroy", self._graph).atexit = False

    def _capture(self, memory: DeviceMemory, run: Callable[[], object]) -> Handle:
        mode = self._cuda.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        memory.hold_back()
        try:
            self._cuda.call("cuStreamBeginCapture", self._stream, mode)
            try:
                run()
            except BaseException:
                self._abandon()
                raise
            graph: Handle = self._cuda.call("cuStreamEndCapture", self._stream)
            return graph
        finally:
            memory.let_go()

    def _abandon(self) -> None:
        """End a capture that failed: the first error is the one to tell."""
        try:
            self._cuda.call("cuGraphDestroy", self._cuda.call("cuStreamEndCapture", self._stream))
        except BackendError:
            return

    def __call__(self) -> None:
        """Enqueue the whole sequence."""
        self._cuda.call("cuGraphLaunch", self._graph, self._stream)
