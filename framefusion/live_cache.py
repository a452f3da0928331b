"""A layer of transformers' dynamic cache that stores fewer tokens than it stands for.

The length that transformers reads is the whole prompt's, so that positions, masks and the slicing of input_ids go on
from the original length; `slots` tells which of its tokens are stored. It travels with the request: a second turn, beam
search and assisted generation find in it all they need. Knows no policy.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from framefusion.errors import BackendError


@cache
def cache_layer() -> Any:
    """The class, made when transformers is there."""
    from transformers.cache_utils import DynamicLayer

    class ReducedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
        """Keys and values of the tokens that reached this layer.

        `slots` [B, K] are their places in the prompt, `valid` [B, K] tells padding (None: there is none).
        """

        slots: Tensor
        valid: Tensor | None = None
        total = 0

        def extend(self, slots: Tensor, valid: Tensor | None, total: int) -> None:
            """Say which tokens will be stored once the next update is done."""
            self.slots, self.valid, self.total = slots, valid, total

        def get_seq_length(self) -> int:
            return self.total

        def reset(self) -> None:
            super().reset()
            self.slots, self.valid, self.total = self.slots[:, :0], None, 0

        def crop(self, tokens_to_remove: int) -> None:
            """Take back the latest tokens, as assisted generation does; none of a reduced prompt."""
            count = self.total - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
            if count <= 0:
                return
            latest = torch.arange(self.total - count, self.total, device=self.slots.device)
            tail = self.slots[:, -count:]
            if tail.shape[1] < count or bool((tail != latest).any()):
                raise BackendError(f"the cache cannot give back {count} tokens: reduced ones are among them")
            super().crop(-count)
            valid = None if self.valid is None else self.valid[:, :-count]
            self.extend(self.slots[:, :-count], valid, self.total - count)

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self._select(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._select(torch.arange(len(self.slots)).repeat_interleave(repeats))

        def _select(self, rows: Tensor) -> None:
            rows = rows.to(self.slots.device)
            self.slots = self.slots[rows]
            self.valid = None if self.valid is None else self.valid[rows]

    return ReducedLayer


def adopt(past_key_values: Any, index: int, dense: tuple[Tensor, Tensor | None]) -> Any:
    """The cache's layer of that index as one that knows its slots; what it holds already stays in it.

    Args:
        past_key_values: transformers' Cache.
        index: of the layer.
        dense: slots and validity of a layer that holds every earlier token.

    Raises:
        BackendError: a static or quantized cache, or a sliding one that holds tokens.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kind, make, layers = cache_layer(), cast(Any, DynamicLayer), past_key_values.layers
    while len(layers) <= index:
        layers.append(make())
    layer = layers[index]
    if isinstance(layer, kind):
        return layer
    if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
        layer = make()  # what reaches its window is refused before it gets here
    if type(layer) is not DynamicLayer:
        raise BackendError(
            f"a cache of {type(layer).__name__} cannot hold reduced tokens, whose number differs by layer: "
            "use the DynamicCache that generate() makes by default"
        )
    adopted = kind()
    adopted.__dict__.update(layer.__dict__)
    adopted.extend(*dense, dense[0].shape[1])
    layers[index] = adopted
    return adopted
