"""What quantised weights change of the tokens that are kept, in a tiny checkpoint of every family.

    python -m tools.quantized_families --write
    python -m tools.quantized_families --families nvila,llava_video --write

The checkpoints are those of the families' tests, of random weights, and the films are drawn: nothing here is right or
wrong, only kept or not. What is compared, and how, stands in `tools.quantized_accuracy`, which has a trained model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from framefusion.console.progress import CountLines
from framefusion.export.options import BuildOptions
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.text.prompt import Turn, Visual
from tests.families import CASES
from tests.families.case import FamilyCase, clip
from tools.accuracy import working_folder
from tools.bench.setting import RESULTS, open_bundle, report
from tools.quantized_accuracy import Case, Observed, compared, kept_facts, observed, redecided
from tools.quantized_bundles import FLOATS

FORMATS: dict[str, dict[str, Any]] = {
    FLOATS: {},
    "float16": {"dtype": "float16"},
    "int8": {"weights": "int8"},
    "int4:32": {"weights": "int4:32"},
    "int4:128+zero": {"weights": "int4:128+zero"},
}
BOUND = 0.97  # so that calls inside the LLM decide, too
UNDER = (Case("framefusion", 0.5), Case("framefusion", 0.3), Case("framefusion", 0.5, BOUND))
QUESTION = "What happens?"
NAME = "quantized_families"


def main() -> None:
    arguments = parse()
    count = CountLines("families")
    cases = [case for case in CASES if case.family in (arguments.families or case.family).split(",")]
    found = []
    with working_folder(arguments.work) as work:
        for done, case in enumerate(cases):
            found += measure(case, work / case.family, arguments.films)
            count(done + 1, len(cases))
    if arguments.families:
        found = beside_the_stored(found, arguments.films)
    report(NAME, {"films": arguments.films, "bound": BOUND, "families": found}, write=arguments.write)


def beside_the_stored(found: list[dict[str, Any]], films: int) -> list[dict[str, Any]]:
    """Rows of some families among the stored rows of the others, in the order of the table of families."""
    stored = json.loads((RESULTS / f"{NAME}.json").read_text())
    if stored["films"] != films:
        raise SystemExit(f"the stored rows are of {stored['films']} films each: give --films {stored['films']}")
    new = {row["family"] for row in found}
    order = [case.family for case in CASES]
    rows = [*(row for row in stored["families"] if row["family"] not in new), *found]
    return sorted(rows, key=lambda row: order.index(row["family"]))


def measure(case: FamilyCase, work: Path, films: int) -> list[dict[str, Any]]:
    """A row for each format and case."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        checkpoint.mkdir(parents=True)
        case.write(checkpoint, case.variants[0])
    theirs: dict[tuple[int, Case], Observed] = {}
    found = []
    for name, options in FORMATS.items():
        folder = open_bundle(checkpoint, work / name, BuildOptions(**options))
        bundle = Bundle(folder)
        backend = OnnxRuntimeBackend(folder, manifest=bundle.manifest, threads=1)  # compared here, not proven
        pipeline = Pipeline(bundle, backend)
        rows: dict[Case, list[dict[str, Any]]] = {under: [] for under in UNDER}
        for seed in range(films):
            prompt, hidden = pipeline.read([Turn("user", (Visual.VIDEO, QUESTION))], [clip(12, seed=seed)])
            for under in UNDER:
                mine = observed(pipeline, prompt, hidden, under)
                reference = theirs.setdefault((seed, under), mine)
                row = {"text": mine.text, "right": mine.text == reference.text, **compared(mine, reference)}
                if name != FLOATS:
                    row["decisions"], _ = redecided(pipeline, prompt, hidden, under, mine, reference)
                rows[under].append(row)
        if name == FLOATS:
            continue
        for under, of_case in rows.items():
            facts = kept_facts(of_case, [True] * films)
            found.append(
                {"family": case.family, "format": name, "cost": under.cost, "bound": under.bound}
                | {key: facts[key] for key in ("agree", "agree_by_call", "flips")}
                | {"same_kept": facts["same_kept"]["questions"], "same_answers": sum(row["right"] for row in of_case)}
            )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=20, help="of each family")
    parser.add_argument("--families", help="some of them, beside the stored rows of the others; default: all")
    parser.add_argument("--work", type=Path, help="checkpoints and bundles; kept")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/quantized_families.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
