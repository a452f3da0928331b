"""A bundle against the eager model: vision features, dense and reduced logits, kept tokens, sixteen decoded tokens.

The bundle runs in the runtime as it will for users. It is compared with this project's torch graphs under the same
pipeline, and they in turn, without a reduction, with transformers' own class (agreement.py); both are in fp32 whatever
the bundle's type is. One after the other is in memory: first the eager model, then transformers', then the bundle,
which decodes the tokens of the first. Where memory is short all three read their weights from the disk as they run.
Errors are relative to the largest magnitude of the reference; fp32 against fp32 in another order of sums differs by
about 1e-6 a layer.

In half precision a layer rounds ROUNDINGS times what is on its way (norm, projections, attention, projection, sum;
norm, gate and up, product, down, sum), each by u / sqrt(3) in the mean, u being half a unit (fp16: 2^-11), and
independent roundings add up like a random walk: the limit is four standard deviations, 4 u sqrt(ROUNDINGS / 3 layers).
Two tokens may be nearer to each other than that, so the bundle repeats the eager model's decisions and the scores
behind them are compared (replay.py); how many tokens it chooses otherwise by itself is a note. The static graph of the
fixed mode shows no scores: there the tokens themselves are compared, and up to MOST_SWAPPED of them may be others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from framefusion.export.check.agreement import AGAINST, Agreement, agreement_of, not_compared
from framefusion.export.check.observation import (
    DECODED,
    WHOLE,
    Array,
    Doing,
    EagerRun,
    Effort,
    Run,
    ignore,
    observe,
    run,
)
from framefusion.export.check.quantized import (
    CODED,
    EXACT,
    EXACT_TOKENS,
    ExactBackend,
    cost_note,
    cost_of_quantization,
    half_unit,
    rounding_of,
)
from framefusion.export.check.replay import Replayed
from framefusion.export.families.reference.transformers_call import (
    relative_error as relative_error,  # of the checks, too
)
from framefusion.export.machine import available_memory as available_memory  # of the checks that need it
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.writing.journal import SCRATCH
from framefusion.reduction.policy import ReductionState
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request, dense_pipeline, dense_request
from framefusion.runtime.proof.golden import MOST_SWAPPED, random_walk, rounding_limit

MOST = 0.5  # of a limit: an error of that size says nothing any more
KEPT = "kept tokens"
SWAPPED = "share of swapped tokens"  # what is compared has limits of its own


def check_bundle(
    folder: Path,
    plan: BuildPlan,
    tolerance: float | None = None,
    effort: Effort = WHOLE,
    doing: Doing = ignore,
    *,
    transformers: bool = True,
) -> dict[str, Any]:
    """Compare a bundle with the eager model and, if wanted, with transformers' class.

    Args:
        folder: the bundle.
        plan: what it was built from.
        tolerance: largest error of the bundle that passes, relative to the largest magnitude of the reference; None
            takes `default_tolerance`. Torch graphs and transformers' class are both in fp32: their limit is fixed.
        effort: how much is run, and whether weights stay on the disk.
        doing: called with what runs now.
        transformers: compare with its class, too.

    Returns:
        passed, tolerance, reference, lines (each what, value, limit), failures, notes and transformers (see
        `agreement.Agreement.facts`), as plain values for the manifest.

    Raises:
        CheckFailedError: transformers' class cannot read the checkpoint.
    """
    tolerance = default_tolerance(plan) if tolerance is None else tolerance
    bundle = Bundle(folder)
    # 1. the eager model in floats, whose tokens the others repeat
    floats = observe(bundle, plan.in_floats or plan, effort, doing)
    # 2. transformers' class, once the eager model's weights are gone from memory
    agreement = (
        agreement_in_floats(plan, floats, doing, scratch_place(folder))
        if transformers
        else not_compared("this bundle stands for another one")
    )
    # 3. the eager model with quantized weights, where the bundle has some
    theirs = floats
    cost: dict[str, Any] = {}
    if plan.in_floats is not None:
        theirs = observe(bundle, plan, effort, doing, tokens=floats.dense.tokens)
        cost = cost_of_quantization(theirs, floats, _codes_of(plan))
    # 4. the bundle, as it will run for users
    doing("the bundle in ONNX Runtime")
    comparison = Comparison(_compiled(bundle, effort), theirs, effort.tokens, exact=_is_exact(plan))
    errors = comparison.errors()
    if agreement.logits is not None and not cost:
        errors[f"dense logits {AGAINST}"] = relative_error(comparison.dense_logits, agreement.logits)
    # 5. every error beside its limit: tokens have limits that no type changes
    lines = _judged(errors, tolerance)
    notes = [*comparison.notes, *([cost_note(cost)] if cost else [])]
    if plan.rounds_activations and not effort.streamed:
        exact_lines, exact_notes = _exact(bundle, plan, theirs)
        lines += exact_lines
        notes += exact_notes
    kept = {"prompt_tokens": int(theirs.prompt.token_ids.size), "kept_tokens": comparison.kept_tokens}
    found = {"tolerance": tolerance, "lines": lines, "notes": notes} | kept | ({"quantization": cost} if cost else {})
    return with_agreement(found, agreement)


def agreement_in_floats(plan: BuildPlan, ours: EagerRun, doing: Doing = ignore, place: Path | None = None) -> Agreement:
    """The torch graphs against transformers' class: those with the checkpoint's floats, where a bundle has codes.

    Args:
        plan: of the bundle.
        ours: what the torch graphs of `plan.in_floats`, or of the plan where it has none, compute for a prompt.
        doing: called with what runs now.
        place: see `agreement_of`.

    Raises:
        CheckFailedError: the class cannot read the checkpoint.
    """
    return agreement_of(plan.in_floats or plan, ours, doing, place)


def scratch_place(folder: Path) -> Path:
    """Where a check may write what it removes again: a build's scratch folder, else beside the bundle."""
    scratch = folder / SCRATCH
    return scratch if scratch.is_dir() else folder.absolute().parent


