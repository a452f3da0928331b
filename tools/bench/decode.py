"""Decode of an LLM behind a long prompt: eager torch and ours, dense and reduced, in turn.

    python -m tools.bench.decode --write
    python -m tools.bench.decode --backend tensorrt-rtx --preset qwen2-vl-7b --write      # on a machine with a GPU

A step reads every weight once and the keys and values that are kept: reported beside the time of a token are those
bytes a second, and eager torch over caches of the same lengths. Prefills are not timed.
"""

from __future__ import annotations

import argparse
from typing import Any

from framefusion.runtime.format.manifest import FLOAT_BYTES, Manifest
from tools.bench.prefill import eager_median, median
from tools.bench.runs import Run, Setting, add_flags, parse
from tools.bench.setting import report, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, [1.0, 0.7, 0.5, 0.3])
    parser.set_defaults(new_tokens=64)
    arguments = parse(parser)
    setting = Setting(arguments)
    eager = setting.eager()
    manifest = setting.pipeline.manifest
    runs: dict[str, list[Run]] = {name: [] for name in setting.requests}
    theirs: dict[str, list[tuple[float, float]]] = {name: [] for name in setting.requests}
    for turn in range(arguments.rounds + 1):
        for name, request in setting.requests.items():
            ours = setting.run(request)
            other = eager.run(None if name == setting.dense else ours.lengths)
            if turn:  # the first one warms up
                runs[name].append(ours)
                theirs[name].append(other)
    figures: dict[str, Any] = setting.facts | {"new_tokens": arguments.new_tokens}
    for name, measured in runs.items():
        seconds = median(measured, "decode")
        lengths = measured[0].lengths
        figures[name] = {
            "per_token": summary([run.decode for run in measured]),
            "tokens_per_second": 1 / seconds,
            "kv_lengths": lengths,
            "gb_read_per_second": bytes_read(manifest, lengths) / seconds / 1e9,
            "speed_up": median(runs[setting.dense], "decode") / seconds,
            "eager_at_the_same_tokens": summary([run[1] for run in theirs[name]]),
            "speed_up_over_eager": eager_median(theirs[name], 1) / seconds,
        }
    report("decode", figures, write=arguments.write, file=setting.result_file("decode"))


def bytes_read(manifest: Manifest, lengths: list[int]) -> int:
    """Weights of the LLM, and keys and values of the tokens that are kept, as the backend stores them."""
    model = manifest.model
    slot = 2 * model.num_kv_heads * model.head_dim * FLOAT_BYTES[model.dtype]
    return sum(segment.weight_bytes for segment in manifest.segments) + slot * sum(lengths)


if __name__ == "__main__":
    main()
