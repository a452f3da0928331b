"""The inputs that building blocks are proven with, and what has to come out of them, in fp64.

Heads are those of a 7B model, 7 query heads a key, so that a kernel for large models is taken. In this order, each over
the cache that the one before it left:

    prefill         the first tokens
    chunk           some more behind them: a query shorter than its keys
    decode          a token
    padding         another prompt, with rows behind it that are large and count for nothing
    after padding   a token of that prompt, over slots that still hold the padding

Slots that nothing was written to are large, too: whoever reads one is off by more than any limit. Knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from framefusion.reduction.tracks import previous_in_track
from framefusion.runtime.proof.blocks import reference

Array = NDArray[Any]

HEADS = 14
KV_HEADS = 2
HEAD_DIM = 128
WIDTH = 256
QUERY_WIDTH = HEADS * HEAD_DIM
KEY_WIDTH = KV_HEADS * HEAD_DIM
ROWS = 4  # of the importance
EPS = 1e-6
ALPHA = 1.702  # quick GELU: of the two activations the one whose factor can be lost
CAPACITY = 192
INPUTS = (
    "hidden", "norm_weight", "query", "key", "value", "cos", "sin", "kv_len", "previous", "last",
    "past_key_0", "past_value_0",
)  # fmt: skip
ROW_OUTPUTS = ("normed", "rotated", "activated", "attended", "tower")
OUTPUTS = (*ROW_OUTPUTS, "similarity", "importance", "present_key_0", "present_value_0")
BLOCKS: Mapping[str, str] = {
    "normed": "norm",
    "rotated": "rotary",
    "activated": "activation",
    "attended": "attention over a cache",
    "tower": "attention of a tower",
    "similarity": "similarity",
    "importance": "importance",
    "present_key_0": "keys in the cache",
    "present_value_0": "values in the cache",
}
_STEPS = (("prefill", 100, 100, 0), ("chunk", 37, 137, 0), ("decode", 1, 138, 0))
_PADDED = (("padding", 120, 120, 20), ("after padding", 1, 101, 0))
_GARBAGE = 50.0
_SEED = 14


@dataclass(frozen=True)
class Case:
    """A run of the graph.

    Attributes:
        name: see above.
        inputs: by name, all but the caches; in the type of the graph, integers int64.
        cache: what lies in the caches before the first case that shares them; None continues on what is there.
        expected: output -> what comes out of its first rows or slots, in fp64.
    """

    name: str
    inputs: Mapping[str, Array]
    cache: tuple[Array, Array] | None
    expected: Mapping[str, NDArray[np.float64]]


def graph_name(dialect: str, dtype: str) -> str:
    """The file of a graph, beside this module."""
    return f"{dialect}-{dtype}.onnx"


def block_cases(dtype: DTypeLike) -> Iterator[Case]:
    """All cases for graphs of a type; what is expected is computed from inputs that are rounded to it."""
    random = np.random.default_rng(_SEED)
    for steps in (_STEPS, _PADDED):
        shape = (KV_HEADS, CAPACITY, HEAD_DIM)
        slots = [(_GARBAGE * random.standard_normal(shape)).astype(dtype) for _ in range(2)]
        begun: tuple[Array, Array] | None = (slots[0][None].copy(), slots[1][None].copy())
        keys, values = (part.astype(np.float64) for part in slots)
        for name, length, total, padding in steps:
            inputs = _inputs(random, length, total, padding, np.dtype(dtype))
            yield Case(name, inputs, begun, _expected(inputs, keys, values, padding))
            begun = None


def _inputs(
    random: np.random.Generator, length: int, total: int, padding: int, dtype: np.dtype[Any]
) -> dict[str, Array]:
    widths = {"hidden": WIDTH, "query": QUERY_WIDTH, "key": KEY_WIDTH, "value": KEY_WIDTH}
    rows = {name: random.standard_normal((1, length, width)) for name, width in widths.items()}
    for part in rows.values():
        part[:, length - padding :] *= _GARBAGE
    angles = random.uniform(0, 2 * np.pi, (1, length, HEAD_DIM // 2))
    rows |= {"cos": np.cos(angles), "sin": np.sin(angles), "norm_weight": random.uniform(0.5, 1.5, WIDTH)}
    labels = np.arange(length) % 9 - 1  # a text token, then eight patches of a frame
    labels[length - padding :] = -1
    whole = {
        "kv_len": np.array([total]),
        "previous": previous_in_track(labels),
        "last": np.array([length - padding - 1]),
    }
    typed: dict[str, Array] = {name: part.astype(dtype) for name, part in rows.items()}
    return typed | {name: part.astype(np.int64) for name, part in whole.items()}


def _expected(
    inputs: Mapping[str, Array], keys: NDArray[np.float64], values: NDArray[np.float64], padding: int
) -> dict[str, NDArray[np.float64]]:
    """What comes out; new keys and values are written into the caches, which the next case goes on with."""
    wide = {name: part.astype(np.float64).reshape(part.shape[-2:]) for name, part in inputs.items() if part.ndim == 3}
    length = len(wide["hidden"])
    total = int(inputs["kv_len"][0])
    real = length - padding
    keys[:, total - length : total] = reference.split_heads(wide["key"], KV_HEADS)
    values[:, total - length : total] = reference.split_heads(wide["value"], KV_HEADS)
    visible = reference.lower_right(length, total)
    query = wide["query"]
    expected = {
        "normed": reference.rms_norm(wide["hidden"], inputs["norm_weight"].astype(np.float64), EPS)[:real],
        "rotated": reference.rotary(query, wide["cos"], wide["sin"], HEADS)[:real],
        "activated": reference.swish(wide["hidden"], ALPHA)[:real],
        "attended": reference.attention(query, keys[:, :total], values[:, :total], visible)[:real],
        "similarity": reference.similarity(wide["hidden"], inputs["previous"])[:real],
        "importance": reference.importance(query, wide["key"], int(inputs["last"][0]), ROWS, HEADS, KV_HEADS),
        "present_key_0": keys[:, :total].copy(),
        "present_value_0": values[:, :total].copy(),
    }
    if not padding:  # a tower's rows are never padded
        everything = np.ones((length, length), np.bool_)
        heads = reference.split_heads(query, HEADS)
        expected["tower"] = reference.attention(query, heads, heads, everything)
    return expected
