"""What `--calibrate` will read and take, before anything is built: films as the build reads them, rows, bytes, time.

Rows and bytes follow from the films' own tokens. Seconds follow from what one core did of each kind of product: two
layers of a 0.5B and four prompts of 613 tokens took 24 s of it. Of answers and of schedules they are unknown, and said
to be. Reads no weight; writes a tokenizer to a temporary folder, nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from framefusion.console.layout import counted
from framefusion.console.messages import in_bytes
from framefusion.console.progress import in_time
from framefusion.errors import BudgetError
from framefusion.export.check.verify import memory_of_check, memory_of_streamed
from framefusion.export.checkpoints.text.tokenizer_file import TOKENIZER, write_tokenizer
from framefusion.export.eager.calibration.held_out import LEAST, held_out
from framefusion.export.eager.calibration.prompts import (
    SHORTEN,
    CalibrationPrompt,
    answer_tokens,
    file_digests,
    films_of,
    named,
    read_prompts,
)
from framefusion.export.graphs.decoder import Segment
from framefusion.export.machine import TRACING_PROCESS
from framefusion.export.options import BuildOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.plan.weight_plan import parse_weights
from framefusion.export.quantization.blocks import BlockFormat
from framefusion.export.quantization.feedback import MOST
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.visuals.media_stages import MediaStages
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.memory import expected_lengths
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import check_length, layout_texts
from framefusion.runtime.text.prompt_layout import build_prompt
from framefusion.runtime.text.tokenizer import Tokenizer

PRODUCTS_A_SECOND = 90e9  # multiplications and additions of rows by a matrix, or by each other: 96e9 to 109e9 of a core
FED_BACK_A_SECOND = 5e9  # outputs times inputs squared: 3.2e9 with 4096 inputs, 7.3e9 with 896
FACTORED_A_SECOND = 12e9  # inputs cubed, of what is inverted: 13e9 to 19e9
SEARCHED_A_SECOND = 8e6  # weights in 4 bits whose scales one core searches
GRAM_BYTES = 32  # of each product of two inputs: it in fp32, ordered and inverted in fp64
ALLOCATED = 1.1  # times what is counted; 1.05 for two layers of a 0.5B
FLOAT = 4
SCHEDULE = "schedule"
CODES = "codes"
SCALES = "scales"


def purposes(options: BuildOptions) -> tuple[str, ...]:
    """What films are for in a build: a schedule, codes of weights, scales of KV caches.

    Raises:
        BudgetError: for nothing, or the options name no weights.
    """
    chooses = isinstance(parse_weights(options.weights), BlockFormat)
    found = [SCHEDULE] if options.reduction == "fixed" else []
    found += [CODES] if chooses else []
    found += [SCALES] if options.kv_cache_dtype is not None else []
    if not found:
        raise BudgetError(
            f"--calibrate sets the schedule of --reduction fixed, not of {options.reduction}, chooses the codes of "
            "--weights int8 or int4, and measures the scales of --kv-cache-dtype int8: give one of these"
        )
    return tuple(found)


def planned_options(options: BuildOptions, paths: Sequence[Path]) -> BuildOptions:
    """The options that a plan can be made of: no size knows a schedule, and one that films set prunes behind layer 0.

    Raises:
        BudgetError: films are for nothing.
    """
    if not paths:
        return options
    wanted = purposes(options)
    if SCHEDULE in wanted:
        options = replace(options, merge_shares=(), prune_layer=0)
    return replace(options, calibrated_by=()) if CODES in wanted else options


def calibration_needs(plan: BuildPlan, manifest: Manifest, paths: Sequence[Path]) -> dict[str, Any]:
    """What the films of a build put into it, as plain values: tokens, rows, bytes, seconds.

    Args:
        plan: of the build, by `planned_options`.
        manifest: of this plan.
        paths: films and files of questions.

    Raises:
        EvaluationError, VideoError: a file is none of a kind that is read, or damaged.
        PromptError: a prompt is longer than the bundle takes.
        BudgetError: there is no film where one is needed.
    """
    wanted = purposes(plan.options)
    purpose_of = {SCHEDULE: "a schedule is set", SCALES: "scales are measured"}
    films = [films_of(paths, purpose) for name, purpose in purpose_of.items() if name in wanted]
    prompts = read_prompts(paths if CODES in wanted else films[0])  # the others take no question
    lengths = _lengths(plan, manifest, prompts)
    rows = [
        {"files": [str(file) for file in prompt.files], "tokens": tokens, "visual": visual}
        for prompt, (tokens, visual) in zip(prompts, lengths, strict=True)
    ]
    needs = {"for": list(wanted), "prompts": rows, "memory": None, "disk": 0, "seconds": None}
    return needs | (
        _of_codes(plan, manifest, lengths, len(held_out(prompts, file_digests(prompts))))
        if CODES in wanted
        else {"memory": _eager_memory(plan)}
    )


class _Films(MediaStages):
    """Reads films as a bundle would, without a bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.limits = MediaLimits()
        self.overlaps = False


def _lengths(plan: BuildPlan, manifest: Manifest, prompts: Sequence[CalibrationPrompt]) -> list[tuple[int, int]]:
    """Tokens of each prompt, and those of films and pictures among them."""
    reader = _Films(manifest)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / TOKENIZER
        write_tokenizer(plan.checkpoint, place)
        tokenizer = Tokenizer.from_file(place, layout_texts(manifest.prompt, manifest.preprocessing))
    found = []
    for prompt in prompts:
        with named(prompt.name):
            visuals = reader.read_visuals(prompt.turns, prompt.files, manifest.sampling, Stopwatch())
            laid_out = build_prompt(manifest.prompt, tokenizer, prompt.turns, visuals, manifest.embedding.extra)
            check_length(laid_out, manifest.limits.max_input_len, SHORTEN)
        found.append((int(laid_out.token_ids.size), laid_out.num_visual))
    return found


