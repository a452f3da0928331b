"""The torch graphs of a build against transformers' own class, stage by stage, in fp32, whatever the model's size.

Both read the checkpoint for themselves and neither is ever whole in memory, so a fault of reading (another RoPE, stale
or missing tensors, a default filled in otherwise) shows in a model of any size. The prompt is run once with an answer
behind it. Compared are the rows that enter the first layer, of text and of visuals, what enters each further layer and
the last norm, and the logits of each token of the answer.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from framefusion.export.check.observation import Array, Doing, EagerRun, ignore
from framefusion.export.families.family import load
from framefusion.export.families.reading.configs import text_config
from framefusion.export.families.reference.quantized import (
    NoReferenceError,
    ReadableCheckpoint,
    readable,
    scratch_bytes,
)
from framefusion.export.families.reference.transformers_call import TransformersCall, answered, relative_error
from framefusion.export.plan.build_plan import BuildPlan

LIMIT = 1e-4
"""fp32 against fp32 in another order of sums differs by about 1e-6 a layer; a wrong detail by 1e-2 and more."""
AGAINST = "against transformers"


@dataclass
class Agreement:
    """What a comparison with transformers gave.

    Attributes:
        facts: plain values for the manifest: `compared`, and why not, or with what and how far.
        lines: each what, value, limit.
        notes: what is to be known beside them.
        logits: [V] of transformers behind the prompt; None where nothing was compared.
    """

    facts: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logits: Array | None = None


def not_compared(why: str) -> Agreement:
    """Nothing was compared with transformers, for this reason."""
    return Agreement({"compared": False, "why": why})


def agreement_of(plan: BuildPlan, ours: EagerRun, doing: Doing = ignore, place: Path | None = None) -> Agreement:
    """Run transformers' class over the same prompt and compare, stage by stage.

    Args:
        plan: of the build.
        ours: what its torch graphs compute for a prompt.
        doing: called with what runs now.
        place: folder on whose disk a quantized checkpoint may lie dequantized; None: that of temporary files.

    Raises:
        CheckFailedError: the class cannot read the checkpoint.
    """
    if not plan.family.reference_logits:
        return not_compared(f"transformers has no class for {plan.family.name}")
    try:
        with readable(plan.checkpoint, place, doing, whole=_is_whole(plan)) as reference:
            return _compared(plan, ours, doing, reference)
    except NoReferenceError as error:
        return not_compared(str(error))


def scratch_of_agreement(plan: BuildPlan) -> int:
    """Bytes of the disk that the comparison takes meanwhile, for a quantized checkpoint in floats."""
    return scratch_bytes(plan.checkpoint, whole=_is_whole(plan)) if plan.family.reference_logits else 0


def _is_whole(plan: BuildPlan) -> bool:
    """Whether one class of transformers reads the whole format, its quantization with it."""
    return plan.family.reference.isidentifier()


def _compared(plan: BuildPlan, ours: EagerRun, doing: Doing, reference: ReadableCheckpoint) -> Agreement:
    """The comparison, with the checkpoint that transformers' class is given."""
    import transformers

    family = plan.family
    start = time.perf_counter()
    answer = answer_of(ours)
    call = TransformersCall(
        reference.checkpoint,
        answered(ours.prompt, answer),
        ours.visuals,
        states=ours.states,
        final=ours.final,
        num_layers=plan.options.num_decoder_layer,
        keep=1 + len(answer),
        doing=doing,
        types=reference.types or plan.stored_types(),
        dequantizing=reference.by_itself,
    )
    doing("transformers")
    logits = call.run(load(family.reference_logits))
    stages = _stages(call, ours, logits)
    lines = [{"what": f"{what} {AGAINST}", "value": value, "limit": LIMIT} for what, value in stages.items()]
    facts = {
        "compared": True,
        "version": transformers.__version__,
        "classes": list(dict.fromkeys(call.names)),
        "stand_in": family.stand_in,
        "weights": reference.how,
        "layers": plan.config.num_layers,
        "of_layers": int(text_config(plan.checkpoint).get("num_hidden_layers") or plan.config.num_layers),
        "prompt_tokens": int(ours.prompt.token_ids.size),
        "answer_tokens": len(answer),
        "errors": stages,
        "errors_by_layer": call.errors,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Agreement(facts, lines, _notes(call, stages), logits[0])


def _stages(call: TransformersCall, ours: EagerRun, logits: Array) -> dict[str, float]:
    """Stage -> error, in the order of the computation."""
    stages = dict(call.row_errors)
    stages[f"what enters {len(call.states)} layers and the last norm"] = _worst(call.errors)
    stages["logits"] = relative_error(ours.dense.logits, logits[0])
    decoded = zip(ours.dense.decoded, logits[1:], strict=False)  # the answer may have been cut
    errors = [relative_error(*pair) for pair in decoded]
    return stages | ({"decoded logits": _worst(errors)} if errors else {})


def answer_of(ours: EagerRun) -> list[int]:
    """The tokens that were decoded, up to a placeholder of a visual row, for which a class would look for a row."""
    pads = set(ours.prompt.token_ids[ours.prompt.row_places].tolist())
    return list(itertools.takewhile(lambda token: token not in pads, ours.dense.tokens))


def _worst(errors: list[float]) -> float:
    """The largest error; NaN where any of them is."""
    return float(np.max(errors)) if errors else float("nan")


def _notes(call: TransformersCall, stages: dict[str, float]) -> list[str]:
    notes = []
    if call.missing:
        shown = ", ".join(call.missing[:3]) + (", ..." if len(call.missing) > 3 else "")
        notes.append(f"transformers found no {shown} in the checkpoint")
    if call.left:
        shown = ", ".join(call.left[:3]) + (", ..." if len(call.left) > 3 else "")
        notes.append(f"transformers took {len(call.left)} tensors of the checkpoint for none of its model's: {shown}")
    off = next((index for index, error in enumerate(call.errors) if not error <= LIMIT), None)
    if off is not None:
        place = f"what enters layer {off}" if off < len(call.states) else "what enters the last norm"
        notes.append(
            f"the first stage where this build and transformers differ is {place}: they read the checkpoint "
            "differently; compare config.json, the files of weights and what came before that stage"
        )
    elif not all(error <= LIMIT for error in stages.values()):
        notes.append("this build and transformers agree up to the last norm and differ in the vocabulary projection")
    return notes
