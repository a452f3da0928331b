"""The bundle: a folder that says everything about itself, its format, and the checks before it is used.

    manifest.json     what manifest.py describes, with a digest of itself
    signatures.json   signatures of that digest, where somebody signed it
    segments/NAME/    graph.onnx (and decode.onnx in the fixed mode) over one weights.bin
    vision/           graph.onnx over weights.bin
    embedding.bin     the rows of the embedding table, memory-mapped
    engines/KIND/     what was compiled of the graphs, and report.json
    tokenizer.json
    README.md         the model card, and beside it the licence files of the checkpoint

Knows the format only: it neither builds nor runs one. What a stranger may have put into one is in docs/security.md.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from framefusion.errors import BundleError
from framefusion.runtime.format.bundle_files import sha256_of, verify_files
from framefusion.runtime.format.engine_record import EngineKind, EngineRecord
from framefusion.runtime.format.manifest import FileRecord
from framefusion.runtime.format.manifest_file import read_manifest_file
from framefusion.runtime.trust.graph_check import check_graph
from framefusion.runtime.trust.origin import Trust


class Bundle:
    """A bundle on disk whose manifest has been read.

    Args:
        folder: the bundle.
        verify: compare sizes and hashes of all files first. Hashes that were right once are not computed again while
            the very files stand.
        trust: keys that must have signed it, and whether its engines may run; None demands no signature, and runs
            engines only that this user compiled here.

    Attributes:
        digest: of the manifest.
        sealed: the manifest held its digest, so that an edit would have been noticed.
        signed_by: the trusted key that signed it.
        verified: all files were compared.

    Raises:
        BundleError: something is missing, truncated, altered, or newer than this package reads.
        TrustError: no trusted key signed it.
    """

    def __init__(self, folder: Path | str, *, verify: bool = True, trust: Trust | None = None) -> None:
        self.folder = Path(folder)
        self.trust = trust or Trust()
        # 1. The manifest, as a stranger's: its digest, its types and ranges, and what its fields have to do with each
        #    other. Nothing else of the bundle is looked at before that holds.
        self.manifest, self.digest, self.sealed = read_manifest_file(self.folder)
        # 2. Who signed that digest: where keys are named, a bundle of anybody else goes no further.
        self.signed_by = self.trust.require_signature(self.folder, self.digest)
        # 3. The files against their sizes and hashes in the manifest; a signature vouches for them by these alone.
        #    Graphs are checked before a backend reads them (`check_graphs`), engines before one is loaded
        #    (trust/engines.py).
        self.verified = verify or self.signed_by is not None
        if self.verified:
            verify_files(self.folder, self.manifest.files)

    def __repr__(self) -> str:
        manifest = self.manifest
        trusted = "signed, " if self.signed_by is not None else ""
        return (
            f"<Bundle {self.folder}: {manifest.model.family}, {manifest.model.num_layers} layers in "
            f"{len(manifest.segments)} segments, reduction {manifest.reduction.mode}, "
            f"cost {manifest.reduction.cost:g}, {trusted}{'verified' if self.verified else 'not verified'}>"
        )

    def with_manifest(self, **changes: Any) -> Bundle:
        """The same files under a manifest with some entries replaced: the same weights in another way of running.

        Args:
            changes: fields of `Manifest` by name. Engines among them are the caller's, who vouches for them.
        """
        other = copy.copy(self)
        if "engines" in changes:
            other.trust = replace(self.trust, engines=True)
        other.manifest = replace(self.manifest, **changes)
        return other

    def engine(self, graph: str, kind: EngineKind) -> EngineRecord | None:
        """The engine of a graph, None where the bundle holds none of that kind."""
        matching = (engine for engine in self.manifest.engines if (engine.graph, engine.kind) == (graph, kind))
        return next(matching, None)

    def require_graphs(self) -> None:
        """Refuse what needs the ONNX graphs where only their engines were kept.

        Raises:
            BundleError: a graph is not among the files.
        """
        missing = [graph for graph in self.graphs if graph not in self.manifest.files]
        if missing:
            raise BundleError(
                f"{self.folder} holds engines only, {missing[0]} was left out (--engines-only): run it on a GPU that "
                "they were built for, or build the bundle again to run it on the CPU, to check it or to compile it"
            )

    def check_graphs(self) -> None:
        """Read all graphs before another library does: see graph_check.py.

        Raises:
            BundleError: one is not listed, or no build of this package writes such a graph.
        """
        self.require_graphs()
        for graph in self.graphs:
            check_graph(self.folder, graph, self.manifest)

    @property
    def graphs(self) -> list[str]:
        """Names of all graphs, the heaviest first: while one is loaded its largest tensor is in memory twice."""
        sizes = self.manifest.graphs
        return sorted(sizes, key=lambda graph: (sizes[graph], graph), reverse=True)


def file_record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it is now; all of it is read."""
    return FileRecord(path.stat().st_size, sha256_of(path))
