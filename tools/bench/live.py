"""Prefill of a live Hugging Face model, dense and reduced in turn, and what the reduction itself takes of it.

    python -m tools.bench.live --write

The limit is the ratio of floating point operations at the tokens actually kept. "Not layers" is the time inside the
hooks (labels, scores, plans, gathers, masks) over the prefill: everything that the layers of a smaller prompt would not
need. `--clock cpu` counts seconds of one thread's work, which other work on the machine hardly changes. Random
weights, the film and the ways to count are those of tools.bench.prefill. On a GPU a prefill is timed from start to end,
and what the hooks take of it is not: their launches run on after them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from framefusion.interface import FrameFusion, apply_framefusion, remove_framefusion
from framefusion.live.call import Call
from framefusion.live.state import CALL
from framefusion.runtime.format.manifest import ModelRecord
from framefusion.runtime.media.visual_input import Grid
from framefusion.runtime.view.flops import prefill_flops
from tools.bench.eager import Eager
from tools.bench.setting import SHAPES, Shape, draw_film, report, summary, write_checkpoint

HOOKS = ("_begin", "_enter_layer", "_between", "_leave_layer", "_end")


class HookClock:
    """Seconds of a prefill inside the hooks; `watch` runs inside a layer, the others between them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.prefill = 0.0
        self._clock = clock
        for kind, names in ((FrameFusion, HOOKS), (Call, ("watch",))):
            for name in names:
                setattr(kind, name, self._timed(getattr(kind, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            start = self._clock()
            try:
                return function(*args, **named)
            finally:
                call = CALL.get()  # of a decode step it has no rows
                if call is None or call.rows:
                    self.prefill += self._clock() - start

        return timed


def main() -> None:
    arguments = parse()
    shape = SHAPES[arguments.shape]
    checkpoint = write_checkpoint(shape, arguments.work / f"{arguments.shape}-checkpoint")
    model = geometry(shape)
    film = draw_film(model, Grid(arguments.frames, *arguments.grid), before=10, after=22)
    seconds, threads = (time.thread_time, 1) if arguments.clock == "cpu" else (time.perf_counter, arguments.threads)
    on_cpu = arguments.device == "cpu"
    eager = Eager(checkpoint, film, threads, seconds, arguments.new_tokens, arguments.device, arguments.dtype)
    clock = HookClock(seconds)
    names: dict[str, float | None] = {"dense": None} | {f"cost {cost:g}": cost for cost in arguments.costs}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    decode: dict[str, list[float]] = {name: [] for name in names}
    hooks: dict[str, list[float]] = {name: [] for name in names}
    records: dict[str, Any] = {}
    memory: dict[str, int] = {}
    for turn in range(arguments.rounds + 1):
        for name, cost in names.items():
            handle = None if cost is None else apply_framefusion(eager.model, cost, 0.6, depth=arguments.depth)
            clock.prefill = 0.0
            with nullcontext() if handle is None else handle.labels(film.prompt.labels):
                (prefill_s, decode_s), memory[name] = eager.run_watched()
                hooks_s = clock.prefill
            if handle is not None:
                (records[name],) = handle.last
                remove_framefusion(eager.model)
            if turn:  # the first one warms up
                prefill[name].append(prefill_s)
                decode[name].append(decode_s)
                hooks[name].append(hooks_s / prefill_s)
    figures: dict[str, Any] = {
        "shape": arguments.shape,
        "tokens": len(film.hidden),
        "threads": threads,
        "clock": arguments.clock,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "dense": {"prefill": summary(prefill["dense"]), "decode_per_token": summary(decode["dense"])},
    }
    full = prefill_flops(model, [len(film.hidden)] * model.num_layers)
    dense = summary(prefill["dense"])["median_s"]
    for name, record in records.items():
        timing = summary(prefill[name])
        limit = full / prefill_flops(model, list(record.tokens_per_layer))
        figures[name] = {
            "prefill": timing,
            "decode_per_token": summary(decode[name]),
            "tokens_per_layer": list(record.tokens_per_layer),
            "reductions": [f"call {r.call}: {r.kind} {r.tokens_before} -> {r.tokens_after}" for r in record.calls],
            "cost": record.cost,
            "speed_up": dense / timing["median_s"],
            "flop_limit": limit,
            "share_of_limit": dense / timing["median_s"] / limit,
            "not_layers_share": summary(hooks[name])["median_s"] if on_cpu else None,
        }
    if not on_cpu:
        figures["peak_memory_bytes"] = memory
    report("live", figures, write=arguments.write)


def geometry(shape: Shape) -> ModelRecord:
    """What counting operations and drawing a film need."""
    return ModelRecord(
        family="qwen2_vl",
        model_type="qwen2_vl",
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        vocab_size=shape.vocab_size,
        rope_theta=1e6,
        mrope_section=None,
        importance_rows=4,
        dtype="float32",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--frames", type=int, default=16, help="temporal grids")
    parser.add_argument("--grid", type=lambda text: tuple(map(int, text.split("x"))), default=(16, 8), help="HxW")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--costs", type=lambda text: [float(x) for x in text.split(",")], default=[0.5, 0.3])
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of one thread")
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint")
    parser.add_argument("--write", action="store_true", help="write results/live.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
