"""What each forward of a live model must show before its answer is believed; what did not happen is refused by name.

A layer is entered, then reduced between its attention and its MLP, then left, one layer after the other; it stores its
tokens in the cache that was adopted for it; the decoder gives back that cache, of the whole prompt's length. All of it
is compared on every forward that reduces or reads what was reduced, the steps of a generation among them: a few
comparisons of numbers a layer. Knows the order of things, nothing of tokens or policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from framefusion.live.attention.slots import CacheLayer
from framefusion.live.seams import LAYER_ARGUMENTS, Cache, broken, cache_in


class Proof:
    """The way of one forward through the layers."""

    def __init__(self, layers: Sequence[nn.Module], tokens: int, total: int) -> None:
        """Args:
        layers: of the decoder.
        tokens: new ones, as given.
        total: length of the prompt behind them.
        """
        self.layers = layers
        self.tokens = tokens
        self.total = total
        self.layer = -1
        self.place = "left"
        self.cache: Cache | None = None

    def enter(self, index: int) -> None:
        """Before a layer.

        Raises:
            BackendError: a layer before it was skipped, or not left.
        """
        if self.place != "left":
            raise broken(f"nothing ran behind the forward of decoder layer {self.layer}")
        self._skip(index)
        self.layer = index
        self.place = "entered"

    def entered(self, index: int) -> None:
        """Within a layer, before its attention.

        Raises:
            BackendError: the layer was not entered through its hooks.
        """
        if (self.layer, self.place) != (index, "entered"):
            raise broken(f"decoder layer {index} ran, but nothing before its forward did")

    def between(self, index: int) -> None:
        """Before the norm behind the attention.

        Raises:
            BackendError: the layer was not entered through its hooks.
        """
        self.entered(index)
        self.place = "between"

    def leave(self, index: int, output: object, present: int, stored: CacheLayer | None, cache: Cache | None) -> Tensor:
        """Behind a layer.

        Args:
            index: of the layer.
            output: of its forward.
            present: tokens that must be in it.
            stored: the cache's layer that was prepared for the tokens, None without a cache.
            cache: that holds it.

        Raises:
            BackendError: nothing ran between attention and MLP, the cache was not used, the length is another.

        Returns:
            The output, which is hidden states.  [B, present, D]
        """
        if (self.layer, self.place) != (index, "between"):
            raise broken(f"nothing ran between attention and MLP of decoder layer {index}")
        if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[1] != present:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise broken(f"decoder layer {index} gave {shape} for {present} tokens that are left")
        if stored is not None:
            if stored.announced or cache is None or cache.layers[index] is not stored:
                raise broken(f"decoder layer {index} stored nothing in the cache that was adopted for it")
            if stored.get_seq_length() != self.total:
                raise broken(f"the cache counts {stored.get_seq_length()} tokens for a prompt of {self.total}")
        self.cache = cache
        self.place = "left"
        return output

    def end(self, output: Any, use_cache: object) -> None:
        """Behind the decoder.

        Args:
            output: of its forward, a ModelOutput or a tuple.
            use_cache: as the decoder was given it.

        Raises:
            BackendError: layers were skipped, or another cache comes back than the one that was adopted.
        """
        if self.place != "left":
            raise broken(f"nothing ran behind the forward of decoder layer {self.layer}")
        self._skip(len(self.layers))
        given_back = cache_in(output if isinstance(output, tuple) else output.values())
        if self.cache is None and (given_back is not None or use_cache is True):
            raise broken("no decoder layer was given the KV cache")
        if self.cache is not None and given_back is not None and given_back is not self.cache:
            raise broken("the decoder gives back another KV cache than its layers had")
        if self.cache is not None and self.cache.get_seq_length() != self.total:
            raise broken(f"the cache counts {self.cache.get_seq_length()} tokens for a prompt of {self.total}")

    def _skip(self, index: int) -> None:
        """Go on to a layer; compiled steps of single layers leave no trace."""
        for skipped in range(self.layer + 1, index):
            if self.tokens > 1 or getattr(self.layers[skipped], "_compiled_call_impl", None) is None:
                raise broken(f"nothing ran before the forward of decoder layer {skipped}")
        if index <= self.layer:
            raise broken(f"decoder layer {index} ran behind layer {self.layer}")


def check_arguments(given: Mapping[str, Any], tokens: int) -> None:
    """Whether everything that a layer is given for each token is known by name, as some tokens go.

    Args:
        given: arguments of the layer by name, but for the hidden states.
        tokens: new ones, as given to the decoder.

    Raises:
        BackendError: rotary tables or mask are absent, or of another length; another argument is of the same length.
    """
    tables = given.get("position_embeddings")
    given_tables = tables if isinstance(tables, (tuple, list)) else ()
    fits = [isinstance(table, Tensor) and table.ndim > 2 and table.shape[-2] == tokens for table in given_tables]
    if tables is not given_tables or not all(fits):
        raise broken(f"no position_embeddings of {tokens} tokens are passed to the decoder layers")
    if "attention_mask" not in given:
        raise broken("no attention_mask is passed to the decoder layers")
    for name, value in given.items() if tokens > 1 else ():
        if name in LAYER_ARGUMENTS or not isinstance(value, Tensor) or not value.ndim:
            continue
        if value.shape[min(1, value.ndim - 1)] == tokens:
            raise broken(f"{name} is passed to the decoder layers for each of {tokens} tokens, under an unknown name")