def _of_codes(plan: BuildPlan, manifest: Manifest, lengths: Sequence[tuple[int, int]], held: int) -> dict[str, Any]:
    """Rows, bytes and seconds of choosing codes."""
    # 1. the model in floats with the policy that a schedule stands for, as it is run
    adaptive = replace(plan.options, reduction="adaptive", buckets=None, merge_shares=None, prune_layer=None)
    floats = (BuildPlan(plan.checkpoint, adaptive) if SCHEDULE in purposes(plan.options) else plan).in_floats
    assert floats is not None  # codes are chosen
    tokens, streamed = answer_tokens(floats)
    model = manifest.model
    reduced = replace(manifest, reduction=floats.reduction, segments=floats.segment_records)
    # 2. rows by segment: all of a prompt before the last one at most, what the cost leaves in it
    rows = [0] * len(reduced.segments)
    caches = 0
    for whole, visual in lengths:
        for index, length in enumerate(expected_lengths(reduced, whole, visual)):
            rows[index] += length + tokens
            layers = len(reduced.segments[index].attention_layers)
            caches += 2 * model.num_kv_heads * model.head_dim * FLOAT * layers * (length + tokens)
    # 3. operations of each matrix, and the largest half layer
    seconds = 0.0
    half = 0
    widest = 0
    codes = 0
    for graph, count in zip((graph for graph in floats.graphs if graph.role == "both"), rows, strict=True):
        module = graph.module()
        assert isinstance(module, Segment)
        for block in module.blocks:
            shapes = [tuple(p.shape) for p in block.parameters() if p.dim() == 2]
            half = max(half, FLOAT * sum(parameter.numel() for parameter in block.parameters()))
            for inputs, outputs in shapes:
                parts = [min(MOST, inputs - start) for start in range(0, inputs, MOST)]
                widest = max(widest, *parts)
                codes += inputs * outputs
                products = count * inputs * (2 * 2 * outputs + 2 * parts[0])  # twice through, and rows by each other
                seconds += products / PRODUCTS_A_SECOND + inputs * outputs / SEARCHED_A_SECOND
                seconds += sum(n * n * (outputs / FED_BACK_A_SECOND + n / FACTORED_A_SECOND) for n in parts)
    lanes = 1 + held / len(lengths)  # prompts that are held out go twice through the layers
    # 4. hidden states before and behind a half layer, an activation of one prompt, and what the films leave
    longest = max(whole for whole, _ in lengths) + tokens
    states = round(lanes * FLOAT * rows[0] * (2 * model.hidden_size + model.head_dim))
    activations = 3 * FLOAT * longest * (model.intermediate_size + model.hidden_size)
    logits = held * (tokens + 1) * FLOAT * model.vocab_size  # of the floats, to be compared with
    halves = half * (2 if held else 1)  # those of the search beside them
    memory = TRACING_PROCESS + halves + GRAM_BYTES * widest * widest
    memory += states + round(lanes * caches) + activations + logits
    answering = memory_of_streamed(floats) if streamed else memory_of_check(floats)
    return {
        "rows": {"first_layer": rows[0], "last_layer": rows[-1]},
        "answer": {"tokens": tokens, "streamed": streamed},
        "memory": round(ALLOCATED * max(memory, answering)),
        "disk": codes + codes * FLOAT // 16 + manifest.files["embedding.bin"].size,
        "held_out": held,
        "seconds": lanes * seconds + (codes / SEARCHED_A_SECOND if held else 0),
    }


def _eager_memory(plan: BuildPlan) -> int:
    """Bytes of the eager model, whole, that a schedule and scales are worked out with."""
    return memory_of_check(plan if plan.in_floats is None else plan.in_floats)


def calibration_lines(needs: Mapping[str, Any] | None) -> list[str]:
    """The same for people."""
    if needs is None:
        return []
    prompts = needs["prompts"]
    files = {file for row in prompts for file in row["files"]}
    purpose = {SCHEDULE: "the schedule", CODES: "codes of weights", SCALES: "scales of KV caches"}
    lines = [
        f"calibration: {', '.join(purpose[name] for name in needs['for'])} by {counted(len(prompts), 'prompt')} about "
        f"{counted(len(files), 'file')}, all read: {sum(row['tokens'] for row in prompts)} tokens, the longest prompt "
        f"has {max(row['tokens'] for row in prompts)}; memory about {in_bytes(needs['memory'])}"
    ]
    if "rows" in needs:
        rows = needs["rows"]
        answer = needs["answer"]
        reading = "reading all weights for each token, " if answer["streamed"] else ""
        held = needs["held_out"]
        count = str(held) if held else f"from {LEAST} films or questions on some"
        judged = f"held out to compare codes with the search's: {count}"
        lines.append(
            f"rows of all prompts: {rows['first_layer']} in the first layer at most, about "
            f"{rows['last_layer']} in the last one, answers of up to {answer['tokens']} tokens among them; "
            f"{in_bytes(needs['disk'])} on the disk meanwhile; about {in_time(needs['seconds'])} of one core, {reading}"
            f"the answers besides, whose time is unknown; {judged}"
        )
    else:
        lines.append("time of the films in the eager model: unknown")
    return lines
