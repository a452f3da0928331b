"""What the reduction's own kernels take on a GPU, against the time that moving their bytes takes at least.

    python -m tools.bench.kernels --write

The limit of a kernel is the bytes that it has to read and write over the bandwidth of a copy from the GPU to itself,
measured in the same run, in turn with it; `of_limit` is limit over time, 1 is as fast as memory allows. Copies that are
enqueued before keep the GPU busy until all launches are there, so no figure holds the host's time; `whole_reduction_s`
does: from rows to compacted rows, with the scores on the host and the plan made there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from framefusion.errors import BackendError
from framefusion.reduction import tracks
from framefusion.reduction.plan import Plan, merge_plan
from framefusion.runtime.backends.cuda.array import DeviceArray
from framefusion.runtime.backends.cuda.device import CudaDevice, track_entries
from tools.bench.setting import report, summary

SHARES = (0.3, 0.5, 0.7)  # of the tokens that merge
BUSY = 60  # copies in front of what is timed
LAUNCHES = 20
HALF = 64  # columns of a rotary table


class Rows:
    """Rows of a film on the GPU, and a second buffer to copy them to."""

    def __init__(self, device: CudaDevice, frames: int, places: int, width: int, dtype: Any) -> None:
        random = np.random.default_rng(0)
        self.device = device
        self.labels = np.tile(np.arange(places), frames)
        self.there = device.upload(random.standard_normal((frames * places, width), np.float32).astype(dtype))
        self.copied = device.empty(self.there.shape, dtype)

    def copy(self) -> None:
        self.device.copy(self.copied, self.there)

    def plan(self, share: float) -> Plan:
        """Merge a share of the tokens, drawn among those that have one before them."""
        may_merge = tracks.previous_in_track(self.labels) >= 0
        drawn = np.random.default_rng(1).random(self.labels.size) < share / may_merge.mean()
        return merge_plan(self.labels, drawn & may_merge)

    def seconds(self, enqueue: Callable[[], object]) -> float:
        """Of one call on the GPU: `LAUNCHES` of them behind copies that outlast the enqueuing."""
        cuda = self.device.cuda
        stream = self.device.stream
        (start, end) = self._events()
        for _ in range(BUSY):
            self.copy()
        cuda.call("cuEventRecord", start, stream)
        for _ in range(LAUNCHES):
            enqueue()
        cuda.call("cuEventRecord", end, stream)
        cuda.call("cuEventSynchronize", end)
        return float(cuda.call("cuEventElapsedTime", start, end)) / 1000 / LAUNCHES

    def _events(self) -> tuple[Any, Any]:
        return self.device.cuda.event(timed=True), self.device.cuda.event(timed=True)


def whole_reduction(rows: Rows) -> float:
    """Seconds of the host's clock from rows to compacted rows."""
    rows.device.synchronize()
    start = time.perf_counter()
    similarity = tracks.snap_identical(rows.device.similarity(rows.there, rows.labels))
    rows.device.reduced(rows.there, merge_plan(rows.labels, similarity > np.quantile(similarity, 0.5)))
    rows.device.synchronize()
    return time.perf_counter() - start


def moved(rows: DeviceArray, plan: Plan) -> int:
    """Bytes that a plan reads and writes: each row that is kept or merged once, and the result."""
    row = rows.nbytes // len(rows)
    return (plan.members.size + plan.kept.size - plan.heads.size + plan.kept.size) * row


def measured(rows: Rows, work: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> dict[str, Any]:
    """Copy and kernels in turn; each kernel is given by the bytes that it moves and what enqueues it."""
    for _, enqueue in work.values():  # what is compiled, allocated and uploaded once
        enqueue()
    taken: dict[str, list[float]] = {name: [] for name in ("copy", *work)}
    for _ in range(rounds):
        taken["copy"].append(rows.seconds(rows.copy))
        for name, (_, enqueue) in work.items():
            taken[name].append(rows.seconds(enqueue))
    bandwidth = 2 * rows.there.nbytes / statistics.median(taken["copy"])
    kernels = {}
    for name, (size, _) in work.items():
        figures = summary(taken[name])
        kernels[name] = figures | {"bytes": size, "of_limit": size / bandwidth / figures["median_s"]}
    return {"copy_bytes_per_s": bandwidth, "kernels": kernels}


def main() -> None:
    arguments = parse()
    try:
        device = CudaDevice()
        dtype = device.dtype(arguments.dtype)
    except BackendError as error:
        sys.exit(f"nothing was measured: {error}")
    rows = Rows(device, arguments.frames, arguments.places, arguments.width, dtype)
    _, entries = track_entries(rows.labels)
    work: dict[str, tuple[int, Callable[[], object]]] = {}
    for share in SHARES:
        plan = rows.plan(share)
        work[f"reduce, {share:.0%} merge"] = moved(rows.there, plan), partial(device.reduced, rows.there, plan)
    rotary = device.zeros((len(rows.there), HALF), dtype), device.zeros((len(rows.there), HALF), dtype)
    plan = rows.plan(0.5)
    tables = moved(rows.there, plan) + 4 * plan.kept.size * HALF * rotary[0].dtype.itemsize
    work["reduce with tables, 50% merge"] = tables, lambda: device.reduce_tokens(rows.there, rotary, None, plan)
    work["similarity"] = rows.there.nbytes, lambda: device.track_cosines(rows.there, entries)
    figures: dict[str, Any] = {"device": device.gpu.name, "tokens": len(rows.there), "width": arguments.width}
    figures |= {"dtype": arguments.dtype} | measured(rows, work, arguments.rounds)
    figures["whole_reduction_s"] = statistics.median(whole_reduction(rows) for _ in range(arguments.rounds))
    report("kernels", figures, write=arguments.write)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--places", type=int, default=210, help="tokens of a frame")
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="keep the figures under tools/bench/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
