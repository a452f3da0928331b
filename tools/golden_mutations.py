"""What the limits of a quantised bundle's golden find: one matrix of the tiny trained model changed at a time.

    python -m tools.golden_mutations --write

A bundle of each number of layers and format: its scales are changed in the file, and ONNX Runtime's answers compared
with the golden, as `ff-run check` does. Beside it what twice the check's limit finds, which goldens had before.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from framefusion.console.progress import CountLines
from framefusion.export.check.check import default_tolerance
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.prove import Proof, prove
from tools.accuracy import CHECKPOINT, working_folder
from tools.bench.setting import open_bundle, report

Changed = Callable[[NDArray[np.float32]], object]
CHANGES: dict[str, Changed] = {  # of the scales of a matrix, [out, blocks], in place; of a bias, [out]
    "times 1.5": lambda scales: np.multiply(scales, 1.5, out=scales),
    "times 1.1": lambda scales: np.multiply(scales, 1.1, out=scales),
    "every eighth row zero": lambda scales: scales[::8].fill(0),
    "scales of other rows": lambda scales: np.copyto(scales, scales[::-1].copy()),
    "scales of the next block": lambda scales: np.copyto(scales, np.roll(scales, 1, axis=1)),
}
BIAS = "bias of a value projection lost"
SAMPLED = 28
"""Matrices of a bundle that are changed, evenly spread over its layers; all of four layers."""
SHALLOW = BuildOptions(weights="int4", num_decoder_layer=4, depth=2, cost=0.5)
BUNDLES = {
    "int4, 4 layers": SHALLOW,
    "int4, 12 layers": BuildOptions(weights="int4"),
    "int4:128, 12 layers": BuildOptions(weights="int4:128"),
}


def places(folder: Path) -> Iterator[tuple[str, Path, int, tuple[int, ...]]]:
    """Name, file, offset and shape of the scales and biases of every segment."""
    for graph in sorted(folder.glob("segments/*/graph.onnx")):
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            if tensor.name.endswith((".scales", ".bias")):
                offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                yield f"{graph.parent.name} {tensor.name}", graph.parent / "weights.bin", offset, tuple(tensor.dims)


def proof_of_changed(folder: Path, file: Path, offset: int, shape: tuple[int, ...], change: Changed) -> Proof:
    """The proof of a bundle some of whose numbers are others meanwhile."""
    content = np.memmap(file, np.float32, "r+", offset, shape)
    before = content.copy()
    try:
        change(content)
        content.flush()
        bundle = Bundle(folder, verify=False)
        return prove(bundle, OnnxRuntimeBackend(folder, manifest=bundle.manifest, threads=1), require_golden(bundle))
    finally:
        content[:] = before
        content.flush()


def worst_logits(proof: Proof) -> float:
    """The largest error of logits at one place, which goldens had a limit for before."""
    return max(stage.error for stage in proof.stages if stage.kind == "logits")


def main() -> None:
    arguments = parse()
    figures: dict[str, Any] = {}
    with working_folder(arguments.work) as work:
        for name, options in BUNDLES.items():
            folder = open_bundle(CHECKPOINT, work / name.replace(" ", "-").replace(":", "_").replace(",", ""), options)
            figures[name] = found_of(folder, options)
    report("golden_mutations", {"bundles": figures}, write=arguments.write)


def found_of(folder: Path, options: BuildOptions) -> dict[str, dict[str, int]]:
    """Change -> how many were tried, found, and beyond the former limit."""
    unchanged = prove(Bundle(folder), OnnxRuntimeBackend(folder, threads=1), require_golden(Bundle(folder)))
    if not unchanged.right:
        raise SystemExit(f"{folder} is changed already, a run was killed: remove it, and run again")
    former = 2 * default_tolerance(BuildPlan(Checkpoint(CHECKPOINT), options))
    tried: Counter[str] = Counter()
    found: Counter[str] = Counter()
    formerly: Counter[str] = Counter()
    scales = [place for place in places(folder) if place[0].endswith(".scales")]
    biases = [place for place in places(folder) if place[0].endswith(".v.bias")]
    sampled = scales[:: max(1, len(scales) // SAMPLED)]
    matrices = [*sampled, *biases]
    count = CountLines("matrices")
    for number, (name, file, offset, shape) in enumerate(matrices, 1):
        changes: dict[str, Changed] = {BIAS: lambda bias: bias.fill(0)} if name.endswith(".bias") else CHANGES
        for kind, change in changes.items():
            if kind == "scales of the next block" and shape[1] == 1:
                continue  # there is none
            proof = proof_of_changed(folder, file, offset, shape, change)
            tried[kind] += 1
            found[kind] += not proof.right
            formerly[kind] += worst_logits(proof) > former
        count(number, len(matrices))
    return {kind: {"tried": tried[kind], "found": found[kind], "formerly": formerly[kind]} for kind in tried}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="bundles; kept")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/golden_mutations.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
