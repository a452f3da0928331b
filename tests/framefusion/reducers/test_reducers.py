"""Each method against its definition in a few plain lines, and what the base class lets no method do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framefusion.errors import BudgetError, ReducerError
from framefusion.reducers import REDUCERS, load_reducer, reducer_facts, reducer_names
from framefusion.reducers.reducer import Reading, Reducer, ReductionRequest, Selection
from framefusion.reduction import tracks
from framefusion.reduction.plan import Mask, Plan, keep_all, merge_plan, prune_plan
from framefusion.reduction.policy import ReductionSettings, ReductionState
from framefusion.reduction.tracks import TEXT, FloatArray, IntArray
from tests.framefusion.reduction.test_policy_properties import labels_of_requests

LAYERS = 12
modest = settings(max_examples=40)


def film(frames: int, patches: int, between: int = 0) -> IntArray:
    body = [label for _ in range(frames) for label in [*range(patches), *[TEXT] * between]]
    return np.array([TEXT, TEXT, *body, TEXT, TEXT])


def asked(labels: IntArray, cost: float, seed: int = 0, depth: int = 7) -> ReductionRequest:
    return ReductionRequest(ReductionSettings(cost, 0.6, 0.1, LAYERS, depth), labels, seed)


def drive(
    state: ReductionState, rows: FloatArray, importance: FloatArray, calls: int = LAYERS
) -> tuple[IntArray, ReductionState]:
    """All calls over given rows; only what is wanted is handed over. Returns the places of the tokens that stay."""
    present = np.arange(len(rows))
    for _ in range(calls):
        similarity = tracks.track_similarity(rows[present], state.labels) if state.wants_similarity else None
        wanted = importance[present] if state.wants_importance else None
        present = present[state.step(similarity, wanted, rows[present] if state.wants_features else None).kept]
    return present, state


def drawn(labels: IntArray, seed: int, width: int = 6) -> tuple[FloatArray, FloatArray]:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(labels.size, width)).astype(np.float32)
    return rows, random.random(labels.size, dtype=np.float32)


def kept_by(name: str, request: ReductionRequest, seed: int = 0, rows: FloatArray | None = None) -> list[int]:
    drawn_rows, importance = drawn(request.labels, seed)
    places, _ = drive(load_reducer(name).start(request), drawn_rows if rows is None else rows, importance)
    return [int(i) for i in places if request.labels[i] != TEXT]


# --- Definitions ----------------------------------------------------------------------------------------------------


def random_by_definition(request: ReductionRequest, rows: FloatArray, importance: FloatArray) -> list[int]:
    numbers = np.random.default_rng(request.seed).random(request.labels.size)
    visual = [i for i, label in enumerate(request.labels) if label >= 0]
    return sorted(sorted(visual, key=lambda i: -numbers[i])[: round(request.settings.cost * len(visual))])


def frames_of(labels: IntArray) -> list[list[int]]:
    """Runs of visual tokens of one time: how often a token's label came before."""
    frames: list[list[int]] = []
    seen: dict[int, int] = {}
    last = None
    for i, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        if last is None or seen.get(label, 0) != last:
            frames.append([])
        last = seen.get(label, 0)
        seen[label] = last + 1
        frames[-1].append(i)
    return frames


def middles(size: int, count: int) -> list[int]:
    return [math.floor((part + 0.5) * size / count) for part in range(count)]


def uniform_by_definition(request: ReductionRequest, rows: FloatArray, importance: FloatArray) -> list[int]:
    frames = frames_of(request.labels)
    keep = round(request.settings.cost * sum(map(len, frames)))
    chosen: list[list[int]] = []
    while sum(map(len, chosen)) < keep:
        chosen = [frames[i] for i in middles(len(frames), len(chosen) + 1)]
    kept: list[int] = []
    for frame in chosen:
        whole = min(len(frame), keep - len(kept))
        kept += [frame[i] for i in middles(len(frame), whole)]
    return sorted(kept)


def cosine(a: FloatArray, b: FloatArray) -> float:
    return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a.astype(float)) / np.linalg.norm(b.astype(float)))


def evs_by_definition(request: ReductionRequest, rows: FloatArray, importance: FloatArray) -> list[int]:
    before: dict[int, int] = {}
    change: dict[int, float] = {}
    for i, label in enumerate(request.labels.tolist()):
        if label >= 0:
            change[i] = 1 - cosine(rows[i], rows[before[label]]) if label in before else math.inf
            before[label] = i
    keep = max(round(request.settings.cost * len(change)), len(before))
    return sorted(sorted(change, key=lambda i: -change[i])[:keep])


