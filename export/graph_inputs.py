"""Inputs of one graph of a bundle, as a request gives them: for tools that run a graph by itself, such as polygraphy.

The bundle's canned request runs on ONNX Runtime on the CPU, and what the graph is bound to is copied before each run.
So lengths, indices and caches fit each other, which numbers drawn by shape do not. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from framefusion.errors import BundleError, StorageError
from framefusion.installation import install_command
from framefusion.runtime.backends.base import BoundSegment
from framefusion.runtime.backends.buffer import Array, Buffer
from framefusion.runtime.backends.host import host_array
from framefusion.runtime.backends.kv_cache import SegmentCache, cache_names
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.manifest_file import MANIFEST
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.rehearsal import Rehearsal
from framefusion.storage import files

Feed = dict[str, Array]


def graph_inputs(graph: Path | str) -> list[Feed]:
    """What a graph of a bundle gets in the order of its runs: prefills with and without reduction, and decode steps.

    A list of such mappings is what polygraphy calls a data loader. Slots of a cache behind its tokens are zero; what a
    graph leaves in them is nobody's business.

    Args:
        graph: its file within the bundle, such as bundle/segments/layer01/graph.onnx.

    Raises:
        BundleError: it is no graph of a bundle, or the bundle has no golden.
        BackendError: ONNX Runtime on the CPU cannot run the bundle.
    """
    path = Path(graph)
    bundle = Bundle(_folder_of(path))
    name = path.resolve().relative_to(bundle.folder.resolve()).as_posix()
    if name not in bundle.graphs:
        raise BundleError(f"{path} is no graph of its bundle: choose one of {', '.join(bundle.graphs)}")
    golden = require_golden(bundle)
    recorder = _Recorder(bundle, name)
    rehearsal = Rehearsal(bundle, recorder, golden.request)
    if golden.tower is not None:
        rehearsal.tower(golden.tower.picture)
    for run in golden.runs:
        rehearsal.answer(run.cost, run.similarity_lower_bound)
    if not recorder.feeds:
        raise BundleError(f"{path} is not run by the canned request of its bundle: choose another graph")
    return recorder.feeds


def write_inputs(feeds: Sequence[Feed], output: Path) -> int:
    """Write inputs as `polygraphy run --load-inputs` reads them; returns the bytes.

    Raises:
        StorageError: polygraphy is missing, or the file cannot be written.
    """
    try:
        from polygraphy.json import to_json
    except ImportError:
        raise StorageError(f"polygraphy is not installed, whose format this is: {install_command('export')}") from None
    content = to_json(list(feeds)).encode("utf-8")
    try:
        files.write_file(files.output_path(output), content)
    except OSError as error:
        raise StorageError(f"{output} cannot be written ({error.strerror or error}): choose another -o") from None
    return len(content)


def _folder_of(graph: Path) -> Path:
    """The bundle that a file is in."""
    for folder in graph.absolute().parents:
        if (folder / MANIFEST).is_file():
            return folder
    raise BundleError(f"{graph} is in no bundle: give the file of a graph, such as bundle/vision/graph.onnx")


class _Recorder(OnnxRuntimeBackend):
    """ONNX Runtime that copies what one graph gets."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        super().__init__(bundle.folder, manifest=bundle.manifest)
        self.feeds: list[Feed] = []
        self._graph = graph

    def bind(  # type: ignore[override]
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> BoundSegment:
        """See `Backend.bind`."""
        bound = super().bind(graph, inputs, outputs, cache)
        return _Recorded(bound, cache, self.feeds) if graph == self._graph else bound


@dataclass
class _Recorded:
    """A bound graph whose inputs are copied before it runs."""

    bound: BoundSegment
    cache: SegmentCache | None
    feeds: list[Feed]

    @property
    def inputs(self) -> Mapping[str, Buffer]:
        return self.bound.inputs

    @property
    def outputs(self) -> Mapping[str, Buffer]:
        return self.bound.outputs

    def run(self) -> None:
        feed = {name: host_array(buffer).copy() for name, buffer in self.inputs.items()}
        self.feeds.append(feed | dict(self._past()))
        self.bound.run()

    def _past(self) -> Iterator[tuple[str, Array]]:
        """The caches before the run."""
        if self.cache is None:
            return
        lengths = [int(length) for length in self.cache.lengths for _ in ("key", "value")]
        buffers = self.cache.named("past")
        for name, length in zip(cache_names("past", len(self.cache.keys)), lengths, strict=True):
            filled = host_array(buffers[name]).copy()
            filled[:, :, length:] = 0
            yield name, filled
