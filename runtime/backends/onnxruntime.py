"""ONNX Runtime on the CPU: every buffer is ours and bound by address, so a run copies nothing and grows no cache.

All sessions share one arena that grows by what is asked, not by powers of two, because segments run one after another:
their activations may take the same memory. Memory patterns are off: they reserve a second block for each new length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends import Array
from framefusion.runtime.kv_cache import SegmentCache

_SAME_AS_REQUESTED = 1


@cache
def _share_arena() -> None:
    """Register the process's CPU arena; ONNX Runtime allows it once."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    arena = ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": _SAME_AS_REQUESTED})
    ort.create_and_register_allocator(memory, arena)


class OnnxRuntimeBackend:
    """The graphs of a bundle as ONNX Runtime sessions, opened when first bound.

    Args:
        folder: the bundle.
        threads: of one operator; 0 lets ONNX Runtime take the physical cores.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, threads: int = 0) -> None:
        self._folder, self._threads = folder, threads
        self._sessions: dict[str, Any] = {}

    def open(self, graphs: Sequence[str]) -> None:
        """See `Backend.open`. Packing a tensor holds it twice for a moment."""
        for graph in graphs:
            self.session(graph)

    def session(self, graph: str) -> Any:
        """The session of a graph, named by its path in the bundle."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(self._folder / graph)
        return self._sessions[graph]

    def _open(self, path: Path) -> Any:
        try:
            import onnxruntime as ort
        except ImportError:
            raise BackendError("onnxruntime is not installed: pip install onnxruntime") from None
        _share_arena()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.enable_mem_pattern = False
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # do not disturb the next segment's pool
        try:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"{path} cannot be loaded by onnxruntime {ort.__version__} ({error}): rebuild") from error

    def bind(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        cache: SegmentCache | None,
    ) -> OnnxRuntimeSegment:
        """See `Backend.bind`."""
        return OnnxRuntimeSegment(self.session(graph), inputs, outputs, cache)


class OnnxRuntimeSegment:
    """One session's IO binding over arrays that this object keeps alive."""

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        cache: SegmentCache | None,
    ) -> None:
        import onnxruntime as ort

        self._session, self._binding, self._cache = session, session.io_binding(), cache
        self._options = ort.RunOptions()
        self._options.only_execute_path_to_fetches = True  # a chunk whose logits nobody wants has no head
        wanted = {value.name for value in session.get_inputs()}  # a graph drops inputs it has no use for
        self.inputs = {name: array for name, array in inputs.items() if name in wanted}
        self.outputs = outputs
        for name, array in self.inputs.items():
            self._bind(self._binding.bind_input, name, array)
        for name, array in self.outputs.items():
            self._bind(self._binding.bind_output, name, array)
        if cache is not None:
            for j, buffers in enumerate(zip(cache.keys, cache.values, strict=True)):
                for part, buffer in zip(("key", "value"), buffers, strict=True):
                    self._bind(self._binding.bind_input, f"past_{part}_{j}", buffer)
                    self._bind(self._binding.bind_output, f"present_{part}_{j}", buffer)

    @staticmethod
    def _bind(bind: Any, name: str, array: Array) -> None:
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is bound by address and must be contiguous")
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Run the graph; outputs and caches change in place."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            shapes = {name: array.shape for name, array in self.inputs.items()}
            raise BackendError(f"onnxruntime refused inputs of shapes {shapes} ({error})") from error
