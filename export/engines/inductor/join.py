"""Query, key and value as one product, gate and up as one: fewer launches, of more work each. Knows no weight's value.

A weight of the bundle is [in, out], so weights side by side are no view of it: who loads an engine copies them, once.
That is free on a GPU, where weights are copied anyway. On a CPU they are mapped, and stay as they are.
"""

from __future__ import annotations

from torch import nn

from framefusion.export.graphs.decoder import AttentionBlock, MlpBlock
from framefusion.export.graphs.layers import JoinedLinear, Linear

_PARTS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    AttentionBlock: ("qkv", ("q", "k", "v")),
    MlpBlock: ("gate_up", ("gate", "up")),
}


def join_products(module: nn.Module) -> dict[str, list[str]]:
    """Join the products of a decoder's blocks, in place.

    Returns:
        Each parameter that is new, and those whose last axes it holds one after the other.
    """
    joined: dict[str, list[str]] = {}
    for path, block in list(module.named_modules()):
        if type(block) not in _PARTS:
            continue
        (name, parts) = _PARTS[type(block)]
        linears = [block.get_submodule(part) for part in parts]
        together = JoinedLinear([linear for linear in linears if isinstance(linear, Linear)])
        setattr(block, name, together)
        for parameter, _ in together.named_parameters():
            joined[f"{path}.{name}.{parameter}"] = [f"{path}.{part}.{parameter}" for part in parts]
        for part in parts:
            delattr(block, part)
    return joined
