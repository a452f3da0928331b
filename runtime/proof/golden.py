"""golden.json: what the fp32 eager model makes of the canned request, carried by the bundle it belongs to.

Written by the build (framefusion/export/check/golden.py), read as a stranger's: bounded JSON into frozen records, every
number in a range, every list of the length that the others imply. Of logits and tower rows only drawn places are kept,
with the largest magnitude and the likeliest token of all: a device that is wrong is wrong everywhere.

Knows no backend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BundleError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.format.bundle_files import place, read_small
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.proof.canned import CannedPicture, CannedRequest, drawn_indices, text_ids
from framefusion.storage.bounded_json import JsonError, parse_json
from framefusion.storage.records import RecordError, Rule, Rules, from_json, to_json

GOLDEN = "golden.json"
VERSION = 1
MEASURED_VERSION = 2  # with limits that were measured
VERSIONS = (VERSION, MEASURED_VERSION)
MOST_BYTES = 1 << 21
MOST_TOKENS = 1024  # of the canned prompt
MOST_ANSWER = 64
MOST_PATCHES = 4096  # of the canned picture
MOST_KEPT = 4096  # numbers of one list
KEPT_LOGITS = 256
KEPT_ROWS = 512  # numbers of the tower's rows
EXACT = 1e-4  # limit of errors in fp32
ROUNDINGS = 10  # of a layer in a half type
MOST_SWAPPED = 0.05  # share of the kept tokens that a graph which decides by itself may choose otherwise in a half type
_HALF_UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half of the distance of two numbers near 1
NO_GOLDEN = "no golden: rebuild the bundle to have one"

_PLACES_OF_LOGITS = 16  # streams of the generator, beside those of canned.py
_PLACES_OF_ROWS = 17


@dataclass(frozen=True)
class GoldenValues:
    """Drawn places of one array, and what all of it amounts to."""

    values: tuple[float, ...]
    largest: float  # magnitude of all numbers, which errors are relative to
    best: int = 0  # index of the highest number


@dataclass(frozen=True)
class GoldenCall:
    """Scores that one call of the reduction read, [S] each; empty where it read none."""

    call: int
    similarity: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()


@dataclass(frozen=True)
class GoldenRun:
    """The request under one cost."""

    name: str  # "dense", "cost 0.5"
    cost: float | None  # None: all tokens are kept, or the bundle's graph decides
    kept: tuple[tuple[int, ...], ...]  # for each segment: places in the prompt
    calls: tuple[GoldenCall, ...]
    logits: tuple[GoldenValues, ...]  # behind the prompt, then behind each token of the answer
    stable: bool  # whether the same tokens are kept with noise on the rows: no decision is near its threshold
    similarity_lower_bound: float | None = None  # in place of the bundle's own


@dataclass(frozen=True)
class GoldenTower:
    """The vision tower's rows of the canned picture."""

    picture: CannedPicture
    shape: tuple[int, ...]  # [1+K, n, D]
    rows: GoldenValues


@dataclass(frozen=True)
class MeasuredLimits:
    """Largest errors of kernels that round activations to 8 bits, worked out from what such rounding did at the build.

    Attributes:
        tower: of its rows, which no such kernel computes.
        similarity, importance: of scores.
        pooled: of the logits behind the answer's tokens, of all runs together: root mean square of the errors as a
            share of that of the logits. Many numbers say more than the worst: where that one may be off by a tenth,
            this is two hundredths.
    """

    tower: float
    similarity: float
    importance: float
    pooled: float


@dataclass(frozen=True)
class GoldenLimits:
    """Largest errors that are rounding, as shares of the largest magnitude; why they are what they are: docs/checks.md.

    Attributes:
        numbers: of logits; and of scores and tower rows where nothing was measured.
        swapped: share of the kept tokens that a graph which decides by itself may choose otherwise.
        measured: of quantized weights; None in floats and in goldens of older builds.
    """

    numbers: float
    swapped: float
    measured: MeasuredLimits | None = None

    def of(self, what: str) -> float:
        """The limit of "tower", "similarity" or "importance"; that of logits is `numbers`."""
        limit: float = self.numbers if self.measured is None else getattr(self.measured, what)
        return limit


@dataclass(frozen=True)
class Golden:
    """All of it. `missing` says why there are no runs, where a build could not make them."""

    version: int
    reference: str
    limits: GoldenLimits
    request: CannedRequest
    runs: tuple[GoldenRun, ...]
    tower: GoldenTower | None
    missing: str = ""


