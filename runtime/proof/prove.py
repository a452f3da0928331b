"""Is a backend right on this device? The bundle's golden, run by it, number by number.

    vision tower   rows of the canned picture
    each run       kept tokens and the scores behind them, logits behind the prompt and behind each token of the answer
    together       logits behind the tokens of all answers as one number, where limits were measured (quantized weights)
    in parts       the last segment's prefill in parts, where the backend would do that to a long prompt
    rows at once   runs that join and leave one batch, each beside itself alone, where the backend batches
    chosen         the tokens that a device takes by itself, from the largest logit on, against its own logits

Errors are shares of the golden's largest magnitude. Two scores may be nearer to each other than rounding: where a
device keeps other tokens than the golden, the golden's decisions are repeated there and the scores behind them
compared, so that rounding is told from a wrong answer. Which backend is taken is decided elsewhere (opening.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError
from framefusion.reduction.plan import Plan, Scores
from framefusion.reduction.policy import Decision, ReductionState
from framefusion.reduction.tracks import DISSIMILAR, FloatArray
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.host import HOST
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.proof.golden import (
    Golden,
    GoldenCall,
    GoldenRun,
    GoldenTower,
    GoldenValues,
    logit_places,
    row_places,
)
from framefusion.runtime.proof.rehearsal import Answer, Rehearsal

PARTS = 3  # of a prefill in parts
TOWER = "rows of the vision tower"
TOGETHER = "decoded logits of all runs together"


@dataclass(frozen=True)
class Stage:
    """One comparison."""

    what: str
    error: float
    limit: float
    note: str = ""

    @property
    def kind(self) -> str:
        """What kind of number was compared, whatever the run: "similarity", "importance", "logits", or `what`."""
        kind = self.what.rpartition(": ")[2]
        return "logits" if kind == "decoded logits" else kind

    @property
    def right(self) -> bool:
        """Whether the error is rounding; a NaN is none."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Proof:
    """What all comparisons of one backend gave."""

    stages: tuple[Stage, ...]
    seconds: float

    @property
    def right(self) -> bool:
        """Whether all stages are."""
        return all(stage.right for stage in self.stages)

    @property
    def worst(self) -> Stage:
        """The stage whose error is the largest share of its limit; the first wrong one where one is wrong."""
        wrong = [stage for stage in self.stages if not stage.right]
        return wrong[0] if wrong else max(self.stages, key=_share)

    @property
    def text(self) -> str:
        """The verdict in a few words."""
        worst = self.worst
        if self.right:
            return f"right, largest error {worst.error:.1e} in {worst.what} (limit {worst.limit:.1e})"
        return f"wrong: {worst.what} are off by {worst.error:.3g}, the limit is {worst.limit:.3g}"