def _is_exact(plan: BuildPlan) -> bool:
    """Whether the bundle computes in fp32, activations and caches included."""
    return plan.dtype == torch.float32 and not plan.rounds_activations and plan.kv_scales is None


def _codes_of(plan: BuildPlan) -> str:
    """What of a plan is in codes, and what it is compared with."""
    caches = "KV caches in int8 against floats"
    weights = "quantized weights against the checkpoint's"
    if plan.kv_scales is None:
        return weights
    return caches if plan.quantization is None else f"{weights}, and {caches}"


def _judged(errors: Mapping[str, float], tolerance: float) -> list[dict[str, Any]]:
    """Errors as lines of a report."""
    limits = {KEPT: 0.0, SWAPPED: MOST_SWAPPED}
    return [
        {"what": what, "value": value, "limit": next((limits[e] for e in limits if what.endswith(e)), tolerance)}
        for what, value in errors.items()
    ]


def _exact(bundle: Bundle, plan: BuildPlan, theirs: EagerRun) -> tuple[list[dict[str, Any]], list[str]]:
    """The bundle's graphs with activations in floats: lines of a report, and notes."""
    pipeline = Pipeline(bundle, ExactBackend(bundle.folder, manifest=bundle.manifest))
    exact = plan.dtype == torch.float32 and plan.kv_scales is None
    comparison = Comparison(pipeline, theirs, EXACT_TOKENS, exact=exact)
    errors = comparison.errors()
    limit = tolerance_of(plan.dtype, plan.config.num_layers, coded_caches=plan.kv_scales is not None)
    return _judged({EXACT + what: value for what, value in errors.items()}, limit), comparison.notes


def with_agreement(found: dict[str, Any], agreement: Agreement) -> dict[str, Any]:
    """A report and a comparison with transformers, judged together.

    Args:
        found: tolerance, lines and notes of a check so far.
        agreement: of the comparison.

    Returns:
        see `check_bundle`.
    """
    lines = [*found["lines"], *agreement.lines]
    failures = [line for line in lines if not line["value"] <= line["limit"]]  # a NaN fails as well
    verdict = {"passed": not failures, "reference": reference_of(agreement.facts), "failures": failures}
    return found | verdict | {
        "lines": lines, "notes": [*found["notes"], *agreement.notes], "transformers": agreement.facts,
    }  # fmt: skip


def reference_of(facts: Mapping[str, Any]) -> str:
    """What the dense path was compared with, as a report names it."""
    if not facts["compared"]:
        return "framefusion.export in eager torch"
    stood_in = f"; not transformers': {facts['stand_in']}" if facts["stand_in"] else ""
    return f"transformers {' and '.join(facts['classes'])}{stood_in}"


def _compiled(bundle: Bundle, effort: Effort) -> Pipeline:
    if effort.streamed:
        return Pipeline(bundle, OnnxRuntimeBackend(bundle.folder, mapped=True))
    return Pipeline(bundle, choice=choose(bundle, "onnxruntime", "cpu"))


