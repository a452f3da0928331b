"""Error feedback beside AutoGPTQ's own code (MIT), which is not part of this repository: a clone of it is read.

    git clone https://github.com/AutoGPTQ/AutoGPTQ elsewhere
    python -m tools.gptq_reference --autogptq elsewhere --write

Matrices of the tiny trained model, and rows whose inputs go together and differ in size. `GPTQ.fasterquant`, with act
order and static groups, chooses codes over this package's scales, which must be the same codes, and over its own, which
are those of the largest weight of a group. Errors are of the outputs of further rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.export.quantization.feedback import DAMPING, Gram, feed_back
from framefusion.export.quantization.search import search
from tools.accuracy import CHECKPOINT
from tools.bench.setting import report

MATRICES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.3.self_attn.o_proj",
    "model.layers.5.mlp.gate_proj",
    "model.layers.11.mlp.down_proj",
)
FORMATS = (BlockFormat(4, 32), BlockFormat(4, 128), BlockFormat(4, 64, symmetric=False), BlockFormat(8, 128))
ROWS = 600


class Grid(nn.Module):
    """A quantizer for AutoGPTQ that has the scales of a grid, group after group.

    Args:
        grid: whose scales and zero points are taken.
    """

    groups = 0  # of the class: AutoGPTQ copies a quantizer for each group

    def __init__(self, grid: BlockQuantized) -> None:
        super().__init__()
        self.grid = grid
        self.scale = torch.ones(1)
        self.zero = torch.zeros(1)
        Grid.groups = 0

    def ready(self) -> bool:
        """Always: the scales are there."""
        return True

    def find_params(self, weight_part: Tensor, weight: bool = False) -> None:
        """Take the scales of the next group; the arguments are AutoGPTQ's."""
        group = Grid.groups
        Grid.groups += 1
        self.scale = self.grid.scales[:, group : group + 1].float()
        zeros = self.grid.zero_points
        middle = torch.full_like(self.scale, self.grid.format.middle)
        self.zero = middle if zeros is None else zeros[:, group : group + 1].float()

    def quantize(self, column: Tensor) -> Tensor:
        """What the codes of a column stand for.  [out, 1]"""
        codes = torch.clamp(torch.round(column / self.scale) + self.zero, 0, self.grid.format.largest)
        return self.scale * (codes - self.zero)


def main() -> None:
    arguments = parse()
    module = autogptq(arguments.autogptq)
    weights = load_file(CHECKPOINT / "model.safetensors")
    rows = [
        compared(module, str(form), name, weights[f"{name}.weight"].float(), form)
        for form in FORMATS
        for name in MATRICES
    ]
    head = ["git", "-C", str(arguments.autogptq), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    sys.argv = [argument if argument != str(arguments.autogptq) else "AutoGPTQ" for argument in sys.argv]
    report("gptq_reference", {"autogptq": commit, "rows": rows}, write=arguments.write)


def autogptq(folder: Path) -> ModuleType:
    """The module of a clone that has `GPTQ`, without the package around it, which wants a GPU."""
    package = ModuleType("autogptq_quantization")
    package.__path__ = [str(folder / "auto_gptq" / "quantization")]
    sys.modules[package.__name__] = package
    vars(transformers).setdefault("Conv1D", import_module("transformers.pytorch_utils").Conv1D)
    vars(torch.cuda)["synchronize"] = lambda *_: None  # it measures its time so
    return import_module(f"{package.__name__}.gptq")


def compared(module: Any, form_name: str, name: str, weight: Tensor, form: BlockFormat) -> dict[str, Any]:
    """Codes of a matrix by both, and the errors of outputs."""
    rows = drawn(weight.shape[1], 1)
    further = drawn(weight.shape[1], 2)
    gram = Gram(weight.shape[1])
    gram.add(rows)
    grid = search(weight, form, torch.float32, gram.importance)
    ours = feed_back(weight, form, gram=gram).dequantize()
    theirs = fed_back(module, weight, rows, form, Grid(grid))
    usual = module.Quantizer()
    usual.configure(form.bits, perchannel=True, sym=form.symmetric, mse=False)
    searched = search(weight, form).dequantize()
    whole = (weight @ further.T).pow(2).mean()

    def error(quantized: Tensor) -> float:
        return round(float((((weight - quantized) @ further.T).pow(2).mean() / whole).sqrt()), 5)

    step = grid.scales.abs().repeat_interleave(form.block, 1)[:, : weight.shape[1]].float()
    return {
        "format": form_name,
        "matrix": name,
        "codes": weight.numel(),
        "otherwise": int(((ours - theirs).abs() > step / 2).sum()),
        "error": error(ours),
        "error_autogptq": error(fed_back(module, weight, rows, form, usual)),
        "error_search": error(searched),
    }


def fed_back(module: Any, weight: Tensor, rows: Tensor, form: BlockFormat, quantizer: Any) -> Tensor:
    """What AutoGPTQ's codes of a matrix stand for."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    gptq = module.GPTQ(linear)
    gptq.quantizer = quantizer
    gptq.add_batch(rows[None], None)
    gptq.fasterquant(percdamp=DAMPING, group_size=form.block, actorder=True, static_groups=True)
    return linear.weight.data


def drawn(inputs: int, seed: int) -> Tensor:
    """Rows of one distribution.  [ROWS, inputs]"""
    model = torch.Generator().manual_seed(0)
    mixing = torch.randn((inputs, inputs), generator=model)
    sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=model)]
    return torch.randn((ROWS, inputs), generator=torch.Generator().manual_seed(seed)) @ mixing * sizes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autogptq", type=Path, required=True, help="a clone of AutoGPTQ")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/gptq_reference.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
