"""Torch modules whose weights stay on the disk: a layer has them while it runs, and only then.

Weights are read when a unit is called and let go when it returns. A unit is a member of an outermost `ModuleList` (a
decoder layer, a block of a tower), or a module without children whose weights are large (a vocabulary's). What is
small stays. Outside a call a unit's weights are NaN, so what reads them past the call shows. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 64 << 20  # bytes of fp32 weights outside the layers from where on a module without children is a unit
FLOAT = 4  # bytes

Read = Callable[[str], Tensor]
"""Parameter of the whole module, by name -> its values, in any floating type, or the codes of quantized weights."""


def stream(module: nn.Module, read: Read, released: Callable[[str], object] = lambda _: None) -> None:
    """Compute a module in fp32 with weights that are read as they are needed; its parameters are replaced.

    Args:
        module: on any device, the meta device included; a tensor that two names share is read for each of them.
        read: see `Read`.
        released: called with the name of each parameter whose memory a unit has given back.
    """
    streamed: set[str] = set()
    for prefix, unit in units(module):
        names = [name for name, _ in unit.named_parameters(remove_duplicate=False)]
        streamed |= {prefix + name for name in names}
        _Unit(prefix, unit, names, read, released)
    for name, _ in list(module.named_parameters(remove_duplicate=False)):
        if name not in streamed:
            _set(module, name, _in_fp32(read(name)))


def units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Prefix and module of each unit, in the order in which they are registered."""
    for name, child in module.named_children():
        place = f"{prefix}{name}."
        if isinstance(module, nn.ModuleList) or (not list(child.children()) and _bytes(child) > KEPT):
            yield place, child
        else:
            yield from units(child, place)


def streamed_bytes(module: nn.Module) -> int:
    """Most bytes of fp32 weights that a streamed module has at a time: its largest unit and what is not streamed."""
    sizes = [_bytes(unit) for _, unit in units(module)]
    return _bytes(module) - sum(sizes) + max(sizes, default=0)


class _Unit:
    """The hooks of one unit."""

    def __init__(
        self, prefix: str, module: nn.Module, names: list[str], read: Read, released: Callable[[str], object]
    ) -> None:
        self._prefix = prefix
        self._module = module
        self._names = names
        self._read = read
        self._released = released
        # a table's rows are converted when they are looked up: the table stays in the type it is stored in
        self._looked_up = type(module) is nn.Embedding
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._release()
        module.register_forward_pre_hook(self._load)
        module.register_forward_hook(self._leave, always_call=True)

    def _load(self, *_: Any) -> None:
        for name in self._names:
            tensor = self._read(self._prefix + name)
            _set(self._module, name, tensor if self._looked_up else _in_fp32(tensor))

    def _leave(self, _module: nn.Module, _arguments: Any, result: Any) -> Any:
        self._release()
        for name in self._names:
            self._released(self._prefix + name)
        return result.float() if self._looked_up and isinstance(result, Tensor) else result

    def _release(self) -> None:
        for name, shape in self._shapes.items():
            _set(self._module, name, torch.full((), torch.nan).expand(shape))


def _in_fp32(tensor: Tensor) -> Tensor:
    """Floats in fp32; whole numbers, as codes of quantized weights are, as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))


def _bytes(module: nn.Module) -> int:
    return sum(
        parameter.numel() * (FLOAT if parameter.is_floating_point() else parameter.itemsize)
        for parameter in module.parameters()
    )
