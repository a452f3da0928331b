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

from framefusion.export.engines.inductor.choice import LENGTHS, Geometry, choose, measured
from tools.bench.setting import SHAPES, report


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
    }


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
