"""KV caches in floats and in int8 beside each other: errors, answers, bytes, and times of prefill and decode in turn.

    python -m tools.bench.kv_cache --questions 1000 --write

    errors    the tiny trained model about drawn films: logits behind the prompt and behind 64 tokens, the same tokens
    answers   its questions (tools/quantized_accuracy.py), with intervals of paired differences
    speed     a shape of random weights, both caches in turn

With --work bundles and answers stay in a folder, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.export.check.observation import Run as Observation
from framefusion.export.check.observation import run
from framefusion.export.evaluate.questions import Question
from framefusion.export.families.reference.transformers_call import relative_error
from framefusion.export.options import BuildOptions
from framefusion.export.report.inspection import cache_facts
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.pipeline import Pipeline, Request
from tools.accuracy import questions, working_folder
from tools.bench.runs import Setting, add_flags, in_turn, parse
from tools.bench.setting import report, summary
from tools.quantized_accuracy import Asking, answered
from tools.quantized_accuracy import summary as of_answers
from tools.quantized_bundles import FLOATS, built
from tools.tiny import clips

CODES = "int8"
COSTS = (1.0, 0.3)
DECODED = 64
CACHES = {FLOATS: None, CODES: "int8"}


def main() -> None:
    arguments = arguments_of()
    with working_folder(arguments.answers) as work:
        options = {FLOATS: BuildOptions(), CODES: BuildOptions(kv_cache_dtype="int8")}
        bundles = {name: built(work, chosen, f"caches-{name}") for name, chosen in options.items()}
        manifests = {name: read_manifest(folder) for name, folder in bundles.items()}
        figures: dict[str, Any] = {"caches": {name: cache_facts(manifest) for name, manifest in manifests.items()}}
        question_list = questions(arguments.questions, clips.STAY)
        figures["errors"] = errors(bundles, question_list[: arguments.films])
        rows = answered(bundles, question_list, Asking(), work / "caches.jsonl", arguments.jobs)
        figures |= {"clips": "lasting"} | of_answers(rows)
    if arguments.rounds:
        figures["speed"] = speed(arguments)
    report("kv_cache", figures, write=arguments.write)


def errors(bundles: dict[str, Path], question_list: Sequence[Question]) -> dict[str, Any]:
    """How far logits are from those with caches of floats, relative to the largest, over the same tokens."""
    floats = Pipeline(bundles[FLOATS], threads=1)
    codes = Pipeline(bundles[CODES], threads=1)
    found: dict[str, Any] = {"films": len(question_list), "tokens": DECODED}
    for cost in COSTS:
        pairs = [pair_of(floats, codes, question, cost) for question in question_list]
        steps = [list(zip([a.logits, *a.decoded], [b.logits, *b.decoded], strict=True)) for a, b in pairs]
        first = [relative_error(*film[0]) for film in steps]
        last = [relative_error(*film[-1]) for film in steps]
        alike = [int(ours.argmax()) == int(theirs.argmax()) for film in steps for ours, theirs in film]
        kept = [np.setxor1d(*segment).size for a, b in pairs for segment in zip(a.kept, b.kept, strict=True)]
        found[f"cost {cost:g}"] = {
            "behind_the_prompt": {"median": statistics.median(first), "largest": max(first)},
            f"behind_{DECODED}_tokens": {"median": statistics.median(last), "largest": max(last)},
            "same_likeliest": sum(alike) / len(alike),
            "kept_otherwise": int(sum(kept)),
        }
    return found


def pair_of(floats: Pipeline, codes: Pipeline, question: Question, cost: float) -> tuple[Observation, Observation]:
    """The same film with codes and with floats; the tokens are those that floats make likeliest."""
    request = Request(DECODED + 1, cost=cost)
    prompt, rows = floats.read(question.turns(None), question.files)
    theirs = run(floats, prompt, rows, request)
    return run(codes, prompt, rows, request, tokens=theirs.tokens), theirs


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of both, in turn, at each cost."""
    settings = {name: Setting(_with(arguments, cached)) for name, cached in CACHES.items()}
    runs = in_turn(settings, arguments.rounds)
    figures: dict[str, Any] = settings[FLOATS].facts
    for name, setting in settings.items():
        figures[name] = {"bytes_per_token": cache_facts(setting.pipeline.manifest)["bytes_per_token"]}
        for label in setting.requests:
            mine = runs[name, label]
            figures[name][label] = {
                "prefill": summary([each.prefill for each in mine]),
                "decode_per_token": summary([each.decode for each in mine]),
                "held": mine[0].lengths[-1],
            }
    return figures


def _with(arguments: argparse.Namespace, cached: str | None) -> argparse.Namespace:
    changed = copy.copy(arguments)
    changed.kv_cache_dtype = cached
    return changed


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, list(COSTS))
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--films", type=int, default=50, help="of the errors: those of the first questions")
    parser.add_argument("--jobs", type=int, default=1, help="processes that answer")
    parser.add_argument("--answers", type=Path, help="bundles and answers; kept")
    arguments = parse(parser)
    arguments.dtype = arguments.dtype or "float32"
    arguments.golden = False
    return arguments


if __name__ == "__main__":
    main()