def prove(bundle: Bundle, backend: Backend, golden: Golden) -> Proof:
    """Run the golden's request and compare.

    Args:
        bundle: whose graphs run.
        backend: opened for it.
        golden: of the bundle.

    Raises:
        BackendError: the backend refuses or fails.
    """
    start = time.perf_counter()
    backend.open(bundle.graphs)
    rehearsal = Rehearsal(bundle, backend, golden.request)
    stages: list[Stage] = []
    # 1. The vision tower: one picture.
    if golden.tower is not None:
        stages.append(_tower(rehearsal, golden.tower, golden))
    # 2. The request under each cost: prefill, reduction, decode over the caches it leaves.
    answers: list[tuple[Answer, GoldenRun]] = []
    for run in golden.runs:
        answer, found = _run(rehearsal, run, golden)
        stages += found
        answers += [] if answer is None else [(answer, run)]
    if golden.limits.measured is not None and answers:
        stages.append(_together(answers, rehearsal, golden, golden.limits.measured.pooled))
    # 3. The prefill in parts, as a long prompt would be run.
    dense = next((run for run in golden.runs if run.cost is None), None)
    if dense is not None and backend.chunk is not None and _has_parts(bundle):
        answer = rehearsal.answer(None, chunk=-(-golden.request.length // PARTS), decode=False)
        stages.append(_logits(f"{dense.name}, in parts: logits", answer.logits, dense.logits[:1], rehearsal, golden))
    # 4. Requests of unequal lengths in one call, as a server decodes them.
    if rehearsal.batch_sizes and golden.runs:
        stages.append(_in_a_batch(rehearsal, golden))
    # 5. The tokens that the device chooses by itself, where it is not the host that chooses them.
    if backend.device is not HOST and all(stage.right for stage in stages):
        stages.append(_chosen(rehearsal, golden))
    return Proof(tuple(stages), time.perf_counter() - start)


def _has_parts(bundle: Bundle) -> bool:
    """Whether the last segment takes any number of tokens: see `segments.chunks_of`."""
    return bundle.manifest.reduction.mode != "fixed" and bundle.manifest.segments[-1].buckets is None


def _chosen(rehearsal: Rehearsal, golden: Golden) -> Stage:
    """How far the logits of the tokens that a device chose lie below the largest, of which both may be off."""
    what = "tokens chosen on the device"
    limit = golden.limits.numbers
    try:
        chosen = rehearsal.chosen()
    except BackendError as error:
        return Stage(what, float("inf"), limit, str(error))
    worst = 0.0
    for token, logits in zip(chosen.tokens, chosen.logits, strict=True):
        is_token = 0 <= token < logits.size
        behind = float(logits.max() - logits[token]) if is_token else np.inf
        worst = _largest(worst, behind / float(np.abs(logits).max()) / 2)
    return Stage(what, worst, limit)


def _in_a_batch(rehearsal: Rehearsal, golden: Golden) -> Stage:
    """The first run and the last in turn in one batch, as far as each is from itself alone."""
    runs = [golden.runs[-(index % 2)] for index in range(max(rehearsal.batch_sizes))]
    settings = [(run.cost, run.similarity_lower_bound) for run in runs]
    alone = [rehearsal.alone(*setting).logits[1:] for setting in settings]
    found = rehearsal.together(settings)
    pairs = [pair for rows in zip(found, alone, strict=True) for pair in zip(*rows, strict=True)]
    errors = [float(np.abs(ours - theirs).max()) / float(np.abs(theirs).max()) for ours, theirs in pairs]
    are_equal = all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    note = "" if are_equal else "not bit for bit those of each row alone"
    return Stage(f"{len(runs)} rows at once: decoded logits", _largest(0.0, *errors), golden.limits.numbers, note)


def _tower(rehearsal: Rehearsal, tower: GoldenTower, golden: Golden) -> Stage:
    rows = rehearsal.tower(tower.picture)
    error = (
        np.inf if rows.shape != tower.shape else _error(rows, row_places(golden.request.seed, rows.size), tower.rows)
    )
    return Stage(TOWER, float(error), golden.limits.of("tower"))


def _run(rehearsal: Rehearsal, run: GoldenRun, golden: Golden) -> tuple[Answer | None, list[Stage]]:
    """Kept tokens, scores and logits of one run; the answer, where its logits are comparable."""
    limits = golden.limits
    answer = rehearsal.alone(run.cost, run.similarity_lower_bound)
    others = _differing(answer.kept, run.kept)
    kept = sum(map(len, run.kept))
    errors = _score_errors(answer.decisions, run.calls) if not others else {}
    note = ""
    if others and run.calls:
        # The device chose otherwise: repeat the golden's decisions, and see whether its scores are within rounding.
        answer, errors = _repeated(rehearsal, run)
        if not _differing(answer.kept, run.kept) and all(error <= limits.of(name) for name, error in errors.items()):
            note = f"{others} of {kept} chosen otherwise, by scores that are within the limit"
            others = 0
    in_graph = rehearsal.manifest.reduction.mode == "fixed"
    if others and in_graph:
        note = "logits of other tokens say nothing: not compared"
    stages = []
    if others or in_graph or run.cost is not None:
        stages.append(Stage(f"{run.name}: kept tokens", others / 2 / kept, limits.swapped if in_graph else 0.0, note))
    stages += [Stage(f"{run.name}: {name}", error, limits.of(name)) for name, error in errors.items()]
    if others and in_graph:
        return None, stages
    stages.append(_logits(f"{run.name}: logits", answer.logits[:1], run.logits[:1], rehearsal, golden))
    stages.append(_logits(f"{run.name}: decoded logits", answer.logits[1:], run.logits[1:], rehearsal, golden))
    return answer, stages


def _together(answers: Sequence[tuple[Answer, GoldenRun]], rehearsal: Rehearsal, golden: Golden, limit: float) -> Stage:
    """Root mean square of the errors of all logits behind an answer's tokens, as a share of that of the logits."""
    places = logit_places(golden.request.seed, rehearsal.manifest)
    squares = []
    for answer, run in answers:
        for logits, expected in zip(answer.logits[1:], run.logits[1:], strict=True):
            values = np.array(expected.values)
            squares.append(float(np.square(logits[places] - values).mean() / np.square(values).mean()))
    return Stage(TOGETHER, float(np.sqrt(np.mean(squares))), limit)


def _repeated(rehearsal: Rehearsal, run: GoldenRun) -> tuple[Answer, dict[str, float]]:
    """The run with the golden's decisions, and how far the scores behind them are from the golden's."""
    followed: list[Followed] = []

    def follow(reduction: ReductionState) -> ReductionState:
        followed.append(Followed(reduction, run.calls))
        return followed[0]

    answer = rehearsal.answer(run.cost, run.similarity_lower_bound, following=follow)
    return answer, followed[0].errors


class Followed(ReductionState):
    """A reduction that decides by the golden's scores, whatever the device's are; `errors` says how far they are off.

    Args:
        inner: the reducer's own state, which decides.
        calls: of the golden.
    """

    def __init__(self, inner: ReductionState, calls: Sequence[GoldenCall]) -> None:
        super().__init__(inner.labels)
        self._inner = inner
        self._calls = calls
        self.errors: dict[str, float] = {}
        self.finished = inner.finished

    @property
    def wants_similarity(self) -> bool:
        """As the reducer does."""
        return self._inner.wants_similarity

    @property
    def wants_importance(self) -> bool:
        """As the reducer does."""
        return self._inner.wants_importance

    @property
    def wants_features(self) -> bool:
        """As the reducer does."""
        return self._inner.wants_features

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: FloatArray | None) -> Plan:
        golden = self._calls[self.call] if self.call < len(self._calls) else GoldenCall(self.call)
        read = Decision(
            similarity if self.wants_similarity else None, importance if self.wants_importance else None, _NO_PLAN
        )
        for name, error in _score_errors([read], [golden]).items():
            self.errors[name] = _largest(self.errors.get(name, 0.0), error)
        plan = self._inner.step(_vector(golden.similarity), _vector(golden.importance), features)
        self.finished = self._inner.finished
        return plan


def _vector(scores: Sequence[float]) -> NDArray[np.float32] | None:
    return np.array(scores, np.float32) if scores else None


_NO_PLAN = Plan("none", *(np.empty(0, np.int64) for _ in range(4)))


def _score_errors(decisions: Sequence[Decision], calls: Sequence[GoldenCall]) -> dict[str, float]:
    """Largest error of each kind of score: cosines as they are, importance as a share of the largest one."""
    errors: dict[str, float] = {}
    if len(decisions) != len(calls):
        return {"scores": float("inf")}
    for decision, call in zip(decisions, calls, strict=True):
        pairs = {
            "similarity": (decision.similarity, call.similarity),
            "importance": (decision.importance, call.importance),
        }
        for name, (ours, golden) in pairs.items():
            theirs = np.array(golden, np.float32)
            if ours is not None or golden:  # what only one of the two read is as wrong as can be
                error = float("inf") if ours is None else _score_error(name, ours, theirs)
                errors[name] = _largest(errors.get(name, 0.0), error)
    return errors


def _score_error(name: str, ours: NDArray[Any], theirs: NDArray[np.float32]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if name == "similarity":
        comparable = theirs > DISSIMILAR
        return float(np.abs(ours[comparable] - theirs[comparable]).max(initial=0))
    scale = float(np.abs(theirs).max(initial=0)) or 1.0
    return float(np.abs(ours - theirs).max(initial=0)) / scale


def _logits(
    what: str,
    ours: Sequence[NDArray[np.float32]],
    theirs: Sequence[GoldenValues],
    rehearsal: Rehearsal,
    golden: Golden,
) -> Stage:
    """The worst of some logits: at the drawn ids, in the largest magnitude, and in the golden's likeliest token."""
    places = logit_places(golden.request.seed, rehearsal.manifest)
    worst = 0.0
    for logits, expected in zip(ours, theirs, strict=True):
        behind = float(logits.max() - logits[expected.best]) / expected.largest / 2  # both may be off by the limit
        worst = _largest(worst, _error(logits, places, expected), behind)
    return Stage(what, worst, golden.limits.numbers)


def _error(array: NDArray[np.float32], places: NDArray[np.int64], golden: GoldenValues) -> float:
    flat = array.reshape(-1)
    values = float(np.abs(flat[places] - np.array(golden.values, np.float32)).max())
    largest = abs(float(np.abs(flat).max()) - golden.largest)
    return _largest(values, largest) / golden.largest


def _largest(*errors: float) -> float:
    """The largest; a NaN, whatever else there is, counts as such."""
    return float(np.max(errors))


def _differing(ours: Sequence[NDArray[np.int64]], theirs: Sequence[Sequence[int]]) -> int:
    """Tokens that only one of the two has, over all segments."""
    if len(ours) != len(theirs):
        return sum(map(len, theirs))
    return sum(np.setxor1d(mine, np.array(golden)).size for mine, golden in zip(ours, theirs, strict=True))


def _share(stage: Stage) -> float:
    return stage.error / stage.limit if stage.limit else 0.0


def facts_of(proof: Proof) -> Mapping[str, Any]:
    """A proof as plain values."""
    stages = [
        {"what": s.what, "error": s.error, "limit": s.limit, "right": s.right, "note": s.note} for s in proof.stages
    ]
    return {"right": proof.right, "text": proof.text, "seconds": round(proof.seconds, 3), "stages": stages}
