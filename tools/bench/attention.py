"""The forms of attention that inductor's engines may have, each on its own: right or wrong, and how long it takes.

    python -m tools.bench.attention --shape qwen2-7b --dtype bfloat16 --tokens 4096 [--device cuda] [--write]

A prefill of `--tokens` and a decode step behind it, one layer's worth. `chosen` is what `ff-export compile` would take
for engines of that shape on this device, by lengths of its own.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from framefusion.export.engines.inductor.choice import LENGTHS, Geometry, choose, measured, seconds
from tools.bench.setting import SHAPES, Shape, report


def figures(shape: str, dtype: str, device: str, tokens: int) -> dict[str, Any]:
    """What became of each form, and which would be compiled."""
    model = SHAPES[shape]
    head_dim = model.hidden_size // model.num_heads
    geometry = Geometry(model.num_heads, model.num_kv_heads, head_dim, getattr(torch, dtype), device)
    trials = measured(geometry, (tokens, min(tokens, LENGTHS[device][1])))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "shape": shape,
        "dtype": dtype,
        "tokens": tokens,
        "chosen": choose(geometry),
        "forms": {name: asdict(trial) for name, trial in trials.items()},
        "products": products(model, geometry, tokens),
    }


def products(model: Shape, geometry: Geometry, tokens: int) -> dict[str, float]:
    """Seconds of the products that share an input, each by itself and as one, for one token and for many."""
    width = model.hidden_size
    kv_width = geometry.kv_heads * geometry.head_dim
    found = {}
    for name, parts in {"qkv": (width, kv_width, kv_width), "gate_up": (model.intermediate_size,) * 2}.items():
        weights = [torch.randn(width, part, device=geometry.device).to(geometry.dtype) for part in parts]
        joined = torch.cat(weights, -1)
        for rows in (1, tokens):
            x = torch.randn(1, rows, width, device=geometry.device).to(geometry.dtype)
            found[f"{name}_{rows}_apart_s"] = seconds(lambda: [x @ each for each in weights], geometry.device)  # noqa: B023
            found[f"{name}_{rows}_joined_s"] = seconds(lambda: x @ joined, geometry.device)  # noqa: B023
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-7b")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", choices=tuple(LENGTHS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help="add the figures to tools/bench/results")
    arguments = parser.parse_args()
    found = figures(arguments.shape, arguments.dtype, arguments.device, arguments.tokens)
    file = f"attention_{arguments.shape}_{arguments.dtype}_{arguments.device}"
    report("attention", found, write=arguments.write, file=file)


if __name__ == "__main__":
    main()
