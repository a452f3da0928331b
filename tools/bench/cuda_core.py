"""Our layer over the CUDA driver against cuda.core, call by call: docs/cuda.md says what was decided from it.

    pip install cuda-core==1.2.2                               # no dependency of this project
    python -m tools.bench.cuda_core --write                    # on a GPU
    python -m tools.bench.cuda_core --emulated --write         # without one: over the emulated driver of the tests

What is timed is the host: how long a call takes until it returns, ours and theirs in turn. Under the emulated driver
both pay for its queue, so the differences are true there and the ratios are smaller than they are.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.runtime.backends.cuda.device import CudaDevice
from framefusion.runtime.backends.cuda.kernels import SOURCE, Geometry, count, width
from tools.bench.setting import ROOT, machine, report

DRIVER = ROOT / "tests/runtime/backends/cuda/emulated/driver.cpp"
BEYOND = Path(__file__).with_name("cuda_core_driver.cpp")
BATCH = 100  # calls between two looks at the clock
ROW_BYTES = 16
IMPORTS = {
    "ours": "import cuda.bindings.driver, cuda.bindings.nvrtc, framefusion.runtime.backends.cuda.device",
    "cuda.core": "import cuda.core",
}
TIMED_IMPORT = """
import time
import numpy
start = time.perf_counter()
{what}
spent = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(1000 * spent, int(peak.split()[1]) / 1024)
"""
# A library that waits while its stream is captured ends the capture; what the program still holds is then collected.
INVALIDATED = {
    "ours": """
from framefusion.errors import BackendError
from framefusion.runtime.backends.cuda.device import CudaDevice
device = CudaDevice()
try: device.capture(device.synchronize)
except BackendError: pass
device.synchronize()
""",
    "cuda.core": """
from cuda.core import Device
device = Device(0)
device.set_current()
stream = device.create_stream()
builder = stream.create_graph_builder().begin_building("thread_local")
for end in (stream.sync, builder.close):
    try: end()  # both refuse, as ours does; measured is how the process ends, see exit_code
    except Exception: pass
del builder
""",
}


def main() -> None:
    arguments = parse()
    if importlib.util.find_spec("cuda.core") is None:
        sys.exit("cuda.core is not installed: pip install cuda-core==1.2.2")
    if arguments.emulated and "EMULATED_DRIVER" not in os.environ:
        sys.exit(run_emulated())
    figures = {
        "driver": str(DRIVER.relative_to(ROOT)) if arguments.emulated else "the GPU's",
        "machine": machine() | ({"gpu": None} if arguments.emulated else {}),
        "versions": {name: importlib.metadata.version(name) for name in ("cuda-core", "cuda-bindings")},
        "installed_mb": {name: installed_mb(name) for name in ("cuda-core", "cuda-bindings")},
        "import": import_costs(arguments.rounds),
        "exit_code_after_an_invalidated_capture": {name: exit_code(code) for name, code in INVALIDATED.items()},
        "call_us": Calls().timed(arguments.rounds),
    }
    report("cuda_core", figures, write=arguments.write, file="cuda_core_emulated" if arguments.emulated else None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="over the emulated driver, which takes g++ and no GPU")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--write", action="store_true", help="keep the figures under results/")
    return parser.parse_args()


def run_emulated() -> int:
    """This command again, in a process that finds the emulated driver; its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        sources = [f'-DKERNELS="{SOURCE}"', f'-DDRIVER="{DRIVER}"', f"-I{DRIVER.parent}", str(BEYOND)]
        library = ["-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
        subprocess.run(["g++", *flags, *sources, *library], check=True)
        paths = filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))
        environment = os.environ | {"EMULATED_DRIVER": "1", "LD_LIBRARY_PATH": ":".join(paths)}
        command = [sys.executable, "-m", "tools.bench.cuda_core", *sys.argv[1:]]
        return subprocess.run(command, env=environment, check=False).returncode


def installed_mb(package: str) -> float:
    """Megabytes of a package's files, without what it depends on."""
    files = importlib.metadata.files(package) or []
    paths = [Path(str(file.locate())) for file in files]
    return round(sum(path.stat().st_size for path in paths if path.is_file()) / 1e6, 1)


