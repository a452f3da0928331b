"""Weights in floats, int8 and int4 beside each other: prefill, decode, and bytes of the files, in turn.

    python -m tools.bench.quantised --write
    python -m tools.bench.quantised --weights int8+head,int8+head@int8,openvino-bf16:floats --nearest
    python -m tools.bench.quantised --shape qwen2-7b --weights int4,int4:128 --rounds 1 --new-tokens 8 --alone

Weights are random, so nothing is said of accuracy (tools/accuracy.py is about that). Weights behind the name of a
backend run there, the others on `--backend`, as do the floats that all are compared with; KV caches are in the type
behind an @, else in floats. The last command builds a 7B without its floats in ONNX Runtime and runs it alone, once for
each format; it reports the memory at the peak of build and of run, each in a process of its own: all that is resident
(VmHWM), which counts pages of mapped files that the system takes back when it wants them, and the process's own memory
(RssAnon, sampled). `--limit` is a limit of that for the build, kept by the system (RLIMIT_DATA). Linux only.

The figures of a processor without dot products of bytes (VNNI on x86) are written under a name of their own.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framefusion.export.plan import weight_plan
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.rounding import round_to_nearest
from framefusion.runtime.commands.flags import BACKENDS
from framefusion.runtime.machine import cpu
from framefusion.runtime.memory import memory_plan
from framefusion.runtime.pipeline import Pipeline
from tools.bench.prefill import median
from tools.bench.runs import Run, Setting, add_flags, checkpoint_of, in_turn, parse
from tools.bench.setting import report, summary

FLOATS = "floats"
INTERVAL = 0.02  # seconds between samples
ROWS = 1024  # whose codes are chosen at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0, 0.3])
    parser.add_argument("--weights", type=lambda text: text.split(","), default=["int8", "int4"])
    parser.add_argument("--alone", action="store_true", help="leave the floats out, and report memory")
    parser.add_argument("--nearest", action="store_true", help="round codes to the nearest: no search, the same speed")
    parser.add_argument("--limit", type=float, metavar="GB", help="of the memory of a build alone that no file backs")
    arguments = parse(parser)
    arguments.dtype = arguments.dtype or "float32"
    arguments.golden = False
    if arguments.nearest:
        round_to_nearest_only()
    if arguments.alone:
        figures = alone(arguments)
        file = f"quantised_alone_{arguments.shape}"
    else:
        figures = side_by_side(arguments)
        parts = ["quantised", arguments.shape, arguments.backend]
        file = "_".join(part for part in parts if part not in ("qwen2-0.5b", "onnxruntime"))
    products = "" if cpu.has_dot_products() else "_no-dot-products"
    report("quantised", figures, write=arguments.write, file=file + products)


def side_by_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """All weights in turn, at each cost."""
    settings = {weights: setting_of(arguments, weights) for weights in (FLOATS, *arguments.weights)}
    runs = in_turn(settings, arguments.rounds)
    figures: dict[str, Any] = settings[FLOATS].facts
    for weights, setting in settings.items():
        figures[weights] = {"llm_bytes": llm_bytes(setting.pipeline)}
        for name in setting.requests:
            figures[weights][name] = ratios(runs[weights, name], runs[FLOATS, name], runs[weights, setting.dense])
    halved = figures[FLOATS]["llm_bytes"] / (2 if arguments.dtype == "float32" else 1)
    for weights in settings:
        figures[weights]["bytes_of_fp16"] = figures[weights]["llm_bytes"] / halved
    return figures


def ratios(runs: Sequence[Run], floats: Sequence[Run], dense: Sequence[Run]) -> dict[str, Any]:
    """Seconds, and how many times as fast as floats at this cost and as the same weights dense."""
    return {
        "prefill": summary([run.prefill for run in runs]),
        "decode_per_token": summary([run.decode for run in runs]),
        "prefill_over_floats": median(list(floats), "prefill") / median(list(runs), "prefill"),
        "decode_over_floats": median(list(floats), "decode") / median(list(runs), "decode"),
        "prefill_over_dense": median(list(dense), "prefill") / median(list(runs), "prefill"),
        "kept": runs[0].lengths[-1],
    }


def setting_of(arguments: argparse.Namespace, weights: str) -> Setting:
    """A bundle with these weights."""
    return Setting(_with(arguments, weights))


def _with(arguments: argparse.Namespace, weights: str) -> argparse.Namespace:
    changed = copy.copy(arguments)
    backend, _, behind = weights.partition(":")
    if backend in BACKENDS:
        changed.backend = backend
        weights = behind
    weights, _, caches = weights.partition("@")
    changed.kv_cache_dtype = caches or None
    changed.weights = None if weights == FLOATS else weights
    return changed


def llm_bytes(pipeline: Pipeline) -> int:
    """Files of weights of the LLM's segments; embedding table and tower are the same in all."""
    return sum(segment.weight_bytes for segment in pipeline.manifest.segments)


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """A bundle of each format, built and run each in a process of its own; memory in bytes."""
    checkpoint_of(arguments)
    figures: dict[str, Any] = {"shape": arguments.shape, "limit_gb": arguments.limit, "formats": {}}
    for weights in arguments.weights:
        found: dict[str, Any] = {}
        for step in (_build, _run):
            with get_context("spawn").Pool(1) as pool:
                found |= pool.apply(step, (arguments, weights))
        figures["formats"][weights] = found
    return figures


