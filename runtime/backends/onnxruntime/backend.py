"""ONNX Runtime: every buffer is ours and bound by address, so a run copies nothing and grows no cache.

On the CPU all sessions share one arena that grows by the bytes requested, not by powers of two, because segments run
one after another: their activations may take the same memory. Memory patterns are off: they reserve a second block for
each new length.

On an NVIDIA GPU (onnxruntime-gpu) buffers lie there and sessions run on the device's stream, so nothing waits before a
score or a logit is read. What has no CUDA kernel ONNX Runtime runs on the CPU by itself. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from framefusion.console.plain_text import printable
from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends.base import Backend, BoundSegment
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.cuda.array import device_array
from framefusion.runtime.backends.cuda.decode.checked import CheckedGraphs
from framefusion.runtime.backends.fit import one_row
from framefusion.runtime.backends.host import HostBackend
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.format.manifest_checks import WEIGHTS
from framefusion.runtime.machine.cpu import default_threads
from framefusion.runtime.machine.pages import give_back
from framefusion.runtime.trust.graph_check import check_graph

if TYPE_CHECKING:
    from framefusion.runtime.backends.cuda.device import CudaDevice

CUDA_PROVIDER = "CUDAExecutionProvider"
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no type of that name
_SAME_AS_REQUESTED = 1


@cache
def _share_arena() -> None:
    """Register the process's CPU arena; ONNX Runtime allows it once."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    arena = ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": _SAME_AS_REQUESTED})
    ort.create_and_register_allocator(memory, arena)


