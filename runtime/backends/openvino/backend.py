"""OpenVINO: every buffer is ours and shared with it, and caches are written where they lie.

A graph is read as it is, and given attention that writes into its caches (operators.py). Where that cannot be done the
caches that a run gives are copied back. Weights are mapped while a graph is compiled; what matrix products read later
are OpenVINO's own copies, in the order and the type that the processor takes.

Caches are in the type of the products, or in 8 bits where the backend's name says so: codes of OpenVINO's own, with a
scale and a zero point for each token of a head, in front of them in its slot.

Products are computed in fp32, or in bf16 where the bundle is in bf16 or the backend's name says so: never in a type
that OpenVINO prefers by itself, which on processors with bf16 is that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from framefusion.console.plain_text import printable
from framefusion.errors import BackendError, BundleError
from framefusion.installation import install_command
from framefusion.runtime.backends.base import Backend, empty_cache
from framefusion.runtime.backends.buffer import Array, Buffer, float_type
from framefusion.runtime.backends.fit import one_row
from framefusion.runtime.backends.host import HostBackend, host_array
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.backends.openvino.operators import BLOCK, read_model, writes_in_place
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest import Manifest, SegmentRecord
from framefusion.runtime.machine.cpu import default_threads
from framefusion.runtime.trust.graph_check import check_graph

IN_BF16 = "openvino-bf16"
WITH_CODES = "openvino-int8-kv"
PARAMETERS = 8
"""Bytes of a slot in 8 bits beside its codes: scale and zero point in fp32."""
CHUNK = 2048
"""Tokens of the last segment's prefill at a time. OpenVINO computes all outputs of a graph, so every part but the last
computes logits that nobody reads: a part is long enough for them not to count."""
_OTHER = "take another --backend"
_cores: list[Any] = []
_cores_lock = Lock()
_KEYS_AND_VALUES: Mapping[str, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8"}


class CompiledGraph(NamedTuple):
    """A graph as OpenVINO runs it, and whether it writes into its caches."""

    model: Any
    in_place: bool


class OpenVinoBackend(HostBackend):
    """The graphs of a bundle, compiled by OpenVINO for the CPU when first bound.

    Args:
        folder: the bundle.
        dtype: of its graphs.
        threads: of one operator; 0 takes the physical cores that this process has.
        in_bf16: compute in bf16 what is in another type.
        coded_caches: caches are in 8 bits, a code for each number and scales for each token of a head.
        in_place: write into caches where OpenVINO can; without it they are copied, as where it cannot.
        manifest: of the bundle; graphs are compared with it. None compares them with the files beside them alone.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        threads: int = 0,
        *,
        in_bf16: bool = False,
        coded_caches: bool = False,
        in_place: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        super().__init__(chunk=CHUNK)
        self.name = WITH_CODES if coded_caches else IN_BF16 if in_bf16 else "openvino"
        self._folder = folder
        self._computes = "bf16" if in_bf16 or dtype == "bfloat16" else "f32"
        stored = "bfloat16" if in_bf16 else dtype
        self._stored = "uint8" if coded_caches else stored  # type of the caches that are written in place
        self._beside = PARAMETERS if coded_caches else 0
        self._threads = threads or default_threads()
        self.host_threads = self._threads
        self._in_place = in_place
        self._manifest = manifest
        self._graphs: dict[str, CompiledGraph] = {}

    def open(self, graphs: Sequence[str]) -> None:
        """See `Backend.open`."""
        for graph in graphs:
            self.graph(graph)

    def cache(self, record: SegmentRecord, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> SegmentCache:
        """Caches of zeros with whole blocks of slots, in the type in which attention is computed, or of codes."""
        if not self.graph(record.prefill).in_place:
            return empty_cache(self.device, shapes, dtype)
        whole = [(*shape[:2], -(-shape[2] // BLOCK) * BLOCK, shape[3] + self._beside) for shape in shapes]
        return empty_cache(self.device, whole, float_type(self._stored))

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> OpenVinoSegment:
        """See `Backend.bind`."""
        return OpenVinoSegment(self.graph(graph), inputs, outputs, cache)

    def batch_refusal(self, graph: str) -> str | None:
        """See `Backend.batch_refusal`: the graph itself says whether it is free in its rows."""
        model, in_place = self.graph(graph)
        if not in_place:
            return f"the backend {self.name} copies caches here, and decodes one row at a time"
        (rows,) = (each.get_partial_shape()[0] for each in model.inputs if "hidden" in each.names)
        return None if rows.is_dynamic else one_row(graph, self._manifest)

    def graph(self, graph: str) -> CompiledGraph:
        """A graph, named by its path in the bundle."""
        if graph not in self._graphs:
            check_graph(self._folder, graph, self._manifest)
            self._graphs[graph] = self._compile(self._folder / graph)
        return self._graphs[graph]

    def _compile(self, path: Path) -> CompiledGraph:
        try:
            import openvino
        except ImportError:
            raise BackendError(f"openvino is not installed: {install_command('openvino')}") from None
        try:
            graph = self._compiled_in_place(path) or self._compiled(path, in_place=False)
        except BackendError:
            raise
        except Exception as error:  # OpenVINO's exceptions share no base class
            raise BundleError(
                f"{path} cannot be loaded by openvino {openvino.__version__} ({_message(error)}): rebuild"
            ) from error
        computes = graph.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if computes != self._computes:
            raise BackendError(f"openvino computes in {computes} here and not in {self._computes}: {_OTHER}")
        return graph

    def _compiled_in_place(self, path: Path) -> CompiledGraph | None:
        """None where caches are to be copied: another release's operator, or a processor that has no kernel for it."""
        with suppress(RuntimeError):
            return self._compiled(path, in_place=True) if self._in_place else None
        if self._beside:
            raise BackendError(f"openvino copies caches here, and {self.name} writes into them: {_OTHER}")
        return None

    def _compiled(self, path: Path, *, in_place: bool) -> CompiledGraph:
        model = read_model(str(path), in_place=in_place, beside=self._beside)
        return CompiledGraph(process_core().compile_model(model, "CPU", self._settings), writes_in_place(model))

    @property
    def _rounded_together(self) -> int:
        """Activations that are rounded to 8 bits with one scale, as the graphs say: a block of a product's weights."""
        quantization = None if self._manifest is None else self._manifest.quantization
        return 0 if quantization is None else min((record.block for record in quantization.formats), default=0)

    @property
    def _settings(self) -> dict[str, Any]:
        """What would otherwise be chosen by OpenVINO: types, one request at a time, and threads that no core keeps."""
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._computes,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self._rounded_together,
            "KV_CACHE_PRECISION": _KEYS_AND_VALUES[self._stored],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        settings |= {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"} if self._beside else {}  # else keys are no rows of tokens
        return settings | ({"INFERENCE_NUM_THREADS": self._threads} if self._threads else {})


def process_core() -> Any:
    """The core that compiles all graphs of this process, and lives as long.

    A core gives the thread that first compiles with it a stack for signals, and unmaps that stack when it goes. The
    thread keeps the address where the core goes on another thread, or after a core that began later: the next Ctrl-C
    or SIGTERM then ends Python in a segmentation fault (`SigAltStackSetup` of OpenVINO's plugin for CPUs).
    """
    import openvino

    with _cores_lock:
        if not _cores:
            _cores.append(openvino.Core())
        return _cores[0]


def open_backend(bundle: Bundle, name: str, device: str, threads: int) -> Backend:
    """The graphs of a bundle on the CPU.

    Args:
        bundle: read and verified.
        name: of the row of the table: it says in which type products are computed, and caches are.
        device: "cpu".
        threads: of one operator; 0 takes the physical cores that this process has.
    """
    manifest = bundle.manifest
    kind = {"in_bf16": name == IN_BF16, "coded_caches": name == WITH_CODES}
    return OpenVinoBackend(bundle.folder, manifest.model.dtype, threads, **kind, manifest=manifest)


class OpenVinoSegment:
    """One request to a compiled graph, over buffers that this object keeps alive."""

    def __init__(
        self,
        graph: CompiledGraph,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        cache: SegmentCache | None,
    ) -> None:
        self._request = graph.model.create_infer_request()
        self._cache = cache
        self._copies = cache is not None and not graph.in_place
        names = {name for value in graph.model.inputs for name in value.names}
        self.inputs = {name: array for name, array in inputs.items() if name in names}  # a graph drops unused inputs
        self.outputs = outputs
        for name, buffer in (*self.inputs.items(), *outputs.items()):
            self._request.set_tensor(name, _tensor(name, host_array(buffer)))
        if cache is not None:
            for name, buffer in cache.named("past").items():
                slots = host_array(buffer)
                blocks = slots.reshape(-1, 1, BLOCK, slots.shape[-1]) if graph.in_place else slots
                self._request.set_tensor(name, _tensor(name, blocks))

    def run(self) -> None:
        """Run the graph; outputs and caches change in place."""
        try:
            self._request.infer(share_outputs=True)
        except Exception as error:  # OpenVINO's exceptions share no base class
            shapes = {name: array.shape for name, array in self.inputs.items()}
            raise BackendError(f"openvino refused inputs of shapes {shapes} ({_message(error)})") from error
        if self._copies and self._cache is not None:
            for name, buffer in self._cache.named("present").items():
                present = self._request.get_tensor(name).data  # as many slots as are valid
                host_array(buffer)[:, :, : present.shape[2]] = present


def _tensor(name: str, array: Array) -> Any:
    """A buffer as OpenVINO reads and writes it: the same memory."""
    import openvino

    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is bound by address and must be contiguous")
    if array.dtype.name == "bfloat16":
        return openvino.Tensor(array.view(np.uint16), list(array.shape), openvino.Type.bf16)
    return openvino.Tensor(array, shared_memory=True)


def _message(error: Exception) -> str:
    """What OpenVINO says, in a line; names of nodes in it are the graph's own, and a terminal may obey them."""
    return printable(" ".join(str(error).split()))[:600]