def round_to_nearest_only() -> None:
    """Choose codes in this process without a search, which takes a core a quarter of an hour for a 7B."""
    for name, stand_in in (("search", nearest), ("METHOD", "rounding to the nearest")):
        getattr(weight_plan, name)  # else a search would go on under another name, unseen
        setattr(weight_plan, name, stand_in)


def nearest(weight: Tensor, form: BlockFormat, dtype: torch.dtype) -> BlockQuantized:
    """`round_to_nearest`, some rows at a time as a search has them.  [out, in]"""
    starts = range(0, len(weight), ROWS)
    parts = [round_to_nearest(weight[start : start + ROWS], form, dtype) for start in starts]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts])
    return BlockQuantized(codes, scales, torch.cat(zeros) if zeros else None, form.bits, form.block)


def _build(arguments: argparse.Namespace, weights: str) -> dict[str, Any]:
    if arguments.nearest:
        round_to_nearest_only()
    if arguments.limit is not None:
        limit = round(arguments.limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with sampled() as most:
        Setting.built(_with(arguments, weights))
    return {"build_peak_bytes": memory("VmHWM"), "build_own_bytes": most[0]}


def _run(arguments: argparse.Namespace, weights: str) -> dict[str, Any]:
    imports = {"imports_bytes": memory("VmRSS"), "imports_own_bytes": memory("RssAnon")}  # torch and the exporter
    with sampled() as most:
        setting = setting_of(arguments, weights)
        figures: dict[str, Any] = setting.facts | {"llm_bytes": llm_bytes(setting.pipeline)} | imports
        figures |= {"opened_bytes": memory("VmRSS"), "opened_own_bytes": memory("RssAnon")}
        for name, request in setting.requests.items():
            runs = [setting.run(request) for _ in range(arguments.rounds)]
            seconds = statistics.median(run.decode for run in runs)
            figures[name] = {"prefill": summary([run.prefill for run in runs]), "tokens_per_second": 1 / seconds}
            tokens = len(setting.film.hidden)
            lengths = entered(setting, runs)
            plan = memory_plan(setting.pipeline.manifest, tokens, 0, arguments.new_tokens, lengths=lengths)
            figures[name]["planned_bytes"] = plan.total
    return figures | {"run_peak_bytes": memory("VmHWM"), "run_own_bytes": most[0]}


def entered(setting: Setting, runs: Sequence[Run]) -> list[int]:
    """Tokens in each segment."""
    return [runs[0].lengths[segment.attention_layers[0]] for segment in setting.pipeline.manifest.segments]


@contextmanager
def sampled() -> Iterator[list[int]]:
    """The most memory of this process that no file backs, as it is known up to now.  [1]"""
    most = [memory("RssAnon")]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            most[0] = max(most[0], memory("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def memory(kind: str) -> int:
    """Bytes of this process of a kind, as the kernel calls it in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 1024


if __name__ == "__main__":
    main()
