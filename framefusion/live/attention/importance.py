"""Importance from whichever attention a model uses: its own queries and keys, read on their way to it.

transformers looks the attention function up by name in a registry, in the configuration that each attention module
holds. A view of that configuration gives another name while a call wants the importance, and the function registered
under it computes the scores and goes on to the model's own. Otherwise nothing differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from framefusion.live.seams import attention_of, register_attention
from framefusion.live.state import CALL, current_call

NAME = "framefusion"
"""In transformers' attention registry."""


def register() -> None:
    """Add the function to transformers' registry, where models that are not watched never find it."""
    register_attention(NAME, watched_attention)


class WatchedConfig:
    """An attention module's own view of the configuration: another attention function while importance is wanted."""

    def __init__(self, config: Any) -> None:
        self.__dict__["original"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    @property
    def _attn_implementation(self) -> str | None:
        call = current_call()
        configured: str | None = self.__dict__["original"]._attn_implementation
        return NAME if call is not None and call.watching else configured


def watched_attention(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
    """The result of the model's own attention function, with the importance noted in the call beside it.

    query [B, H, K, hd], key [B, Hkv, T, hd]; the rest is passed on as it is.

    Raises:
        BackendError: as `Call.watch`.
    """
    call = CALL.get()
    assert call is not None  # only a call that watches gets here
    scaling = named.get("scaling")
    with torch.autocast(query.device.type, enabled=False):  # scores of halves would tie
        call.watch(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    config: Any = module.config
    return attention_of(module, config._attn_implementation)(module, query, key, *rest, **named)