_SIDE = Rule(1, 256)
_SCORES = Rule(-1e6, 1e6, items=MOST_TOKENS)
RULES: Rules = {
    Golden: {
        "version": Rule(1, 1 << 16), "reference": Rule(characters=500), "missing": Rule(characters=500),
        "runs": Rule(items=8),
    },
    GoldenLimits: {"numbers": Rule(0, 0.5, above=True), "swapped": Rule(0, 0.5)},
    MeasuredLimits: dict.fromkeys(("tower", "similarity", "importance", "pooled"), Rule(0, 0.5, above=True)),
    GoldenRun: {
        "name": Rule(characters=40), "cost": Rule(0, 1, above=True), "kept": Rule(0, MOST_TOKENS - 1, items=MOST_KEPT),
        "calls": Rule(items=256), "similarity_lower_bound": Rule(-1, 1), "logits": Rule(items=MOST_ANSWER + 1),
    },
    GoldenCall: {"call": Rule(0, 1023), "similarity": _SCORES, "importance": _SCORES},
    GoldenValues: {
        "values": Rule(-1e30, 1e30, items=MOST_KEPT), "largest": Rule(0, 1e30, above=True), "best": Rule(0, 1 << 24),
    },
    GoldenTower: {"shape": Rule(1, 1 << 20, items=3)},
    CannedPicture: {
        "height": _SIDE, "width": _SIDE, "pool": Rule(characters=40), "patches": Rule(1, MOST_PATCHES),
    },
    CannedRequest: {
        "seed": Rule(0, 1 << 16), "text_before": Rule(1, MOST_TOKENS), "frames": _SIDE, "height": _SIDE,
        "width": _SIDE, "text_behind": Rule(1, MOST_TOKENS), "answer": Rule(1, MOST_ANSWER),
        "scale": Rule(0, 1e6, above=True),
    },
}  # fmt: skip
"""What fields may hold beyond their types, as the manifest has it (framefusion/runtime/format/manifest_rules.py)."""


def read_golden(bundle: Bundle) -> Golden | None:
    """The golden of a bundle, checked against its manifest; None where it carries none, as those of older builds.

    Raises:
        BundleError: it is damaged or of another bundle.
    """
    if GOLDEN not in bundle.manifest.files:
        return None
    path = place(bundle.folder, GOLDEN)
    try:
        raw = parse_json(read_small(path, MOST_BYTES), most_bytes=MOST_BYTES)
        golden = from_json(Golden, raw, rules=RULES)
        if golden.version not in VERSIONS:
            raise RecordError(f"version {golden.version}, this package reads {VERSION} and {MEASURED_VERSION}")
        for problem in _problems(golden, bundle.manifest):
            raise RecordError(problem)
    except (OSError, JsonError, RecordError) as error:
        raise BundleError(f"{path} is no golden of this bundle ({error}): copy the bundle again or rebuild") from None
    return golden


def require_golden(bundle: Bundle) -> Golden:
    """The same, with runs in it.

    Raises:
        BundleError: there is none, a build could not make one, or it is damaged or of another bundle.
    """
    golden = read_golden(bundle)
    if golden is None:
        raise BundleError(f"{bundle.folder}: {NO_GOLDEN}")
    if not golden.runs:
        raise BundleError(f"{bundle.folder} has no golden: {golden.missing or 'the build made none'}")
    return golden


def rounding_limit(dtype: str, layers: int) -> float:
    """The largest error that is rounding, as a share of the largest magnitude: docs/checks.md says why.

    Args:
        dtype: in which layers compute.
        layers: of the model.
    """
    return EXACT if dtype == "float32" else random_walk(_HALF_UNITS[dtype], layers)


def random_walk(half_unit: float, layers: int) -> float:
    """Four standard deviations of what roundings by up to half a unit add up to behind a number of layers."""
    return 4 * half_unit * math.sqrt(ROUNDINGS / 3 * layers)


def golden_in(golden: Golden, dtype: str, layers: int) -> Golden:
    """A golden for a backend that computes in another type than the bundle's: its limits are that type's, if larger."""
    limits = golden.limits
    swapped = max(limits.swapped, 0.0 if dtype == "float32" else MOST_SWAPPED)
    if dtype == "float32":  # which what was measured holds for
        return replace(golden, limits=replace(limits, numbers=max(limits.numbers, EXACT), swapped=swapped))
    # a half type rounds everything, quantized weights' activations once more
    roundings = 1 if limits.measured is None else 2
    numbers = max(limits.numbers, min(roundings * rounding_limit(dtype, layers), 0.5))
    return replace(golden, limits=GoldenLimits(numbers, swapped))


