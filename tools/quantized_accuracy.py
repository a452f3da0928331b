"""What quantised weights cost in answers, and what they change of the tokens that are kept: the tiny trained model.

    python -m tools.quantized_accuracy --questions 1000 --write
    python -m tools.quantized_accuracy --questions 1000 --clips brief --write
    python -m tools.quantized_accuracy --films --questions 1000 --deep 0 --write

The questions, the clips and what is right are those of `tools.accuracy`. A question is asked of every format under
every case, and each format is compared with fp32 on the same questions:

    answers     right or not, with the interval of the paired difference
    kept        the visual tokens that the last layer holds, beside those of fp32
    decisions   the calls of fp32's reduction repeated, with what the format's own scores would have decided at each:
                how often a threshold and how often a rank goes the other way, before one change leads to the next;
                and whether the answer is right then, so that weights and decisions are told apart

With --films codes that films chose are compared with those of the search, at the lowest cost, and more is told apart:

    beginning   whether the answer begins with what is right, which a model that does not end its answer gives as well
    in turn     fp32's weights with the decisions of each format

With --work bundles and answers stay in a folder, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from framefusion.console.progress import CountLines
from framefusion.export.check.replay import Redecided
from framefusion.export.evaluate.evaluation import end_with_parent
from framefusion.export.evaluate.questions import Question, normalised
from framefusion.export.evaluate.scoring import paired, share_of
from framefusion.reduction.policy import Decision
from framefusion.runtime.format.manifest_file import read_manifest
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.generation.token_rows import TokenRows
from framefusion.runtime.pipeline import Generation, Pipeline, Request
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Prompt
from tools.accuracy import MAX_ANSWER, questions, working_folder
from tools.bench.setting import report
from tools.quantized_bundles import BY_FILMS, FLOAT8, FLOATS, FORMATS, HEADS
from tools.tiny import clips

RESULTS = {"lasting": "quantized_accuracy", "brief": "quantized_accuracy_brief"}  # by `clips.STAYS`


@dataclass(frozen=True)
class Case:
    """How a question is answered.

    Attributes:
        reducer: that drops tokens.
        cost: share of the computation over visual tokens that is kept.
        bound: similarity from which tokens merge; None takes the bundle's.
    """

    reducer: str
    cost: float
    bound: float | None = None


BY_FILMS_COSTS = (0.1,)
CASES = tuple(Case("framefusion", cost) for cost in (1.0, 0.5, 0.3, 0.1))
DEEP = (Case("framefusion", 0.3, 0.97), Case("framefusion", 0.1, 0.9), Case("fastv", 0.3), Case("fastv", 0.1))
"""Cases that decide inside the LLM, where weights have a say: the others here decide by the vision tower's rows."""


def main() -> None:
    arguments = parse()
    with working_folder(arguments.work) as work:
        bundles = {name: make(work) for name, make in chosen(arguments).items()}
        question_list = questions(arguments.questions, clips.STAYS[arguments.clips])
        name = f"{arguments.clips}{'-films' if arguments.films else ''}{'-float8' if arguments.float8 else ''}"
        cases = CASES
        if arguments.films:
            cases = tuple(case for case in CASES if case.cost in BY_FILMS_COSTS)
        asking = Asking(cases, arguments.deep, in_turn=arguments.films)
        rows = answered(bundles, question_list, asking, work / f"{name}.jsonl", arguments.jobs)
        calibrations = {name: calibration_of(folder) for name, folder in bundles.items()}
    figures = {"clips": arguments.clips, "deep_questions": arguments.deep} | summary(rows)
    if arguments.films:
        figures["calibrations"] = calibrations
    files = {
        "quantized_films": arguments.films,
        "quantized_heads": arguments.heads,
        "quantized_float8": arguments.float8,
    }
    file = next((name for name, wanted in files.items() if wanted), None)
    if file is not None and arguments.clips != "lasting":
        file = f"{file}_{arguments.clips}"
    report(RESULTS[arguments.clips], figures, write=arguments.write, file=file)


def calibration_of(folder: Path) -> dict[str, Any] | None:
    """What the manifest says of the films that chose a bundle's codes, but for their names."""
    record = read_manifest(folder).quantization
    if record is None or record.calibration is None:
        return None
    return {name: value for name, value in asdict(record.calibration).items() if name not in ("films", "texts")}


def chosen(arguments: argparse.Namespace) -> dict[str, Callable[[Path], Path]]:
    if arguments.films:
        return BY_FILMS
    if arguments.float8:
        return FLOAT8
    return HEADS if arguments.heads else FORMATS