def fastv_by_definition(request: ReductionRequest, rows: FloatArray, importance: FloatArray) -> list[int]:
    visual = [i for i, label in enumerate(request.labels) if label >= 0]
    full = 2 if request.settings.cost * LAYERS > 2 else 1
    share = (request.settings.cost * LAYERS - full) / (LAYERS - full)
    return sorted(sorted(visual, key=lambda i: -importance[i])[: round(share * len(visual))])


def vidcom2_by_definition(request: ReductionRequest, rows: FloatArray, importance: FloatArray) -> list[int]:
    """Equations 3 to 10 for frames of one size; whole tokens by largest remainder."""
    frames = frames_of(request.labels)
    every = [i for frame in frames for i in frame]
    video = rows[every].mean(0)
    unique = [[-cosine(rows[i], video) for i in frame] for frame in frames]
    u = np.array([np.mean(own) for own in unique])
    sigma = np.exp((u - u.max()) / 0.01) / np.exp((u - u.max()) / 0.01).sum()
    keep = round(request.settings.cost * len(every))
    wanted = [min(keep / len(every) * (1 + s - 1 / len(frames)) * len(frames[0]), len(frames[0])) for s in sigma]
    counts = [math.floor(one) for one in wanted]
    while sum(counts) < keep:  # remainders that differ by less than a hundredth of a token tie
        open_frames = [t for t in range(len(frames)) if counts[t] < len(frames[t])]
        for t in sorted(open_frames, key=lambda t: round(counts[t] - wanted[t], 2))[: keep - sum(counts)]:
            counts[t] += 1
    kept: list[int] = []
    for frame, own, count in zip(frames, unique, counts, strict=True):
        center = rows[frame].mean(0)
        total = {i: value - cosine(rows[i], center) for i, value in zip(frame, own, strict=True)}
        kept += sorted(frame, key=lambda i: -total[i])[:count]
    return sorted(kept)


Definition = Callable[[ReductionRequest, FloatArray, FloatArray], list[int]]
DEFINITIONS: dict[str, Definition] = {
    "random": random_by_definition,
    "uniform": uniform_by_definition,
    "evs": evs_by_definition,
    "fastv": fastv_by_definition,
    "vidcom2": vidcom2_by_definition,
}