def golden_to_json(golden: Golden) -> dict[str, Any]:
    """What golden.json holds: without measured limits as older packages read it, too."""
    plain: dict[str, Any] = to_json(golden)
    if golden.limits.measured is None:
        del plain["limits"]["measured"]
    return plain


def values_of(array: NDArray[np.float32], places: NDArray[np.int64]) -> GoldenValues:
    """What is kept of an array of any shape."""
    flat = array.reshape(-1)
    largest = float(np.abs(flat).max())
    return GoldenValues(tuple(short(value) for value in flat[places]), short(largest), int(flat.argmax()))


def short(value: float) -> float:
    """A number of fp32 with as many digits as tell it from its neighbours."""
    return float(f"{value:.9g}")


def logit_places(golden_seed: int, manifest: Manifest) -> NDArray[np.int64]:
    """Token ids whose logits are kept."""
    return drawn_indices(golden_seed, _PLACES_OF_LOGITS, KEPT_LOGITS, text_ids(manifest))


def row_places(golden_seed: int, size: int) -> NDArray[np.int64]:
    """Flat indices of the numbers that are kept of the tower's rows."""
    return drawn_indices(golden_seed, _PLACES_OF_ROWS, KEPT_ROWS, size)


def _problems(golden: Golden, manifest: Manifest) -> Iterator[str]:
    """What fields have to do with each other and with the manifest."""
    request = golden.request
    length = request.length
    if length > MOST_TOKENS:
        yield f"the request has {length} tokens, at most {MOST_TOKENS} are run"
    limits = manifest.limits
    if length > limits.max_input_len or length + request.answer > limits.max_kv_cache_capacity:
        yield (
            f"the request has {length} tokens and {request.answer} new ones, the bundle takes {limits.max_input_len} "
            f"and {limits.max_kv_cache_capacity} in all"
        )
    for run in golden.runs:
        yield from _run_problems(run, golden, manifest)
    if golden.tower is not None:
        yield from _tower_problems(golden.tower, manifest)


def _run_problems(run: GoldenRun, golden: Golden, manifest: Manifest) -> Iterator[str]:
    length = golden.request.length
    mode = manifest.reduction.mode
    if (run.cost is not None) and mode != "adaptive":
        yield f"{run.name}: the bundle's reduction is {mode}, a cost is not chosen"
    if len(run.kept) != len(manifest.segments):
        yield f"{run.name}: tokens of {len(run.kept)} segments, the bundle has {len(manifest.segments)}"
    for places in run.kept:
        if not places or places[-1] != length - 1 or any(a >= b for a, b in itertools.pairwise(places)):
            yield f"{run.name}: the kept tokens are not ascending places of {length} tokens, the last one among them"
    if len(run.logits) != golden.request.answer + 1:
        yield f"{run.name}: logits behind {len(run.logits)} tokens, expected {golden.request.answer + 1}"
    for logits in run.logits:
        if len(logits.values) != KEPT_LOGITS or logits.best >= manifest.model.vocab_size:
            yield f"{run.name}: {len(logits.values)} logits and token {logits.best}, expected {KEPT_LOGITS} known ones"
    numbers = [call.call for call in run.calls]
    if numbers != list(range(len(numbers))):
        yield f"{run.name}: calls {numbers[:8]} are not counted from 0"
    if any(len(scores) > length for call in run.calls for scores in (call.similarity, call.importance)):
        yield f"{run.name}: more scores than the request's {length} tokens"


def _tower_problems(tower: GoldenTower, manifest: Manifest) -> Iterator[str]:
    picture = tower.picture
    vision = manifest.vision
    if picture.height * picture.width > MOST_PATCHES:
        yield f"the picture has {picture.height} x {picture.width} patches, at most {MOST_PATCHES} are run"
        return
    if picture.patches * vision.patch_width > MOST_PATCHES << 12:
        yield f"the picture has {picture.patches} patches of {vision.patch_width} numbers, which is more than is run"
        return
    try:
        (tiles,) = picture.visual(0, manifest).tiles
        rows = vision.settings.call(tiles, vision.head_dim).rows
    except (ValueError, BundleError) as error:  # what a grid must divide by is the family's
        yield f"the picture does not fit the vision tower ({error})"
        return
    expected = (1 + vision.deepstack, rows, manifest.model.hidden_size)
    if tower.shape != expected:
        yield f"the tower's rows are {tower.shape}, of this picture they would be {expected}"
    if len(tower.rows.values) != KEPT_ROWS:
        yield f"{len(tower.rows.values)} numbers of the tower's rows, expected {KEPT_ROWS}"
