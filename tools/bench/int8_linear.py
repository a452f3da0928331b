"""Linear maps with weights in int8 as inductor compiles them for a CPU, beside those in bfloat16.

    python -m tools.bench.int8_linear --write

Forms, of weights [out, in] with a scale for each output, rounded to the nearest:

    bfloat16    the product of floats, as engines have it
    packed      torch._weight_int8pack_mm, torch's own kernel for weights in int8 and activations in bfloat16
    converted   codes to bfloat16, then the product: what a compiler may fuse, if it can

All layers' weights are distinct, so that a product reads them from memory as a decode step does. Seconds are the
processor's own of one thread, the least of some rounds in turn: other work on the machine chooses none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.bench.setting import SEED, SHAPES, Shape, report

ROWS = (1, 600, 2080)  # a decode step, a prefill at cost 0.3, and a whole one
LAYERS = 12
REPEATED = 3  # times that a decode step is run within one measurement

Form = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def in_floats(x: Tensor, weights: Sequence[Tensor], _scales: Sequence[Tensor]) -> list[Tensor]:
    """[S, in], [out, in] each -> [S, out] each."""
    return [nn.functional.linear(x, weight) for weight in weights]


def packed(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """The same of codes int8 [out, in] and scales [out]."""
    return [torch._weight_int8pack_mm(x, *pair) for pair in zip(codes, scales, strict=True)]


def converted(x: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """The same."""
    pairs = zip(codes, scales, strict=True)
    return [nn.functional.linear(x, code.to(x.dtype)) * scale for code, scale in pairs]


FORMS: dict[str, Form] = {"bfloat16": in_floats, "packed": packed, "converted": converted}


def figures(shape: Shape, rounds: int) -> dict[str, Any]:
    """Seconds of one map of each form, by rows, and the largest error beside fp32 over the largest output."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    weights = [torch.randn(shape.intermediate_size, shape.hidden_size) * 0.02 for _ in range(LAYERS)]
    scales = [weight.abs().amax(1) / 127 for weight in weights]
    codes = [(weight / scale[:, None]).round().to(torch.int8) for weight, scale in zip(weights, scales, strict=True)]
    halved = [weight.bfloat16() for weight in weights]
    half_scales = [scale.bfloat16() for scale in scales]
    found: dict[str, Any] = {}
    for rows in ROWS:
        x = torch.randn(rows, shape.hidden_size).bfloat16()
        exact = nn.functional.linear(x.float(), weights[0])
        compiled = {name: torch.compile(form, dynamic=False) for name, form in FORMS.items()}
        measured: dict[str, list[float]] = {name: [] for name in FORMS}
        for _ in range(rounds + 1):
            for name, form in compiled.items():
                stored = halved if name == "bfloat16" else codes
                repeats = REPEATED if rows == 1 else 1
                start = time.process_time()
                for _ in range(repeats):
                    result = form(x, stored, half_scales)
                measured[name].append((time.process_time() - start) / repeats / LAYERS)
                error = float((result[0].float() - exact).abs().max() / exact.abs().max())
                found.setdefault(name, {})[f"{rows} rows"] = {"least_s": min(measured[name]), "error": error}
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--write", action="store_true", help="write a file under results/")
    arguments = parser.parse_args()
    with torch.inference_mode():
        forms = figures(SHAPES[arguments.shape], arguments.rounds)
    report(
        "int8_linear", {"shape": arguments.shape, "threads": 1, "layers": LAYERS, "forms": forms}, write=arguments.write
    )


if __name__ == "__main__":
    main()
