"""Prefill and decode of an LLM at a real shape: transformers in eager torch, ours dense, ours reduced, in turn.

    python -m tools.bench.prefill --write

The limit a reduction can reach is the ratio of floating point operations at the tokens actually kept. Reported are the
ratios of medians, that limit, the share of it reached, and what of a prefill is not layers (scores on the host, plans,
compaction, binding). Outputs of ours and of transformers are compared in the same run. So is the speed of the
matrix product that both spend most of their time in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.export.plan import BuildOptions
from framefusion.runtime.bundle import Bundle, ModelRecord
from framefusion.runtime.flops import prefill_flops
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.positions import Grid, decode_positions
from framefusion.runtime.stitching import Prefilled, Stopwatch
from tools.bench.setting import SHAPES, Film, draw_film, open_bundle, report, summary, write_checkpoint

NEW_TOKENS = 16


def main() -> None:
    arguments = parse()
    checkpoint = write_checkpoint(SHAPES[arguments.shape], arguments.work / f"{arguments.shape}-checkpoint")
    options = BuildOptions(max_input_len=4096, similarity_lower_bound=0.6, depth=arguments.depth)
    folder = open_bundle(checkpoint, arguments.work / f"{arguments.shape}-bundle", options)
    pipeline = Pipeline(Bundle(folder), threads=arguments.threads)
    model = pipeline.manifest.model
    film = draw_film(model, Grid(arguments.frames, 16, 8), before=10, after=22)
    eager = Eager(checkpoint, film, arguments.threads)
    requests = {f"ours at cost {cost:g}": Request(NEW_TOKENS, cost=cost) for cost in arguments.costs}
    runs: dict[str, list[Run]] = {name: [] for name in requests}
    eager_prefill: list[float] = []
    eager_decode: list[float] = []
    for turn in range(arguments.rounds + 1):
        prefill_s, decode_s = eager.run()
        measured = {name: run_ours(pipeline, film, request) for name, request in requests.items()}
        if turn == 0:
            continue  # warm-up
        eager_prefill.append(prefill_s)
        eager_decode.append(decode_s)
        for name, run in measured.items():
            runs[name].append(run)
    dense = runs[f"ours at cost {max(arguments.costs):g}"]
    error = np.abs(dense[0].logits - eager.logits).max() / np.abs(eager.logits).max()
    figures: dict[str, Any] = {
        "shape": arguments.shape,
        "tokens": len(film.hidden),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "dense_logits_relative_error": float(error),
        "matmul_gflops": matmul_gflops(model, len(film.hidden), arguments.threads),
        "eager": {"prefill": summary(eager_prefill), "decode_per_token": summary(eager_decode)},
        "dense_speed_up_over_eager": statistics.median(eager_prefill) / median(dense, "prefill"),
    }
    full = prefill_flops(model, dense[0].lengths)
    for name, own in runs.items():
        figures[name] = figures_of(own, dense, full, prefill_flops(model, own[0].lengths))
    report("prefill", figures, write=arguments.write)


class Run:
    """One prefill and its decode."""

    def __init__(self, prefilled: Prefilled, seconds: dict[str, float], decode: list[float]) -> None:
        self.logits = prefilled.logits.copy()
        self.lengths = [int(n) for cache in prefilled.caches for n in cache.lengths - len(decode)]
        self.history = [record for record in prefilled.history if record.kind != "none"]
        self.prefill = seconds["prefill"] + seconds["reduction"]
        self.overhead = seconds["reduction"] / self.prefill
        self.decode = statistics.median(decode)


def run_ours(pipeline: Pipeline, film: Film, request: Request) -> Run:
    """Prefill, then decode a few tokens at the end of the prompt."""
    stopwatch, rows = Stopwatch(), film.rows(pipeline)
    prefilled = pipeline.prefill(film.prompt, rows, request, stopwatch)
    decoder = pipeline.stitcher.decoder(prefilled)
    places = decode_positions(len(film.hidden), film.prompt.rope_delta, NEW_TOKENS)
    cos, sin = pipeline.rope(places)
    decode = []
    for step in range(NEW_TOKENS - 1):
        start = time.perf_counter()
        decoder.step(film.hidden[step], cos[step], sin[step])
        decode.append(time.perf_counter() - start)
    return Run(prefilled, stopwatch.seconds, decode)


class Eager:
    """The same weights in transformers: eager torch with SDPA, the head on the last token only, as ours."""

    def __init__(
        self, checkpoint: Path, film: Film, threads: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        import torch
        from transformers import Qwen2VLForConditionalGeneration

        torch.set_num_threads(threads)
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self._torch, self.model, self._clock = torch, model.eval(), clock
        self._hidden = torch.from_numpy(film.hidden)[None]
        self._positions = torch.from_numpy(film.prompt.positions)[:, None]
        self._next = torch.from_numpy(
            decode_positions(len(film.hidden), film.prompt.rope_delta, NEW_TOKENS)[:, None].copy()
        )
        self.logits = np.zeros(0, np.float32)

    def run(self) -> tuple[float, float]:
        """Seconds of a prefill, and of one decoded token."""
        with self._torch.inference_mode():
            start = self._clock()
            past = self._forward(self._hidden, self._positions, None)
            prefill = self._clock() - start
            decode = []
            for step in range(NEW_TOKENS - 1):
                start = self._clock()
                row, place = self._hidden[:, step : step + 1], self._next[:, :, step : step + 1]
                self._forward(row, place, past, keep=False)
                decode.append(self._clock() - start)
        return prefill, statistics.median(decode)

    def _forward(self, hidden: Any, positions: Any, past: Any, keep: bool = True) -> Any:
        out = self.model.model.language_model(
            inputs_embeds=hidden, position_ids=positions, past_key_values=past, use_cache=True
        )
        logits = self.model.lm_head(out.last_hidden_state[:, -1])
        if keep:
            self.logits = logits[0].numpy()
        return out.past_key_values


def matmul_gflops(model: ModelRecord, tokens: int, threads: int) -> dict[str, float]:
    """The MLP's first product in torch and in ONNX Runtime: billions of operations a second."""
    import onnx_ir as ir
    import onnxruntime
    import torch

    shapes = ((tokens, model.hidden_size), (model.hidden_size, model.intermediate_size))
    left, right = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in shapes)
    x = ir.Value(name="x", shape=ir.Shape(shapes[0]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", const_value=ir.tensor(right, name="weight"))
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="product")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options)
    pair = torch.from_numpy(left), torch.from_numpy(right)
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: pair[0] @ pair[1]}
    ways["onnxruntime"] = lambda: session.run(None, {"x": left})
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(6):
        for name, multiply in ways.items():
            start = time.perf_counter()
            multiply()
            seconds[name].append(time.perf_counter() - start)
    operations = 2 * tokens * model.hidden_size * model.intermediate_size
    return {name: round(operations / statistics.median(own) / 1e9) for name, own in seconds.items()}


def median(runs: list[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def figures_of(runs: list[Run], dense: list[Run], full: float, flops: float) -> dict[str, Any]:
    """Ratios to ours dense."""
    pick: Callable[[str], list[float]] = lambda name: [getattr(run, name) for run in runs]  # noqa: E731
    speed_up, limit = median(dense, "prefill") / median(runs, "prefill"), full / flops
    return {
        "prefill": summary(pick("prefill")),
        "decode_per_token": summary(pick("decode")),
        "kv_lengths": runs[0].lengths,
        "reductions": [f"call {r.call}: {r.kind} {r.tokens_before} -> {r.tokens_after}" for r in runs[0].history],
        "speed_up": speed_up,
        "flop_limit": limit,
        "share_of_limit": speed_up / limit,
        "not_layers_share": median(runs, "overhead"),
        "decode_speed_up": median(dense, "decode") / median(runs, "decode"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--frames", type=int, default=16, help="temporal grids of 128 tokens")
    parser.add_argument("--costs", type=lambda text: [float(x) for x in text.split(",")], default=[1.0, 0.5, 0.3])
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/framefusion-bench"), help="checkpoint and bundle")
    parser.add_argument("--write", action="store_true", help="write results/prefill.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