@pytest.mark.parametrize("cost", [0.9, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_method_does_what_its_definition_says(name: str, cost: float) -> None:
    for seed, shape in enumerate([(9, 8, 0), (16, 5, 2), (4, 30, 1)]):
        labels = film(*shape)
        rows, importance = drawn(labels, seed)
        request = asked(labels, cost, seed)
        assert kept_by(name, request, seed) == DEFINITIONS[name](request, rows, importance)


@pytest.mark.parametrize("name", ["uniform", "evs", "random", "fastv"])
def test_pictures_and_films_of_other_sizes(name: str) -> None:
    labels = np.array(
        [TEXT, *range(7), TEXT, *[7 + label for label in list(range(12)) * 5], TEXT, *range(20, 26), TEXT]
    )
    rows, importance = drawn(labels, 3)
    for cost in (0.7, 0.4, 0.15):
        request = asked(labels, cost)
        assert kept_by(name, request, 3) == DEFINITIONS[name](request, rows, importance)


def test_frames_are_counted_by_time() -> None:
    labels = film(3, 4, 1)
    assert tracks.place_in_track(labels).tolist() == [-1, -1, *[0] * 4, -1, *[1] * 4, -1, *[2] * 4, -1, -1, -1]
    assert tracks.frame_numbers(labels).tolist() == tracks.place_in_track(labels).tolist()
    two = np.array([0, 1, 0, 1, 2, 3, 2, 3])  # two films of two frames: the second begins a frame of its own
    assert tracks.frame_numbers(two).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tracks.frame_numbers(np.array([TEXT, TEXT])).tolist() == [-1, -1]
    assert tracks.place_in_track(np.empty(0, np.int64)).size == 0


@pytest.mark.parametrize("name", ["evs", "vidcom2", "framefusion"])
def test_still_pictures_tie_and_the_first_ones_stay(name: str) -> None:
    """Frames that are all equal, in the last bits not quite: which tokens stay must not hang on those."""
    labels, cost = film(8, 6), 0.4
    rows = np.tile(np.random.default_rng(0).normal(size=(6, 16)), (8, 1)).astype(np.float32)
    kept = []
    for seed in range(4):
        noise = 1 + np.random.default_rng(seed).uniform(-1e-7, 1e-7, (48, 1))
        whole = np.vstack([np.ones((2, 16)), rows * noise, np.ones((2, 16))]).astype(np.float32)
        kept.append(kept_by(name, asked(labels, cost), rows=whole))
    assert kept[0] == kept[1] == kept[2] == kept[3]
    if name == "evs":  # the first frame; of what never changed, the earliest
        assert kept[0] == list(range(2, 2 + 6)) + list(range(2 + 6, 2 + round(cost * 48)))


def test_evs_keeps_what_changed_and_vidcom2_the_odd_frame() -> None:
    labels = film(6, 10)
    rows = np.ones((labels.size, 8), np.float32)
    rows[2 + 37] = -1  # of frame 3
    assert 2 + 37 in kept_by("evs", asked(labels, 0.25), rows=rows)
    assert 2 + 47 in kept_by("evs", asked(labels, 0.25), rows=rows)  # it changes back
    odd = np.ones((labels.size, 8), np.float32) + 0.01 * drawn(labels, 0, 8)[0]
    odd[2 + 20 : 2 + 30] += np.random.default_rng(1).normal(size=(10, 8))
    frames = [(place - 2) // 10 for place in kept_by("vidcom2", asked(labels, 0.3), rows=odd)]
    assert max(set(frames), key=frames.count) == 2


@pytest.mark.parametrize("name", REDUCERS)
def test_text_alone_and_nothing_at_all(name: str) -> None:
    for labels in (np.full(5, TEXT), np.empty(0, np.int64), np.array([0])):  # the last token counts as text
        state = load_reducer(name).start(asked(labels, 0.3))
        assert state.finished
        assert state.step(None, None, None).kind == "none"
        assert state.history[0].outcome == ""


# --- One frame, and what a method cannot do as asked -----------------------------------------------------------------


def test_one_frame_is_a_named_outcome_of_evs() -> None:
    request = asked(film(1, 20), 0.3)
    places, state = drive(load_reducer("evs").start(request), *drawn(request.labels, 0))
    assert places.size == request.labels.size
    assert state.history[0].outcome == "evs keeps 20 of 20, the cost pays for 6: the first frame always stays"
    assert [record.outcome for record in state.history[1:]] == [""] * (LAYERS - 1)


def test_one_frame_is_thinned_by_the_others() -> None:
    for name in ("random", "uniform", "fastv", "vidcom2"):
        request = asked(film(1, 20), 0.5)
        counts = load_reducer(name).counts(request)
        assert counts is not None
        assert len(kept_by(name, request)) == next(iter(counts.values()))


def test_none_says_that_it_drops_nothing() -> None:
    request = asked(film(4, 5), 0.5)
    places, state = drive(load_reducer("none").start(request), *drawn(request.labels, 0))
    assert places.size == request.labels.size
    assert state.history[0].outcome == "none keeps 20 of 20, the cost pays for 10: this reducer drops nothing"


def test_fastv_takes_the_layer_that_the_cost_and_the_depth_allow() -> None:
    fastv, labels = load_reducer("fastv"), film(4, 5)
    assert fastv.calls(asked(labels, 0.3).settings) == (2,)
    assert fastv.calls(asked(labels, 2 / LAYERS).settings) == (1,)
    assert fastv.calls(asked(labels, 0.3, depth=0).settings) == (1,)


# --- What holds of every method -------------------------------------------------------------------------------------


@modest
@given(labels_of_requests(), st.floats(1 / LAYERS, 1), st.integers(0, 99), st.sampled_from(sorted(REDUCERS)))
def test_counts_are_as_declared_and_text_stays(labels: IntArray, cost: float, seed: int, name: str) -> None:
    request, reducer = asked(labels, cost, seed), load_reducer(name)
    places, state = drive(reducer.start(request), *drawn(request.labels, seed))
    assert set(np.flatnonzero(request.labels == TEXT)) <= set(places.tolist())
    assert (np.diff(places) > 0).all()
    counts = reducer.counts(request)
    assert (counts is not None) == reducer.static == (name != "framefusion")
    for call, expected in (counts or {}).items():
        assert state.history[call].visual_after == (expected if request.num_visual else 0)
    entering = [record.visual_after for record in state.history]
    over = any(record.outcome for record in state.history)
    assert over or abs(sum(entering) / LAYERS - cost * request.num_visual) <= 1  # every call rounds a token at most


@modest
@given(labels_of_requests(), st.floats(0.2, 0.9), st.sampled_from(sorted(REDUCERS)))
def test_only_declared_inputs_are_asked_at_declared_calls(labels: IntArray, cost: float, name: str) -> None:
    request, reducer = asked(labels, cost), load_reducer(name)
    state, rows = reducer.start(request), drawn(labels, 0)
    for call in range(LAYERS):
        wants = {what for what in ("similarity", "importance", "features") if getattr(state, f"wants_{what}")}
        assert wants <= reducer.inputs
        assert not wants or call in reducer.calls(request.settings)
        drive_one(state, rows)


def drive_one(state: ReductionState, drawn_rows: tuple[FloatArray, FloatArray]) -> None:
    rows, importance = (values[: state.labels.size] for values in drawn_rows)
    state.step(tracks.track_similarity(rows, state.labels), importance, rows if state.wants_features else None)


# --- What the base class refuses ------------------------------------------------------------------------------------


class Scripted(Reducer):
    """Does what it is told, at every call up to the last one told of."""

    name, paper, merges = "scripted", "no method", True
    inputs = frozenset({"similarity"})

    def __init__(self, *plans: Plan, wants: str = "", calls: tuple[int, ...] = (0, 1), outcome: str = "") -> None:
        self.plans, self.wants, self._calls, self.told = plans, wants, calls, outcome

    def calls(self, settings: ReductionSettings) -> tuple[int, ...]:
        return self._calls

    def _start(self, request: ReductionRequest) -> ReductionState:
        return ScriptedState(self, request.labels)


class ScriptedState(ReductionState):
    def __init__(self, script: Scripted, labels: IntArray) -> None:
        super().__init__(labels)
        self.script = script

    @property
    def wants_similarity(self) -> bool:
        return self.script.wants == "similarity"

    @property
    def wants_importance(self) -> bool:
        return self.script.wants == "importance"

    @property
    def wants_features(self) -> bool:
        return self.script.wants == "features"

    def _decide(self, similarity: Any, importance: Any, features: Any) -> Plan:
        plan = self.script.plans[self.call]
        self.outcome = self.script.told
        self.finished = self.call + 1 == len(self.script.plans)
        return plan


LABELS = film(3, 4)
EMPTY = np.empty(0, np.int64)
ALL = keep_all(LABELS)
MASK: Any = LABELS >= 0


def only(kept: list[int], kind: Any = "prune", **runs: Any) -> Plan:
    return Plan(kind, np.array(kept), runs.get("heads", EMPTY), runs.get("members", EMPTY), runs.get("starts", EMPTY))


REFUSED: dict[str, tuple[Scripted, str]] = {
    "text dropped": (
        Scripted(only([0, *range(2, 16)])),
        r"1 tokens of text dropped, the first at 1, expected all text",
    ),
    "the last token": (Scripted(only(list(range(15)))), "1 tokens of text dropped, the first at 15"),
    "out of order": (Scripted(only([1, 0, *range(2, 15)])), r"kept tokens \[.*\], expected ascending indices below 16"),
    "twice": (Scripted(only([0, 1, 2, 2, 14, 15])), "each once"),
    "beyond": (Scripted(only([0, 1, 2, 14, 15, 16])), "below 16"),
    "a mask": (Scripted(Plan("prune", MASK, EMPTY, EMPTY, EMPTY)), "type bool, expected one row of indices"),
    "a kind that lies": (Scripted(only([0, 1, 2, 14, 15], "none")), "a plan of kind none that drops 11 tokens"),
    "nothing called a prune": (Scripted(only(list(range(16)))), "a plan of kind prune that drops 0 tokens"),
    "silence": (
        Scripted(ALL, ALL),
        "found all 12 visual tokens kept at cost 0.5, expected fewer, or an out",
    ),
    "another call": (
        Scripted(ALL, only([0, 1, 2, 14, 15]), ALL, calls=(0, 3)),
        r"11 tokens dropped, expected none outside its calls",
    ),
    "undeclared input": (Scripted(ALL, wants="features"), "asks for features, expected only similarity"),
    "input elsewhere": (Scripted(ALL, wants="similarity", calls=(1,)), r"nothing outside its calls \[1\]"),
    "runs in a prune": (Scripted(only([0, 1, 2, 14, 15], members=np.array([2, 6]))), "runs in a plan of kind prune"),
    "a head that goes": (
        Scripted(only([0, 1, 3, 14, 15], "merge", heads=np.array([2]), members=np.array([2, 6]), starts=np.array([0]))),
        "runs that do not begin with a kept token alone",
    ),
    "a member that stays": (
        Scripted(
            only([0, 1, 2, 6, 14, 15], "merge", heads=np.array([2]), members=np.array([2, 6]), starts=np.array([0]))
        ),
        "heads kept, the others dropped",
    ),
    "runs without heads": (
        Scripted(only([0, 1, 2, 14, 15], "merge", members=np.array([2, 6]), starts=np.array([0]))),
        "1 runs for 0 heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_that_breaks_a_promise_is_refused_by_name(case: str) -> None:
    script, message = REFUSED[case]
    state = script.start(asked(LABELS, 0.5))
    with pytest.raises(ReducerError, match=f"^reducer scripted at call .*{message}"):
        drive(state, np.ones((16, 2), np.float32), np.ones(16, np.float32), calls=3)


def test_an_outcome_makes_doing_nothing_honest() -> None:
    state = Scripted(ALL, ALL, outcome="nothing alike").start(asked(LABELS, 0.5))
    state.step(None, None)
    state.step(None, None)
    assert [record.outcome for record in state.history] == ["nothing alike"] * 2


def test_a_merge_of_a_method_that_only_drops_is_refused() -> None:
    class Dropping(Scripted):
        merges = False

    merge = merge_plan(LABELS, np.isin(np.arange(16), [6]))
    assert Scripted(merge).start(asked(LABELS, 0.5)).step(None, None).kind == "merge"
    with pytest.raises(ReducerError, match="found a merge, expected tokens kept or dropped"):
        Dropping(merge).start(asked(LABELS, 0.5)).step(None, None)


class TooMany(Selection):
    name, paper = "too_many", "no method"

    def choose(self, reading: Reading) -> Mask:
        marked: Mask = reading.labels != TEXT
        marked[reading.keep : reading.keep + 3] = False
        return marked


class Late(Selection):
    name, paper = "late", "no method"

    def call(self, settings: ReductionSettings) -> int:
        return 6

    def choose(self, reading: Reading) -> Mask:
        raise AssertionError("never reached")


def test_a_count_that_is_missed_is_refused() -> None:
    with pytest.raises(ReducerError, match="9 of 12 visual tokens left, expected 6, as it declares"):
        TooMany().start(asked(LABELS, 0.5)).step(None, None)


def test_a_choice_that_is_no_mask_is_refused() -> None:
    class Indices(TooMany):
        def choose(self, reading: Reading) -> Any:
            return np.arange(reading.keep)

    with pytest.raises(ReducerError, match=r"choice of shape \(6,\) and type int64, expected a mask of \(16,\)"):
        Indices().start(asked(LABELS, 0.5)).step(None, None)


def test_an_end_before_the_declared_count_is_refused() -> None:
    class Early(Scripted):
        def counts(self, request: ReductionRequest) -> dict[int, int]:
            return {0: 12, 1: 6}

    with pytest.raises(ReducerError, match="found the end, with 12 visual tokens left, expected 6 after call 1"):
        Early(ALL).start(asked(LABELS, 0.5)).step(None, None)
    assert Early(ALL, prune_plan(LABELS, np.arange(16.0), 6)).start(asked(LABELS, 0.5)).step(None, None) is ALL


def test_a_cost_that_the_call_cannot_reach_is_refused_before_the_first_layer() -> None:
    with pytest.raises(BudgetError, match=r"the smallest cost is 0\.5 "):
        Late().start(asked(LABELS, 0.4))


@modest
@given(st.lists(st.integers(-1, 17), max_size=20), st.sampled_from(["none", "prune", "merge"]))
def test_no_plan_that_breaks_the_rules_gets_through(kept: list[int], kind: str) -> None:
    """Against the rules said once more: accepted exactly where all of them hold."""
    plan = Plan(kind, np.array(kept, np.int64), EMPTY, EMPTY, EMPTY)  # type: ignore[arg-type]
    inside = kept == sorted(set(kept)) and all(0 <= index < 16 for index in kept)
    text = inside and {0, 1, 14, 15} <= set(kept)
    honest = kind == ("none" if len(kept) == 16 else "prune")
    state = Scripted(plan, outcome="told").start(asked(LABELS, 0.5))
    if inside and text and honest:
        assert state.step(None, None).kept.tolist() == kept
    else:
        with pytest.raises(ReducerError):
            state.step(None, None)
        assert state.history == []


def test_missing_features_are_named() -> None:
    state = load_reducer("vidcom2").start(asked(LABELS, 0.5))
    with pytest.raises(ValueError, match="features are missing at call 0"):
        state.step(None, None)
    with pytest.raises(ValueError, match=r"features have shape \(3, 2\) at call 0; give \(16, D\)"):
        load_reducer("vidcom2").start(asked(LABELS, 0.5)).step(None, None, np.zeros((3, 2), np.float32))


def test_calls_that_a_method_needs_are_never_passed_over() -> None:
    state = load_reducer("framefusion").start(asked(LABELS, 0.5))
    with pytest.raises(ValueError, match="acts at call 0 or before"):
        state.pass_over(2)
    fastv = load_reducer("fastv").start(asked(LABELS, 0.5))
    fastv.pass_over(2)
    assert fastv.call == 2
    assert fastv.wants_importance
    assert prune_plan(LABELS, np.zeros(16), 3).kept.size == 4 + 3


# --- The table ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes importlib.metadata find packages whose reducers are these entry points."""

    def install(package: str, *lines: str, code: str = "") -> None:
        folder = tmp_path / f"{package}-1.2.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (folder / "entry_points.txt").write_text("\n".join(["[framefusion.reducers]", *lines]))
        (tmp_path / f"{package}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


MINE = "from framefusion.reducers.baselines import RandomTokens\nclass Mine(RandomTokens):\n    name = 'mine'\n"


def test_a_package_adds_a_reducer_by_an_entry_point(installed: Callable[..., None]) -> None:
    installed("ff_added", "mine = ff_added:Mine", code=MINE)
    assert reducer_names() == (*REDUCERS, "mine")
    assert load_reducer("mine").name == "mine"
    assert reducer_facts()[-1]["origin"] == "ff_added 1.2"
    assert kept_by("mine", asked(LABELS, 0.5)) == kept_by("random", asked(LABELS, 0.5))


BROKEN = {
    "does not import": ("mine = ff_x:Mine", "import no_such_module", "ModuleNotFoundError: No module named"),
    "lacks the class": ("mine = ff_x:Absent", MINE, "AttributeError"),
    "is no reducer": ("mine = ff_x:Mine", "class Mine: pass", "gives a Mine: name a subclass of framefusion.reducers"),
    "has another name": ("yours = ff_x:Mine", MINE, "calls itself 'mine': give class and entry point the same name"),
    "is unfinished": (
        "mine = ff_x:Mine",
        "from framefusion.reducers.reducer import Selection\nclass Mine(Selection):\n    name = 'mine'\n",
        "TypeError",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_named(case: str, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    line, code, message = BROKEN[case]
    package = f"ff_broken_{case.replace(' ', '_')}"
    installed(package, line.replace("ff_x", package), code=code)
    with pytest.raises(ReducerError, match=rf"of {package} 1\.2 .*{message}"):
        load_reducer(line.partition(" ")[0])


def test_two_packages_with_one_name_are_both_named(installed: Callable[..., None]) -> None:
    installed("ff_one", "mine = ff_one:Mine", code=MINE)
    installed("ff_two", "mine = ff_two:Mine", code=MINE)
    with pytest.raises(ReducerError, match=r"claimed by ff_one 1\.2 and ff_two 1\.2: uninstall all but one"):
        load_reducer("mine")


def test_a_name_of_the_box_cannot_be_taken(installed: Callable[..., None]) -> None:
    installed("ff_thief", "random = ff_thief:Mine", code=MINE)
    assert type(load_reducer("random")).__module__ == "framefusion.reducers.baselines"
    assert reducer_names() == tuple(REDUCERS)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ReducerError, match="'fast' is unknown; known are framefusion, none, random, uniform, fastv, evs"
    ):
        load_reducer("fast")
    assert ReducerError.exit_code == 19