def default_tolerance(plan: BuildPlan) -> float:
    """The limit of all errors of a build, relative to the largest magnitude of the reference: see the module."""
    coded = plan.kv_scales is not None
    rounded = rounding_of(plan.quantization, plan.dialect.name)
    return tolerance_of(plan.dtype, plan.config.num_layers, rounded=rounded, coded_caches=coded)


def tolerance_of(dtype: torch.dtype, layers: int, *, rounded: float = 0, coded_caches: bool = False) -> float:
    """The limit of relative errors behind this number of layers in a type: see the module.

    Args:
        dtype: of activations.
        layers: that errors add up in.
        rounded: see `quantized.rounding_of`.
        coded_caches: KV caches are in int8.
    """
    half = half_unit(dtype, rounded=rounded)
    limit = min(random_walk(half, layers), MOST) if half else rounding_limit("float32", layers)
    return max(limit, CODED) if coded_caches else limit


class Comparison:
    """A bundle's pipeline beside what the eager model computed for the same prompt.

    Args:
        compiled: the bundle, in any backend.
        theirs: of the eager model.
        tokens: of the answer; fewer than the eager model's are compared as far as they go.
        exact: both compute in fp32, activations included; None: where that is the bundle's type.
    """

    def __init__(self, compiled: Pipeline, theirs: EagerRun, tokens: int = DECODED, exact: bool | None = None) -> None:
        self.compiled = compiled
        self.theirs = theirs
        self.tokens = tokens
        self.exact = compiled.manifest.model.dtype == "float32" if exact is None else exact
        self.dense_logits = np.zeros(0, np.float32)
        self.kept_tokens = 0
        self.notes = list[str]()

    def errors(self) -> dict[str, float]:
        """Name of what is compared -> relative error, or tokens that differ; in the order of the computation."""
        found = {"vision features": relative_error(self._features(), self.theirs.features)}
        request = dense_request(self.compiled.manifest, Request(self.tokens))
        ours = self._run(dense_pipeline(self.compiled), request, self.theirs.dense)
        self.dense_logits = ours.logits
        self.kept_tokens = len(ours.kept[-1])
        dense = {KEPT: float(differing(ours, self.theirs.dense)), **run_errors(ours, self.theirs.dense)}
        found |= {f"dense {what}": value for what, value in dense.items()}
        if self.theirs.reduced is not None:
            found |= {f"reduced {what}": value for what, value in self._reduced(self.theirs.reduced).items()}
        return found

    def _features(self) -> Array:
        return self.compiled.backend.device.download(self.compiled.encode_visual(self.theirs.visuals[0]))

    def _run(self, pipeline: Pipeline, request: Request, theirs: Run, reduction: ReductionState | None = None) -> Run:
        return run(pipeline, self.theirs.prompt, self.theirs.rows, request, reduction, theirs.tokens)

    def _reduced(self, theirs: Run) -> dict[str, float]:
        ours = self._run(self.compiled, Request(self.tokens), theirs)
        self.kept_tokens = len(ours.kept[-1])
        others = differing(ours, theirs)
        kept = sum(map(len, theirs.kept))
        if self.theirs.decisions and not self.exact:
            replayed = Replayed(self.theirs.prompt.labels, self.theirs.decisions)
            ours = self._run(self.compiled, Request(self.tokens), theirs, replayed)
            self.notes.append(
                "reduced: the bundle repeated the eager model's decisions; by itself it keeps other tokens in "
                f"{others} of {kept} cases, all segments together"
            )
            return {**replayed.errors, **run_errors(ours, theirs)}
        found = {KEPT: float(others)} if self.exact else {SWAPPED: others / 2 / kept}
        return found if others else found | run_errors(ours, theirs)  # the logits of other tokens say nothing


def run_errors(ours: Run, theirs: Run) -> dict[str, float]:
    """Errors of the logits after the prompt and, at worst, after a decoded token."""
    assert 0 < len(ours.decoded) <= len(theirs.decoded)
    decoded = max(relative_error(*pair) for pair in zip(ours.decoded, theirs.decoded, strict=False))
    return {"logits": relative_error(ours.logits, theirs.logits), "decoded logits": decoded}


def differing(ours: Run, theirs: Run) -> int:
    """Tokens that only one of the two has, over all segments."""
    return sum(np.setxor1d(*pair).size for pair in zip(ours.kept, theirs.kept, strict=True))
