"""Decode steps of quantised bundles by the processor's own seconds on one thread, so that a busy machine can say them.

    python -m tools.bench.quantised_steps --write
    python -m tools.bench.quantised_steps --contenders onnxruntime:floats,openvino:int4+head --tokens 4096

Steps behind so many tokens, at which caches of zeros are set: a step takes as long whatever they hold. Contenders take
turns unless they are run apart, and each figure is the least of the rounds. Two threads share all this but what memory
alone can give.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.kv_cache import SegmentCache
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.decode import Decoder
from framefusion.runtime.pipeline import Pipeline
from tools.bench.quantised import FLOATS, llm_bytes, round_to_nearest_only
from tools.bench.runs import Setting, add_flags, parse
from tools.bench.setting import report

CONTENDERS = (
    "onnxruntime:floats", "onnxruntime:int8+head", "onnxruntime:int4:128+head", "onnxruntime:int4:128+head4",
    "openvino:int8+head", "openvino:int4:128+head", "openvino:int4:128+head4", "openvino-bf16:int4:128+head4",
)  # fmt: skip
SPARE = 8  # slots behind the tokens
STEPS = 3  # of a contender before it is the next one's turn


class Steps:
    """A bundle that decodes behind any number of tokens, over and over."""

    def __init__(self, folder: Path, backend: str) -> None:
        bundle = Bundle(folder, verify=False)
        self.pipeline = Pipeline(bundle, threads=1, choice=choose(bundle, backend, "cpu"))
        model = bundle.manifest.model
        self._row = np.full(model.hidden_size, 0.02, model.float_type)
        self._cos = np.ones(model.head_dim // 2, model.float_type)
        self._sin = np.zeros(model.head_dim // 2, model.float_type)

    def at(self, tokens: int) -> Decoder:
        """A decoder behind so many tokens."""
        segments = self.pipeline.segments
        caches: list[SegmentCache] = []
        for record in self.pipeline.manifest.segments:
            cache = segments.cache(record, [tokens + SPARE] * len(record.attention_layers))
            cache.lengths[:] = tokens
            caches.append(cache)
        return Decoder(segments, caches)

    def seconds(self, decoder: Decoder) -> float:
        """The processor's, of one step."""
        start = time.process_time()
        decoder.step(self._row, self._cos, self._sin)
        return time.process_time() - start


def figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each contender, by tokens in the caches."""
    if arguments.apart:
        found: dict[str, Any] = {}
        for name in arguments.contenders:
            with get_context("spawn").Pool(1) as pool:
                found |= pool.apply(least, (arguments, [name]))
    else:
        found = least(arguments, arguments.contenders)
    first = next(iter(found.values()))
    for contender in found.values():
        for tokens in map(_key, arguments.tokens):
            contender[tokens]["over_first"] = first[tokens]["least_s"] / contender[tokens]["least_s"]
    return found


def least(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Seconds of a step of contenders that take turns, and the bytes of their weights."""
    round_to_nearest_only()
    contenders = {name: Steps(built(arguments, name), name.partition(":")[0]) for name in names}
    found: dict[str, Any] = {name: {"llm_bytes": llm_bytes(steps.pipeline)} for name, steps in contenders.items()}
    for tokens in arguments.tokens:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, steps in contenders.items():
                decoder = steps.at(tokens)
                seconds[name] += [steps.seconds(decoder) for _ in range(STEPS)]
        for name, measured in seconds.items():
            found[name][_key(tokens)] = {"least_s": min(measured)}
    return found


def _key(tokens: int) -> str:
    return f"{tokens} tokens"


def built(arguments: argparse.Namespace, name: str) -> Path:
    """The bundle of a contender, which is built if it is not there."""
    changed = copy.copy(arguments)
    weights = name.partition(":")[2]
    changed.weights = None if weights == FLOATS else weights
    changed.backend = "onnxruntime"  # graphs are the same for all
    return Setting.built(changed)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0])
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=CONTENDERS)
    parser.add_argument("--tokens", type=lambda text: [int(x) for x in text.split(",")], default=[2080, 624])
    parser.add_argument("--apart", action="store_true", help="one contender in memory at a time, and no turns")
    arguments = parse(parser)
    arguments.dtype = arguments.dtype or "float32"
    arguments.golden = False
    contenders = figures(arguments)
    facts = {"shape": arguments.shape, "threads": 1, "rounds": arguments.rounds, "apart": arguments.apart}
    found = facts | {"contenders": contenders}
    file = "quantised_steps" if arguments.shape == "qwen2-0.5b" else f"quantised_steps_{arguments.shape}"
    report("quantised_steps", found, write=arguments.write, file=file)


if __name__ == "__main__":
    main()
