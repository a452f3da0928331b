"""A process of its own that proves a backend or a device and prints what it found: a library may crash or hang in it.

    python -m framefusion.runtime.proof.blocks.child gpu
    python -m framefusion.runtime.proof.blocks.child device cuda
    python -m framefusion.runtime.proof.blocks.child backend onnxruntime cpu
    python -m framefusion.runtime.proof.blocks.child backend inductor cpu engines

Its last line begins with MARK and is one JSON object. A library that does not load is such an object, too.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framefusion.installation import install_command
from framefusion.runtime.backends import table

if TYPE_CHECKING:
    from framefusion.runtime.machine.machine import Machine
    from framefusion.runtime.proof.blocks.checks import Check
    from framefusion.runtime.proof.remembered import Combination

MARK = "FRAMEFUSION-DOCTOR "
Facts = dict[str, Any]
UNPROVEN = (
    "it runs compiled engines: ff-run check BUNDLE proves those of a bundle, ff-run doctor --engines compiles one"
)


def gpu() -> Facts:
    """The first GPU; {} without one."""
    from framefusion.runtime.machine.gpu import find_gpu

    found = find_gpu()
    return {} if found is None else asdict(found)


def prove_device(device: str) -> Facts:
    """What is done to rows between segments, on the CPU by numpy, on a GPU by kernels of this package."""
    from framefusion.runtime.backends.buffer import float_type
    from framefusion.runtime.machine.machine import Machine
    from framefusion.runtime.proof.blocks.checks import check_device_blocks, host_blocks

    if device == "cpu":
        return _judged([_graph("", "float32", host_blocks())])
    from framefusion.runtime.backends.fit import NO_GPU, no_bindings

    machine = Machine.here()
    if machine.gpu is None:
        return _absent(*NO_GPU)
    if not machine.bindings:
        return _missing(*no_bindings())
    from framefusion.runtime.backends.cuda.device import CudaDevice

    dtypes = ("float16", "bfloat16")
    return _judged(
        [_graph("", dtype, check_device_blocks(CudaDevice(float_type(dtype).type), dtype)) for dtype in dtypes]
    )


def prove_backend(name: str, device: table.Device, engines: str = "") -> Facts:
    """All graphs that a backend can run here; where it runs engines, whether its library loads.

    Args:
        name: of the backend.
        device: where it runs.
        engines: any word has an engine compiled and proven, too.
    """
    from framefusion.runtime.backends.fit import NO_GPU
    from framefusion.runtime.machine.machine import Machine

    row = table.backend(name, device)
    machine = Machine.here()
    if device == "cuda" and machine.gpu is None:
        return _absent(*NO_GPU)
    if row.blocks:
        return _proven_graphs(row, device, machine)
    facts = _engine_library(row, device, machine)
    if not engines or facts["state"] != "unproven":
        return facts
    return facts | _proven_engines(row, device)


def _proven_graphs(row: table.BackendKind, device: table.Device, machine: Machine) -> Facts:
    from framefusion.runtime.backends.choice import Option
    from framefusion.runtime.proof.blocks import cases, codes
    from framefusion.runtime.proof.blocks.checks import check_code_blocks, check_graph_blocks
    from framefusion.runtime.proof.remembered import combination_of_blocks

    problem = table.load(row.machine_problem)(row, machine)
    if problem is not None:
        return _missing(*problem)
    graphs = []
    folder = Path(cases.__file__).parent
    option = Option(row.name, device)
    for dialect, dtype, backend, importance, caches in table.load(row.blocks)(device, machine, folder):
        # 1. Looked up as `open_proven` does, before anything more is loaded.
        subject = (dialect, dtype, option, machine)
        blocks = combination_of_blocks(*subject)
        products = {weights: combination_of_blocks(*subject, weights=weights) for weights in codes.WEIGHTS}
        # 2. Proven, and remembered: what is wrong here is not taken for a bundle of this dialect and type.
        checks = check_graph_blocks(backend, cases.graph_name(dialect, dtype), dtype, importance, caches)
        graphs.append(_remembered(_graph(dialect, dtype, checks), blocks))
        # 3. Products of weights in codes: what is wrong there is wrong for bundles of such weights alone, and a library
        #    without them runs the others.
        for weights, combination in products.items():
            facts = _graph(dialect, dtype, check_code_blocks(backend, dialect, dtype, weights)) | {"weights": weights}
            if facts["state"] == "failed":
                facts["state"] = "unproven"
            graphs.append(_remembered(facts, combination))
    return _judged(graphs)


def _remembered(facts: Facts, combination: Combination) -> Facts:
    """What was found, kept where it is a verdict."""
    from framefusion.runtime.proof.remembered import Verdict, remember

    if facts["state"] not in ("right", "wrong"):
        return facts
    verdict = Verdict(facts["state"] == "right", f"ff-run doctor: {facts['worst']}")
    return facts | {"remembered": remember(combination, verdict, facts)}


def _engine_library(row: table.BackendKind, device: table.Device, machine: Machine) -> Facts:
    from framefusion.runtime.backends.fit import installed_version, no_bindings

    if installed_version(row.library) is None:
        return _missing(f"{row.library} is not installed", install_command(row.extra or row.library))
    if device == "cuda" and row.cuda_buffers and not machine.bindings:
        return _missing(*no_bindings())
    library = importlib.import_module(row.library)
    return {"state": "unproven", "problem": UNPROVEN, "version": str(library.__version__), "graphs": []}


def _proven_engines(row: table.BackendKind, device: table.Device) -> Facts:
    """An engine of each kind of network, compiled here; why none could be, where that is so."""
    from framefusion.errors import FrameFusionError
    from framefusion.runtime.proof.blocks import cases
    from framefusion.runtime.proof.blocks.checks import check_graph_blocks

    if row.engines is None or not row.engines.blocks:
        return _not_compiled(f"{row.name} compiles none of building blocks")
    graphs = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            # 1. What compiles is another part of this package, which needs more than what runs.
            for graph in table.load(row.engines.blocks)(row.name, device, Path(folder)):
                # 2. Proven as the graphs of ONNX Runtime are; a bundle's engines are proven by its golden all the same.
                name = cases.graph_name("portable", graph.dtype)
                checks = check_graph_blocks(graph.backend, name, graph.dtype, graph.importance)
                graphs.append(_graph(graph.dialect, graph.dtype, checks))
        except ImportError as error:
            return _not_compiled(f"{error.name or error} is not installed: {install_command('export')}")
        except FrameFusionError as error:
            return _not_compiled(" ".join(str(error).split())[:400])
    return _judged(graphs)


def _not_compiled(reason: str) -> Facts:
    return {"state": "unproven", "problem": f"no engine could be compiled here to prove it: {reason}"}


def _graph(dialect: str, dtype: str, checks: Iterable[Check]) -> Facts:
    """The checks of a graph; a library that refuses it or a type that is missing is a failure of this graph alone."""
    from framefusion.errors import FrameFusionError

    facts: Facts = {"dialect": dialect, "dtype": dtype, "weights": "floats", "checks": []}
    try:
        found = list(checks)
    except (FrameFusionError, ImportError) as error:
        return facts | {"state": "failed", "worst": " ".join(str(error).split())[:400]}
    worst = max(found, key=lambda check: check.error / check.limit if check.limit else check.error * 1e9)
    wrong = [check for check in found if not check.right]
    worst = wrong[0] if wrong and worst.right else worst  # NaN is not the largest of anything
    place = f"{worst.block}, {worst.case}" if worst.case else worst.block
    state = "wrong" if wrong else "right"
    text = f"{place}: error {worst.error:.1e}, limit {worst.limit:.1e}"
    return facts | {"state": state, "worst": text, "checks": [check.facts for check in found]}


def _judged(graphs: list[Facts]) -> Facts:
    states = [graph["state"] for graph in graphs]
    state = next((bad for bad in ("wrong", "failed") if bad in states), "right")
    problem = next((graph["worst"] for graph in graphs if graph["state"] == state), "")
    remedy = "" if state == "right" else "take another version of its library, or another --backend"
    return {"state": state, "problem": "" if state == "right" else problem, "remedy": remedy, "graphs": graphs}


def _missing(problem: str, remedy: str) -> Facts:
    return {"state": "missing", "problem": problem, "remedy": remedy, "graphs": []}


def _absent(problem: str, remedy: str) -> Facts:
    return {"state": "absent", "problem": problem, "remedy": remedy, "graphs": []}


def main(arguments: list[str]) -> None:
    """Run what the arguments name and print what it gives."""
    jobs: dict[str, Callable[..., Facts]] = {"gpu": gpu, "device": prove_device, "backend": prove_backend}
    try:
        facts = jobs[arguments[0]](*arguments[1:])
    except Exception as error:  # of a library: whatever it raises is what it has to say
        text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        facts = {"state": "failed", "problem": text, "remedy": "install that library anew", "graphs": []}
    sys.stdout.write(f"\n{MARK}{json.dumps(facts, allow_nan=False)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