# --- Answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """How questions are put.

    Attributes:
        cases: of every question.
        deep: questions that are asked under `DEEP`, too.
        in_turn: ask fp32 by each format's decisions, too, and embed a question once, for bundles of one tower and type.
    """

    cases: tuple[Case, ...] = CASES
    deep: int = 0
    in_turn: bool = False


def answered(
    bundles: dict[str, Path], question_list: Sequence[Question], asking: Asking, output: Path, jobs: int
) -> list[dict[str, Any]]:
    """Every question under every case and format, a row each; kept in a file as they come.

    Args:
        bundles: by format.
        question_list: that is asked.
        asking: under which cases.
        output: file of rows, one question a line.
        jobs: processes.
    """
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    found: dict[str, list[dict[str, Any]]] = {}
    for rows in map(json.loads, lines):
        found[rows[0]["question"]] = rows
    waiting = [
        (question, (*asking.cases, *DEEP) if index < asking.deep else asking.cases)
        for index, question in enumerate(question_list)
        if question.key not in found
    ]
    count = CountLines("questions")
    with output.open("a", encoding="utf-8") as file:
        for rows in rows_of(bundles, waiting, jobs, asking.in_turn):
            file.write(json.dumps(rows) + "\n")
            file.flush()
            found[rows[0]["question"]] = rows
            count(len(found), len(question_list))
    return [row for question in question_list for row in found[question.key]]


def rows_of(
    bundles: dict[str, Path], waiting: Sequence[tuple[Question, Sequence[Case]]], jobs: int, in_turn: bool
) -> Iterator[list[dict[str, Any]]]:
    if jobs == 1:
        answerer = Answerer(bundles, in_turn)
        yield from (answerer.rows(*item) for item in waiting)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _open, (bundles, in_turn)) as pool:
        yield from pool.map(_rows, waiting)


_ANSWERER: Answerer | None = None  # of a process of the pool


def _open(bundles: dict[str, Path], in_turn: bool) -> None:
    global _ANSWERER
    end_with_parent()
    _ANSWERER = Answerer(bundles, in_turn)


def _rows(item: tuple[Question, Sequence[Case]]) -> list[dict[str, Any]]:
    assert _ANSWERER is not None
    return _ANSWERER.rows(*item)


@dataclass
class Observed:
    """An answer, and how it came about.

    Attributes:
        text: of the answer.
        visual: of the prompt.
        kept: visual tokens behind each call of the reduction, places in the prompt; the last ones are those that the
            last layer holds.
        decisions: of the reduction.
    """

    text: str
    visual: int
    kept: list[frozenset[int]]
    decisions: list[Decision]


class Answerer:
    """A bundle of each format, all of them open; `in_turn` is that of `Asking`."""

    def __init__(self, bundles: dict[str, Path], in_turn: bool = False) -> None:
        self.in_turn = in_turn
        self.pipelines = {name: Pipeline(folder, threads=1) for name, folder in bundles.items()}

    def rows(self, question: Question, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """The question under each case by each format, fp32 first."""
        files = question.files
        theirs: dict[Case, Observed] = {}
        found = []
        floats = self.pipelines[FLOATS]
        prompt, rows = floats.read(question.turns(None), files)
        for name, pipeline in self.pipelines.items():
            if not self.in_turn:
                prompt, rows = pipeline.read(question.turns(None), files)
            for case in cases:
                mine = observed(pipeline, prompt, rows, case)
                reference = theirs.setdefault(case, mine)
                row = {"question": question.key, "type": question.type, "format": name, **asdict(case)}
                row |= {"text": mine.text, "right": question.is_right(mine.text)}
                row["begins_right"] = begins_right(question, mine.text)
                row |= compared(mine, reference)
                if name != FLOATS and case.cost < 1:
                    row["decisions"], text = redecided(pipeline, prompt, rows, case, mine, reference)
                    row["right_by_floats_decisions"] = question.is_right(text)
                    if self.in_turn:
                        _, text = redecided(floats, prompt, rows, case, reference, mine)
                        row["floats_right_by_these"] = question.is_right(text)
                found.append(row)
        return found


def begins_right(question: Question, text: str) -> bool:
    """Whether an answer begins with what is right, whatever follows."""
    return any(normalised(text).startswith(normalised(answer)) for answer in question.answers)


def request_of(case: Case, pipeline: Pipeline) -> Request:
    greedy = replace(pipeline.manifest.generation, do_sample=False)
    return Request(MAX_ANSWER, case.cost, case.bound, generation=greedy, reducer=case.reducer)


def observed(pipeline: Pipeline, prompt: Prompt, rows: TokenRows, case: Case) -> Observed:
    """An answer with the decisions behind it."""
    request = pipeline.clamp_new_tokens(request_of(case, pipeline), prompt)
    decisions = list[Decision]()
    stopwatch = Stopwatch()
    prefilled = pipeline.prefill(prompt, rows, request, stopwatch, observer=decisions.append)
    text = Generation.from_steps(pipeline.decode(prompt, prefilled, request, stopwatch)).text
    visual = set(np.flatnonzero(prompt.labels >= 0).tolist())
    kept = [frozenset(visual.intersection(places.tolist())) for places in prefilled.kept]
    return Observed(text, len(visual), kept, decisions)


def compared(mine: Observed, theirs: Observed) -> dict[str, Any]:
    """The kept tokens of one format beside fp32's, behind each call and at the end."""
    shares = [len(ours & others) / max(len(others), 1) for ours, others in zip(mine.kept, theirs.kept, strict=True)]
    return {"left": len(mine.kept[-1]), "agree": shares[-1], "agree_by_call": shares}


