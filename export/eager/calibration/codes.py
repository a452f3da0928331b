"""Codes of a decoder's weights by films, layer by layer, and a judgement whether they are better than the search's.

    films, questions -> prompts with the answers of the model in floats behind them (prompts.py)
          -> three of four choose the codes, the fourth is held out (lockstep.py)
          -> the codes, or those of the search, whichever are nearer to the floats on what was held out (held_out.py)

Rows are those that the layers are given: of reduced prompts, and of answers over what the reduction left. The token of
a decode step sees what is kept of all before it. So its rows are those of a prefill in which it stands behind the
prompt and decides nothing: importance is that of the prompt's last token. The same films give the same codes. In memory
are the hidden states and caches of all prompts, one half layer in fp32 (two where prompts are held out), and X^T X of
one matrix (feedback.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from framefusion.errors import BudgetError, StorageError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.backend import EagerBackend
from framefusion.export.eager.calibration.held_out import Judgement, Repeated, held_out, judged
from framefusion.export.eager.calibration.lockstep import Choose, Lane, Lockstep, by_feedback
from framefusion.export.eager.calibration.prompts import (
    CalibrationPrompt,
    CalibrationRows,
    answered_rows,
    file_digests,
    tokens_digest,
)
from framefusion.export.eager.pipeline import eager_loaders, in_fp32, uncompiled_bundle
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.weight_plan import parse_weights
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.code_store import CodeStore
from framefusion.export.writing.journal import LOCK
from framefusion.export.writing.staging import lock
from framefusion.runtime.generation.prefill import prefill
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Stopwatch
from framefusion.storage import files


def calibrated_codes(
    checkpoint: Checkpoint,
    options: BuildOptions,
    prompts: Sequence[CalibrationPrompt],
    folder: Path,
    doing: Callable[[str], object] = lambda _: None,
    choose: Choose = by_feedback,
) -> tuple[BuildOptions, CodeStore]:
    """Choose the codes of a build's weights by films.

    Args:
        checkpoint: of floats.
        options: of the build, with `weights`.
        prompts: of the kind the bundle is for, see `prompts.read_prompts`.
        folder: empty; the codes stay in it, about a byte a weight.
        doing: called with what runs now.
        choose: see `Choose`.

    Returns:
        the options of the build and the codes, for `build`. Options name the films where their codes are taken; where
        those of the search are nearer to floats on prompts held out, codes are searched by the build itself, and the
        store says so.

    Raises:
        BudgetError: no film was given, or this build chooses no codes.
        VideoError: a film cannot be read.
        PromptError: a prompt is longer than the bundle takes.
    """
    if not prompts:
        raise BudgetError("0 films to calibrate with: give one or more films of the kind the bundle is for")
    if not isinstance(parse_weights(options.weights), BlockFormat):
        raise BudgetError(f"--calibrate chooses codes, and --weights {options.weights} has none to choose: give int4")
    # 1. the same model in floats, reduced as the bundle will be; a schedule, by the policy that it stands for
    adaptive = replace(options, reduction="adaptive", buckets=None, merge_shares=None, prune_layer=None)
    plan = BuildPlan(checkpoint, adaptive if options.reduction == "fixed" else options)
    floats = plan.in_floats
    assert floats is not None  # codes are chosen
    digests = file_digests(prompts)
    kept_back = held_out(prompts, digests)
    films = tuple(digests.values())
    store = CodeStore(folder, films, prompts=len(prompts))
    with TemporaryDirectory(dir=folder) as parts:
        bundle = in_fp32(uncompiled_bundle(floats, Path(parts) / "parts"), floats)
        # 2. what the prompts put into the decoder, and what it answers
        prepared = answered_rows(floats, bundle, prompts, doing, kept_back)
        # 3. all of them through all layers, quantized as they are reached
        lockstep = Lockstep(plan, floats, store, choose, doing)
        pipeline = Pipeline(bundle, EagerBackend(lockstep.loaders(eager_loaders(floats, streamed=True))))
        judgement = _run(lockstep, pipeline, floats, prepared, kept_back)
    store = replace(
        store, rows=lockstep.rows, answer_rows=sum(item.answer for item in prepared), texts=tokens_digest(prepared)
    )
    named = replace(options, calibrated_by=(*films, store.texts))
    if judgement is None:
        return named, store
    store = judgement.noted(store)
    return (named if store.taken else options), store


def _run(
    lockstep: Lockstep,
    pipeline: Pipeline,
    floats: BuildPlan,
    prepared: Sequence[CalibrationRows],
    kept_back: Sequence[int],
) -> Judgement | None:
    """Choose all codes; None where no prompt is held out."""
    # 1. lanes: prompts that codes are fit to, and each that is held out twice
    lanes = [
        Lane(partial(pipeline.prefill, item.prompt, item.rows, item.request, Stopwatch()), item.answer)
        for number, item in enumerate(prepared)
        if number not in kept_back
    ]
    first = len(lanes)
    items = [prepared[number] for number in kept_back]
    lanes += [Lane(_repeated(pipeline, item), item.answer, "chosen") for item in items]
    lanes += [Lane(_repeated(pipeline, item), item.answer, "searched") for item in items]
    # 2. all of them through all layers
    lockstep.run(lanes)
    if not items:
        return None
    # 3. which codes are nearer to floats
    states = [lockstep.left[lane] for lane in range(first, len(lanes))]
    return judged(floats, items, states[: len(items)], states[len(items) :])


def _repeated(pipeline: Pipeline, item: CalibrationRows) -> Callable[[], object]:
    """The prefill of a prompt and its answer by the decisions of the floats."""
    reduction = Repeated(item.prompt.labels, item.decisions, item.answer) if item.decisions else None
    return partial(prefill, pipeline.segments, item.rows, reduction, 1, Stopwatch())


@contextmanager
def folder_of_codes(output: Path) -> Iterator[Path]:
    """An empty folder beside a build's output for its codes, which no other build writes to; gone afterwards.

    Raises:
        StorageError: it cannot be written, or another build of the same output has it.
    """
    folder = output.absolute().with_name(f".{output.name}.calibration")
    codes = folder / "codes"
    try:
        # 1. hold it: what lies in it may be another build's
        if not files.is_real_folder(folder):
            files.remove_scratch(folder)  # a link
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder / LOCK)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error.strerror}): codes wait there for the build") from None
    with held:
        try:
            # 2. what a build that was killed has left goes first
            files.remove_scratch(codes)
            codes.mkdir()
            yield codes
        finally:
            files.remove_scratch(folder)
