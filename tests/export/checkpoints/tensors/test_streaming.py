"""Modules whose weights stay on the disk: the same numbers, one layer in memory, NaN for what reads past a call."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from framefusion.export.checkpoints.tensors import streaming
from framefusion.export.checkpoints.tensors.streaming import stream, streamed_bytes, units
from framefusion.export.machine import page_out

ROWS, WIDTH, DEPTH = 50, 8, 3


class Model(nn.Module):
    """A table, layers with layers inside, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ModuleList([nn.LayerNorm(WIDTH)])[0]) for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[S] -> [S, V]."""
        hidden = self.table(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def is_empty(model: Model) -> bool:
    """Whether the first layer has no weights now."""
    return bool(torch.isnan(model.get_parameter("layers.0.0.weight")).all())


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEPT", 4 * WIDTH * 10)


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_streamed_module_computes_what_a_whole_one_does_in_fp32(stored: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(stored)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = Model()
    expected.load_state_dict(values)
    stream(model, values.__getitem__)
    ids = torch.arange(5)
    result = model(ids)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected(ids))
    assert torch.equal(model(ids), result)  # and again


@pytest.mark.usefixtures("small_units")
def test_only_the_unit_that_runs_has_weights() -> None:
    model, read = Model(), list[str]()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def recorded(name: str) -> Tensor:
        read.append(name)
        return values[name]

    assert [prefix for prefix, _ in units(model)] == ["table.", "layers.0.", "layers.1.", "layers.2.", "head."]
    full = 4 * sum(value.numel() for value in values.values())
    assert streamed_bytes(model) == 4 * (2 * WIDTH + ROWS * WIDTH) < full
    stream(model, recorded)
    assert set(read) == {"norm.weight", "norm.bias"}
    alive: list[bool] = []
    model.layers[1].register_forward_hook(lambda *_: alive.append(is_empty(model)))
    model(torch.arange(3))
    assert alive == [True]
    assert torch.isnan(model.head.weight).all()
    assert torch.isnan(nn.functional.linear(torch.ones(1, WIDTH), model.head.weight)).all()


@pytest.mark.usefixtures("small_units")
def test_weights_are_let_go_when_a_layer_fails() -> None:
    model = Model()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stream(model, values.__getitem__)
    with pytest.raises(RuntimeError):
        model.layers[0](torch.ones(1, WIDTH + 1))
    assert is_empty(model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_a_mapped_file_are_given_back_and_come_again(tmp_path: Path) -> None:
    if is_in_memory(tmp_path):
        pytest.skip("files of a tmpfs have no pages but those in memory")
    values = torch.arange(8 << 20, dtype=torch.float32)  # 32 MiB
    save_file({"x": values}, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        tensor = file.get_tensor("x")
    assert torch.equal(tensor, values)
    mapped = resident("RssFile")
    page_out(tensor.data_ptr(), tensor.nbytes)
    assert resident("RssFile") < mapped - 30_000
    assert torch.equal(tensor, values)
    written = values + 1
    page_out(written.data_ptr(), written.nbytes)  # memory of no file keeps what was written
    assert torch.equal(written - 1, values)


def is_in_memory(folder: Path) -> bool:
    """Whether a folder's file system is a tmpfs."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(Path(place).parts), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(above, default=(0, ""))[1] == "tmpfs"


def resident(kind: str) -> int:
    """Kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))