def redecided(
    pipeline: Pipeline, prompt: Prompt, rows: TokenRows, case: Case, mine: Observed, theirs: Observed
) -> tuple[list[dict[str, Any]], str]:
    """The decisions of fp32 beside those of this format's scores over the same tokens, and the answer by the former."""
    request = pipeline.clamp_new_tokens(request_of(case, pipeline), prompt)
    policy = pipeline.reduction(prompt, request)
    assert policy is not None  # the cost is below 1
    state = Redecided(policy, theirs.decisions)
    if plans_of(mine) == plans_of(theirs):  # it decided so by itself: no need to run it again
        for decision in theirs.decisions:
            state.step(decision.similarity, decision.importance)
        text = mine.text
    else:
        stopwatch = Stopwatch()
        prefilled = prefill(pipeline.segments, rows, state, request.max_new_tokens, stopwatch)
        text = Generation.from_steps(pipeline.decode(prompt, prefilled, request, stopwatch)).text
    return [asdict(redecision) for redecision in state.redecisions if redecision.kind != "none"], text


def plans_of(observed: Observed) -> list[list[int]]:
    return [decision.plan.kept.tolist() for decision in observed.decisions]


# --- Summary --------------------------------------------------------------------------------------------------------


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of right answers, kept tokens and decisions by format and case, each beside fp32's, as plain values."""
    found = []
    cases = dict.fromkeys((row["reducer"], row["cost"], row["bound"]) for row in rows)
    formats = dict.fromkeys(row["format"] for row in rows)
    for case in cases:
        floats: list[bool] = []
        texts: list[str] = []
        for name in formats:
            mine = [r for r in rows if (r["reducer"], r["cost"], r["bound"]) == case and r["format"] == name]
            right = [row["right"] for row in mine]
            if name == FLOATS:
                floats = right
                texts = [row["text"] for row in mine]
            facts = dict(zip(("reducer", "cost", "bound"), case, strict=True)) | {"format": name} | share_of(right)
            facts["tokens_left"] = round(fmean(row["left"] for row in mine), 1)
            if name != FLOATS:
                facts["against_floats"] = paired(floats, right)
                facts["other_texts"] = sum(row["text"] != text for row, text in zip(mine, texts, strict=True))
                facts |= kept_facts(mine, floats)
            for key in ("begins_right", "right_by_floats_decisions", "floats_right_by_these"):
                if all(key in row for row in mine):
                    facts[key] = sum(row[key] for row in mine)
            found.append(facts)
    return {"questions": len({row["question"] for row in rows}), "formats": found}


def kept_facts(mine: Sequence[dict[str, Any]], floats: Sequence[bool]) -> dict[str, Any]:
    """Agreement of what is kept, decisions that go the other way, and what both have to do with right answers."""
    same = [row["agree"] == 1.0 for row in mine]
    split = {}
    for key, wanted in (("same_kept", True), ("other_kept", False)):
        indices = [index for index, is_same in enumerate(same) if is_same == wanted]
        split[key] = {
            "questions": len(indices),
            "right": sum(mine[index]["right"] for index in indices),
            "right_in_floats": sum(floats[index] for index in indices),
        }
    decisions = [decision for row in mine for decision in row.get("decisions", ())]
    kinds = (
        ("merge by threshold", "merge", False), ("merge by rank", "merge", True), ("prune by rank", "prune", True),
    )  # fmt: skip
    flips = {}
    for key, kind, last in kinds:
        of_kind = [d for d in decisions if (d["kind"], d["last"]) == (kind, last)]
        if of_kind:
            flips[key] = {
                "calls": len(of_kind),
                "calls_otherwise": sum(d["otherwise"] > 0 for d in of_kind),
                "tokens": sum(d["visual"] for d in of_kind),
                "tokens_otherwise": sum(d["otherwise"] for d in of_kind),
            }
    by_call = [round(fmean(shares), 5) for shares in zip(*(row["agree_by_call"] for row in mine), strict=True)]
    return {"agree": round(fmean(row["agree"] for row in mine), 5), "agree_by_call": by_call, **split, "flips": flips}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--deep", type=int, default=300, help="of these, asked under the cases of DEEP, too")
    parser.add_argument("--clips", choices=tuple(clips.STAYS), default="lasting", help="how long objects are seen")
    parser.add_argument("--heads", action="store_true", help="quantized heads in place of the other formats")
    parser.add_argument("--float8", action="store_true", help="floats of 8 bits in place of the other formats")
    parser.add_argument("--films", action="store_true", help="codes that films chose in place of the other formats")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--work", type=Path, help="bundles and answers; kept")
    parser.add_argument("--write", action="store_true", help="write tools/bench/results/quantized_accuracy*.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
