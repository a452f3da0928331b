"""Prefill of an LLM at a real shape: transformers in eager torch, ours dense, ours reduced, in turn.

    python -m tools.bench.prefill --write
    python -m tools.bench.prefill --backend tensorrt-rtx --preset qwen2-vl-7b --write     # on a machine with a GPU

The limit a reduction can reach is the ratio of floating point operations at the tokens actually kept. Reported are the
ratios of medians, that limit, the share of it reached, what of a prefill is not layers (scores on the host, plans,
compaction, binding), eager torch at as many tokens in each layer, and a table of time by stage. Outputs of ours and of
transformers are compared in the same run. So is, on the CPU, the speed of the matrix product that both spend most of
their time in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from framefusion.runtime.format.manifest import ModelRecord
from framefusion.runtime.view.flops import prefill_flops
from tools.bench.runs import Run, Setting, add_flags, parse
from tools.bench.setting import report, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0, 0.5, 0.3])
    arguments = parse(parser)
    setting = Setting(arguments)
    eager = setting.eager()
    requests = setting.requests
    dense_name = setting.dense
    runs: dict[str, list[Run]] = {name: [] for name in requests}
    theirs: dict[str, list[tuple[float, float]]] = {name: [] for name in requests}
    expected = np.zeros(0, np.float32)
    for turn in range(arguments.rounds + 1):
        for name, request in requests.items():
            ours = setting.run(request)
            eager_run = eager.run(None if name == dense_name else ours.lengths)
            expected = eager.logits if name == dense_name else expected
            if turn:  # the first one warms up
                runs[name].append(ours)
                theirs[name].append(eager_run)
    dense = runs[dense_name]
    error = np.abs(dense[0].logits - expected).max() / np.abs(expected).max()
    figures: dict[str, Any] = setting.facts | {
        "dense_logits_relative_error": float(error),
        "eager": eager_figures(theirs[dense_name]),
        "dense_speed_up_over_eager": eager_median(theirs[dense_name], 0) / median(dense, "prefill"),
        "stages": {name: setting.stages(request) for name, request in requests.items()},
    }
    if not setting.on_gpu:
        figures["matmul_gflops"] = matmul_gflops(setting.model, len(setting.film.hidden), arguments.threads)
    full = prefill_flops(setting.model, dense[0].lengths)
    for name, measured in runs.items():
        figures[name] = figures_of(measured, dense, full, prefill_flops(setting.model, measured[0].lengths))
        figures[name]["eager_at_the_same_tokens"] = eager_figures(theirs[name])
        figures[name]["speed_up_over_eager"] = {
            "prefill": eager_median(theirs[name], 0) / median(measured, "prefill"),
            "decode": eager_median(theirs[name], 1) / median(measured, "decode"),
        }
    report("prefill", figures, write=arguments.write, file=setting.result_file("prefill"))


def matmul_gflops(model: ModelRecord, tokens: int, threads: int) -> dict[str, float]:
    """The MLP's first product in torch and in ONNX Runtime: billions of operations a second."""
    import onnx_ir as ir
    import onnxruntime
    import torch

    shapes = ((tokens, model.hidden_size), (model.hidden_size, model.intermediate_size))
    left = np.random.default_rng(0).standard_normal(shapes[0], np.float32)
    right = np.random.default_rng(0).standard_normal(shapes[1], np.float32)
    x = ir.Value(name="x", shape=ir.Shape(shapes[0]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", const_value=ir.tensor(right, name="weight"))
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="product")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options)
    left_tensor = torch.from_numpy(left)
    right_tensor = torch.from_numpy(right)
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: left_tensor @ right_tensor,
        "onnxruntime": lambda: session.run(None, {"x": left}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(6):
        for name, multiply in ways.items():
            start = time.perf_counter()
            multiply()
            seconds[name].append(time.perf_counter() - start)
    operations = 2 * tokens * model.hidden_size * model.intermediate_size
    return {name: round(operations / statistics.median(times) / 1e9) for name, times in seconds.items()}


def median(runs: list[Run], name: str) -> float:
    return float(statistics.median(getattr(run, name) for run in runs))


def eager_median(runs: list[tuple[float, float]], which: int) -> float:
    return statistics.median(run[which] for run in runs)


def eager_figures(runs: list[tuple[float, float]]) -> dict[str, Any]:
    prefill = [run[0] for run in runs]
    decode = [run[1] for run in runs]
    return {"prefill": summary(prefill), "decode_per_token": summary(decode)}


def figures_of(runs: list[Run], dense: list[Run], full: float, flops: float) -> dict[str, Any]:
    """Ratios to ours dense."""
    pick: Callable[[str], list[float]] = lambda name: [getattr(run, name) for run in runs]  # noqa: E731
    speed_up = median(dense, "prefill") / median(runs, "prefill")
    limit = full / flops
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


if __name__ == "__main__":
    main()