def import_costs(rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak MiB of fresh processes in turn, numpy imported before."""
    costs: dict[str, list[list[float]]] = {name: [] for name in IMPORTS}
    for _ in range(max(3, rounds // 4)):
        for name, what in IMPORTS.items():
            command = [sys.executable, "-c", TIMED_IMPORT.format(what=what)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            costs[name].append([float(figure) for figure in printed.split()])
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in costs.items()}
    return {name: {"ms": round(ms, 1), "peak_mib": round(mib, 1)} for name, (ms, mib) in medians.items()}


def exit_code(code: str) -> int:
    """Of a process of its own; negative where a signal ended it, -11 for a crash."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


class Calls:
    """The same work for the driver, by ours and by theirs, on one stream and over the same memory."""

    def __init__(self) -> None:
        self.core = core = importlib.import_module("cuda.core")
        self.device = device = CudaDevice()
        core.Device(0).set_current()
        self.stream = core.Stream.from_handle(device.stream)
        self.other = core.Device(0).create_stream()
        self.pool = core.DeviceMemoryResource(core.Device(0), core.DeviceMemoryResourceOptions())
        self.rows = device.upload(np.zeros((1, 4), np.float32))
        self.index = device.upload(np.zeros(1, np.int32))
        self.out = device.empty((1, 4), np.float32)
        image = device._kernels._image
        code = core.ObjectCode.from_cubin if image.startswith(b"\x7fELF") else core.ObjectCode.from_ptx
        self.kernel = code(image).get_kernel("take_4")
        self.event = device.cuda.event()
        self.their_event = core.Device(0).create_event()
        self.our_launch()  # a kernel is looked up at its first launch, which cannot be captured
        self.our_graph = device.capture(self.our_launch)
        builder = self.stream.create_graph_builder().begin_building("thread_local")
        self.their_launch()
        self.their_graph = builder.end_building().complete()

    def our_launch(self) -> None:
        arguments = self.rows, self.index, self.out, count(1), width(4)
        self.device._kernels.launch("take_4", Geometry((1, 1), (4, 1)), *arguments)

    def their_launch(self) -> None:
        config = self.core.LaunchConfig(grid=(1, 1), block=(4, 1))
        addresses = self.rows.address, self.index.address, self.out.address
        self.core.launch(self.stream, config, self.kernel, *addresses, np.int32(1), np.int64(4))

    def our_copy(self) -> None:
        call = self.device.cuda.call
        device = self.device
        call("cuMemcpyDtoDAsync", self.out.address, self.rows.address, ROW_BYTES, device._stream)

    def their_copy(self) -> None:
        """Of parts of allocations, which a buffer of theirs is whole."""
        part = self.core.Buffer.from_handle
        target = part(self.out.address, ROW_BYTES, owner=self.out)
        target.copy_from(part(self.rows.address, ROW_BYTES, owner=self.rows), stream=self.stream)

    def our_allocation(self) -> None:
        self.device._memory.allocate(ROW_BYTES)

    def their_allocation(self) -> None:
        """Freed behind the copies of another stream, as ours is."""
        memory = self.pool.allocate(ROW_BYTES, stream=self.stream)
        self.stream.wait(self.their_event)
        memory.close(self.stream)

    def our_order(self) -> None:
        self.device.cuda.call("cuEventRecord", self.event, self.device._stream)
        self.device.cuda.call("cuStreamWaitEvent", self.device._copies, self.event, 0)

    def their_order(self) -> None:
        self.stream.record(self.their_event)
        self.other.wait(self.their_event)

    def timed(self, rounds: int) -> dict[str, dict[str, float]]:
        """Median microseconds of a call, ours and theirs in turn."""
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "launch": (self.our_launch, self.their_launch),
            "copy of a part": (self.our_copy, self.their_copy),
            "allocate and free": (self.our_allocation, self.their_allocation),
            "record and wait": (self.our_order, self.their_order),
            "replay a graph": (self.our_graph, lambda: self.their_graph.launch(self.stream)),
        }
        figures = {}
        gc.disable()
        for name, (ours, theirs) in pairs.items():
            spans: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for call, found in zip((ours, theirs), spans, strict=True):
                    self.device.synchronize()
                    self.other.sync()
                    found.append(microseconds(call))
            our_us, their_us = map(statistics.median, spans)
            figures[name] = {"ours": round(our_us, 2), "cuda.core": round(their_us, 2)}
        return figures


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, over a batch."""
    start = time.perf_counter_ns()
    for _ in range(BATCH):
        call()
    return (time.perf_counter_ns() - start) / BATCH / 1000


if __name__ == "__main__":
    main()