class OnnxRuntimeBackend(HostBackend):
    """The graphs of a bundle as ONNX Runtime sessions on the CPU, opened when first bound.

    Args:
        folder: the bundle.
        threads: of one operator; 0 takes the physical cores that this process has.
        decode_width: see `HostBackend`.
        mapped: weights stay in their files, which are mapped, and are converted when an operator wants them: slow, and
            memory holds one matrix. Else they are packed once, in fp32 on the CPU, and stay.
        manifest: of the bundle; graphs are compared with it. None compares them with the files beside them alone.
    """

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        threads: int = 0,
        decode_width: int = 1,
        *,
        mapped: bool = False,
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(decode_width)
        self._folder = folder
        self._threads = threads or default_threads()
        self.host_threads = self._threads
        self._manifest = manifest
        self._mapped = mapped
        self._sessions: dict[str, Any] = {}

    @property
    def _place(self) -> tuple[str, int]:
        """ONNX Runtime's name of the device, and which one."""
        return "cpu", 0

    @property
    def _providers(self) -> list[Any]:
        return ["CPUExecutionProvider"]

    def open(self, graphs: Sequence[str]) -> None:
        """See `Backend.open`. Packing a tensor holds it twice for a moment."""
        for graph in graphs:
            self.session(graph)

    def session(self, graph: str) -> Any:
        """The session of a graph, named by its path in the bundle."""
        if graph not in self._sessions:
            check_graph(self._folder, graph, self._manifest)
            self._sessions[graph] = self._open(self._folder / graph)
            if not self._mapped:
                self._give_scales_back(graph)
        return self._sessions[graph]

    def _give_scales_back(self, graph: str) -> None:
        """Let go of pages that were read to be packed.

        ONNX Runtime unmaps a weight once it is packed, but not the scales of weights that are codes: kernels read the
        copy that is packed with them.
        """
        if self._manifest is not None and self._manifest.quantization is not None:
            give_back((self._folder / graph).with_name(WEIGHTS))

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`: the graph itself says whether it is free in its rows."""
        if self.decode_width != 1:
            return f"a step of {self.name} has {self.decode_width} tokens of one row"
        rows = {value.name: value.shape[0] for value in self.session(graph).get_inputs()}["hidden"]
        return None if isinstance(rows, str) else one_row(graph, self._manifest)

    def _open(self, path: Path) -> Any:
        try:
            import onnxruntime as ort
        except ImportError:
            raise BackendError("onnxruntime is not installed: pip install onnxruntime") from None
        _share_arena()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.enable_mem_pattern = False
        options.log_severity_level = 4  # errors are raised as well, and logged with the names that a graph gives
        options.add_session_config_entry("session.use_env_allocators", "0" if self._mapped else "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # do not disturb the next segment's pool
        if self._mapped:
            # no copy is packed, no conversion of a weight is done ahead, and each waits for its operator
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            on_cpu = self._place[0] == "cpu"  # there is nothing to fall back to, and it would be printed on stdout
            return ort.InferenceSession(
                self._model(path, options), options, providers=self._providers, enable_fallback=not on_cpu
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__} ({_said(error)}): rebuild"
            ) from error

    def _model(self, path: Path, options: Any) -> Path | bytes:
        """What a session is opened of."""
        return path

    def bind(
        self,
        graph: str,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        cache: SegmentCache | None,
    ) -> OnnxRuntimeSegment:
        """See `Backend.bind`."""
        return OnnxRuntimeSegment(self.session(graph), inputs, outputs, cache, self._place)


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """The same on a GPU.

    Args:
        folder: the bundle.
        device: where.
        manifest: see `OnnxRuntimeBackend`.
    """

    name = "onnxruntime-cuda"

    def __init__(self, folder: Path, device: CudaDevice, manifest: Manifest | None = None) -> None:
        super().__init__(folder, manifest=manifest)
        self.device = device
        self.chunk = None
        self.host_threads = None
        self._cuda = device
        self._graphs = CheckedGraphs(device)

    def chain(self, segments: Sequence[BoundSegment]) -> Callable[[], None]:
        """See `Backend.chain`: a step is replayed as a CUDA graph where it has shown that it can be."""
        bound = [segment for segment in segments if isinstance(segment, OnnxRuntimeSegment)]
        return self._graphs.chain(bound, segments[len(bound) :])

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`: GroupQueryAttention has a kernel for rows of unequal lengths.

        So its source says (contrib_ops/cuda/bert); no GPU has run it, and the golden proves it before it is used.
        """
        if self._manifest is not None and self._manifest.dialect != "gqa":
            return f"the backend {self.name} decodes one row at a time over graphs of {self._manifest.dialect}"
        return super().batch_refusal(graph)

    def _open(self, path: Path) -> Any:
        import onnxruntime as ort

        if hasattr(ort, "preload_dlls"):  # CUDA's libraries as pip installs them
            ort.preload_dlls()
        session = super()._open(path)
        if CUDA_PROVIDER not in session.get_providers():  # it falls back silently where a library is missing
            raise BackendError(
                f"{CUDA_PROVIDER} of onnxruntime {ort.__version__} does not start: install the CUDA and cuDNN "
                "libraries it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]'), or run with --device cpu"
            )
        return session

    @property
    def _place(self) -> tuple[str, int]:
        return "cuda", self._cuda.ordinal

    @property
    def _providers(self) -> list[Any]:
        options = {
            "device_id": str(self._cuda.ordinal),
            "user_compute_stream": str(self._cuda.stream),
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(CUDA_PROVIDER, options), "CPUExecutionProvider"]


def open_backend(bundle: Bundle, name: str, device: str, threads: int) -> Backend:
    """The graphs of a bundle on a kind of device.

    Args:
        bundle: read and verified.
        name: of the row of the table.
        device: "cpu" or "cuda", which takes the first GPU.
        threads: of one operator on the CPU; 0 takes the physical cores that this process has.

    Raises:
        BackendError: there is no such device after all.
    """
    if device == "cpu":
        return OnnxRuntimeBackend(bundle.folder, threads, manifest=bundle.manifest)
    from framefusion.runtime.backends.cuda.device import CudaDevice

    return OnnxRuntimeCudaBackend(bundle.folder, CudaDevice(bundle.manifest.model.float_type), bundle.manifest)


class OnnxRuntimeSegment:
    """One session's IO binding over buffers that this object keeps alive."""

    def __init__(
        self,
        session: Any,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        cache: SegmentCache | None,
        place: tuple[str, int] = ("cpu", 0),
    ) -> None:
        import onnxruntime as ort

        self._session = session
        self._binding = session.io_binding()
        self._cache = cache
        self._place = place
        self._addresses: list[tuple[str, int, tuple[int, ...]]] = []
        self._options = ort.RunOptions()
        self._options.log_severity_level = 4  # as for the session
        if place[0] != "cpu":  # what follows is on the same stream: nothing has to wait here
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        names = {value.name for value in session.get_inputs()}  # a graph drops inputs it has no use for
        self.inputs = {name: array for name, array in inputs.items() if name in names}
        self.outputs = outputs
        for name, array in self.inputs.items():
            self._bind(self._binding.bind_input, name, array)
        for name, array in self.outputs.items():
            self._bind(self._binding.bind_output, name, array)
        if cache is not None:
            for name, buffer in cache.named("past").items():
                self._bind(self._binding.bind_input, name, buffer)
            for name, buffer in cache.named("present").items():
                self._bind(self._binding.bind_output, name, buffer)

    @property
    def key(self) -> object:
        """Equal for segments whose captured launches are interchangeable."""
        return id(self._session), tuple(self._addresses)

    def _bind(self, bind: Callable[..., None], name: str, buffer: Buffer) -> None:
        if isinstance(buffer, np.ndarray):
            is_contiguous = buffer.flags.c_contiguous
            address = buffer.ctypes.data
        else:
            on_gpu = device_array(buffer)
            is_contiguous = on_gpu.contiguous
            address = on_gpu.address
        if not is_contiguous:
            raise ValueError(f"{name} is bound by address and must be contiguous")
        self._addresses.append((name, address, buffer.shape))
        element = BFLOAT16 if buffer.dtype.name == "bfloat16" else buffer.dtype.type
        bind(name, *self._place, element, buffer.shape, address)

    def run(self) -> None:
        """Run the graph; outputs and caches change in place."""
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            shapes = {name: array.shape for name, array in self.inputs.items()}
            raise BackendError(f"onnxruntime refused inputs of shapes {shapes} ({_said(error)})") from error


def _said(error: Exception) -> str:
    """What ONNX Runtime says, in a line; names of nodes in it are the graph's own, and a terminal may obey them."""
    return printable(" ".join(str(error).split()))
