"""The KV cache of a live model: its layers are adopted as ones that store fewer tokens than they stand for.

The length that transformers reads is the whole prompt's, so that positions, masks and the slicing of input_ids go on
from the original length; `slots` says which of its tokens are stored. It travels with the request: a second turn, beam
search and assisted generation find in it all they need. Knows no policy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from framefusion.errors import BackendError
from framefusion.live.attention.slots import CacheLayer, Slots
from framefusion.live.seams import Cache, cache_layers, cache_of

COMPILED = (
    "a prompt is reduced to lengths of its own, which compiled code has no room for: run the prefill without "
    "torch.compile, and compile decode steps over a static cache alone, as generate() does; or give it "
    "disable_compile=True"
)


def compiled_step(index: int, hidden: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder layer in compiled code, hidden [B, 1, D]: a decode step, never a prefill.

    Raises:
        BackendError: more than one token, or reduced ones in a dynamic cache.
    """
    cache = cache_of(given)
    layer: Any = None if cache is None or len(cache.layers) <= index else cache.layers[index]
    reduced = isinstance(layer, Slots)
    static = hasattr(layer, "mask_of_compiled_step")
    if hidden.shape[1] > 1 or (reduced and not static):
        refuse_to_compile()
    if not reduced:
        return given
    return {**given, "attention_mask": layer.mask_of_compiled_step(given.get("attention_mask"))}


@partial(torch.compiler.disable, reason=COMPILED)  # or the compiler would take the error for a reason to run uncompiled
def refuse_to_compile() -> None:
    """Raise the error for compiled code that would have to reduce.

    Raises:
        BackendError: always; with fullgraph=True the compiler's own error, which gives the same reason.
    """
    raise BackendError(COMPILED)


def adopt(past_key_values: Cache, index: int, dense: tuple[Tensor, Tensor | None]) -> CacheLayer:
    """The cache's layer of that index as one that knows its slots; what it holds already stays in it.

    Args:
        past_key_values: the cache, which gets the adopted layer.
        index: of the layer.
        dense: slots and validity of a layer that holds every earlier token.  [B, past] each

    Raises:
        BackendError: a quantized cache, or a sliding one that holds tokens.
    """
    from framefusion.live.attention.reduced_layers import ReducedLayer, ReducedStaticLayer  # with transformers

    classes = cache_layers()
    layers = past_key_values.layers
    while len(layers) <= index:
        layers.append(classes.DynamicLayer())
    layer = layers[index]
    if isinstance(layer, (ReducedLayer, ReducedStaticLayer)):
        return layer
    # what reaches a window is refused before it gets here
    if type(layer) is classes.DynamicSlidingWindowLayer and not layer.is_initialized:
        layer = classes.DynamicLayer()
    if type(layer) is classes.StaticSlidingWindowLayer and not layer.is_initialized:
        layer = classes.StaticLayer(layer.max_cache_len)
    if type(layer) not in (classes.DynamicLayer, classes.StaticLayer):
        raise BackendError(
            f"a cache of {type(layer).__name__} cannot hold reduced tokens, whose number differs by layer: "
            "use the DynamicCache that generate() makes by default, or a StaticCache"
        )
    is_dynamic = type(layer) is classes.DynamicLayer
    adopted = ReducedLayer() if is_dynamic else ReducedStaticLayer(layer.max_cache_len)
    adopted.__dict__.update(layer.__dict__)
    adopted.extend(*dense, dense[0].shape[1])
    layers[index] = adopted
    return adopted
