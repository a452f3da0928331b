"""A backend that runs the building blocks by the torch ops, right or with a mistake. No test in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from framefusion.ops import kernels
from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.backends.host import HostBackend, host_array
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.proof.blocks import cases

Results = dict[str, torch.Tensor]
Mistake = Callable[[Results, Mapping[str, torch.Tensor]], None]
"""Changes results in place, given them and the inputs."""


class EagerBlocks(HostBackend):
    """The ops as eager torch computes them, and then a mistake.

    Args:
        mistake: what goes wrong.
    """

    name = "eager"

    def __init__(self, mistake: Mistake = lambda *_: None) -> None:
        super().__init__()
        self._mistake = mistake

    def open(self, graphs: Any) -> None:
        """Nothing to do."""

    def bind(
        self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], cache: SegmentCache | None
    ) -> Any:
        """See `Backend.bind`."""
        assert cache is not None
        given = dict(inputs) | cache.named("past")
        return _Bound(given, dict(outputs) | cache.named("present"), self._mistake)


class _Bound:
    def __init__(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer], mistake: Mistake) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._mistake = mistake

    def run(self) -> None:
        """Compute everything anew."""
        given = {name: torch.from_numpy(host_array(buffer)) for name, buffer in self.inputs.items()}
        results = computed(given, given["kv_len"])
        self._mistake(results, given)
        for name, buffer in self.outputs.items():
            host_array(buffer)[...] = results[name].numpy()


def computed(given: Mapping[str, torch.Tensor], kv_len: torch.Tensor) -> Results:
    """All outputs by the ops' own kernels."""
    query = given["query"]
    past = (given["past_key_0"], given["past_value_0"])
    counts = (cases.HEADS, cases.KV_HEADS)
    attended, keys, values = kernels.cache_attention(query, given["key"], given["value"], *past, kv_len, *counts)
    return {
        "normed": kernels.rms_norm(given["hidden"], given["norm_weight"], cases.EPS),
        "rotated": kernels.rotary(query, given["cos"], given["sin"], cases.HEADS),
        "activated": kernels.swish(given["hidden"], cases.ALPHA),
        "attended": attended,
        "tower": kernels.full_attention(query, query, query, cases.HEADS),
        "similarity": kernels.similarity(given["hidden"], given["previous"]),
        "importance": kernels.importance(query, given["key"], given["last"], cases.ROWS, *counts),
        "present_key_0": keys,
        "present_value_0": values,
    }


def attend(results: Results, given: Mapping[str, torch.Tensor], total: int, visible: torch.Tensor) -> torch.Tensor:
    """Attention over the first slots with another mask."""
    heads = kernels.split_heads(given["query"], cases.HEADS)
    keys = results["present_key_0"][:, :, :total]
    values = results["present_value_0"][:, :, :total]
    out = torch.nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2).reshape(given["query"].shape)


def no_mask(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Every token sees all that are in the cache."""
    total = int(given["kv_len"])
    results["attended"] = attend(results, given, total, torch.ones(given["query"].shape[1], total, dtype=torch.bool))


def upper_left(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """The mask of a query that is as long as its keys, for one that is shorter."""
    total = int(given["kv_len"])
    visible = torch.ones(given["query"].shape[1], total, dtype=torch.bool).tril()
    results["attended"] = attend(results, given, total, visible)


def slot_too_many(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """A slot that nothing was written to is read."""
    length = given["query"].shape[1]
    total = int(given["kv_len"])
    visible = torch.ones(length, total + 1, dtype=torch.bool).tril(total - length + 1)
    results["attended"] = attend(results, given, total + 1, visible)


def heads_in_turn(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Query head h reads keys of head h modulo Hkv."""
    length = given["query"].shape[1]
    total = int(given["kv_len"])
    turn = torch.arange(cases.HEADS) % cases.KV_HEADS
    heads = kernels.split_heads(given["query"], cases.HEADS)
    keys, values = (results[f"present_{part}_0"][:, turn, :total] for part in ("key", "value"))
    visible = torch.ones(length, total, dtype=torch.bool).tril(total - length)
    out = torch.nn.functional.scaled_dot_product_attention(heads, keys, values, attn_mask=visible)
    results["attended"] = out.transpose(1, 2).reshape(given["query"].shape)


def padding_counts(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Importance as if the last row were the last token."""
    last = torch.tensor([given["query"].shape[1] - 1])
    results["importance"] = computed(dict(given) | {"last": last}, given["kv_len"])["importance"]


def other_pairs(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Channels in pairs of neighbours, not of halves."""
    rows = given["query"].view(1, -1, cases.HEADS, cases.HEAD_DIM)
    (cos, sin) = (given[name][:, :, None] for name in ("cos", "sin"))
    even = rows[..., ::2]
    odd = rows[..., 1::2]
    results["rotated"] = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).reshape(given["query"].shape)


def scale_lost(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """The activation without its factor."""
    results["activated"] = torch.nn.functional.silu(given["hidden"])


def not_a_number(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """One number of a norm."""
    results["normed"][0, 0, 3] = float("nan")


def cache_rounded(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Keys in the cache lose digits that their type has."""
    results["present_key_0"] = results["present_key_0"].half().float()


def nothing_written(results: Results, given: Mapping[str, torch.Tensor]) -> None:
    """Zeros, where a kernel has not run."""
    results["similarity"] = torch.zeros_like(results["similarity"])
