"""The flags of ff-export, as click takes them. No torch here.

A build has one for each field of BuildOptions, made by `_field` of the field's name and default. A flag that is not
given leaves the field to that class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from framefusion.console.help import option, sectioned
from framefusion.export.options import (
    CACHE_LIMIT,
    DEFAULT_DEPTH,
    DEFAULT_INPUT,
    DEFAULT_NEW_TOKENS,
    LIVE,
    MAX_BATCH_SIZE,
    MOST_ROWS,
    BuildOptions,
    Device,
    DType,
    KvCacheDType,
    TowerInput,
    Variant,
)
from framefusion.runtime.backends.table import engine_kinds
from framefusion.runtime.commands.flags import MOST_THREADS, CommaList

Command = TypeVar("Command", bound=Callable[..., Any])
GIGA = 10**9
FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)
JOBS = click.IntRange(min=1, max=MOST_THREADS)
LAYER = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


class _Finite(click.FloatRange):
    """Above zero and no infinity; nan, which no comparison of a range notices, is refused as well."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number above 0.", parameter, context)
        return number


FINITE = _Finite(min=0, min_open=True)
OF_FAMILY = "the model family's"
OF_CHECKPOINT = "the checkpoint's"


def _flag(
    name: str, kind: Any, text: str, default: str | None = None, short: str | None = None
) -> Callable[[Command], Command]:
    """An option without a default of its own; the help says `default`, which is where the value comes from then."""
    names = [name] if short is None else [name, short]
    return option(*names, type=kind, help=text if default is None else f"{text[:-1]}; default: {default}.")


_DEFAULTS = {field.name: field.default for field in fields(BuildOptions)}


def _field(name: str, kind: Any, text: str, default: str | None = None) -> Callable[[Command], Command]:
    """The option of a field of BuildOptions: flag and default are the field's.

    Args:
        name: of the field; the flag is `--name`, with hyphens.
        kind: how click reads it.
        text: a sentence for the help.
        default: where the value comes from without the flag, as the help says it: alone where the field has None,
            behind the field's own default where a backend has another one.
    """
    value = _DEFAULTS[name]
    parts = [str(value)] if value is not None else []
    parts += [default] if default is not None else []
    return _flag(f"--{name.replace('_', '-')}", kind, text, "; ".join(parts) or None)


BACKEND = _field(
    "backend",
    click.Choice(engine_kinds()),
    "Compile engines of this kind, too.",
    "none, ONNX Runtime runs the graphs",
)
ENGINE_KIND = option("--backend", type=click.Choice(engine_kinds()), help="Kind of engines to compile; must be given.")
TARGETS = (
    _field(
        "target_sm",
        CommaList(str),
        "Compute capabilities of the GPUs that engines are for, such as 86,89,120.",
        "all that the library builds for",
    ),
    _field("device", click.Choice(get_args(Device)), "What inductor compiles for, on a machine that has it."),
    _field(
        "variant",
        click.Choice(get_args(Variant)),
        "What TensorRT's networks are made of: layers for attention over a cache (from 11 on), or plain products.",
        "what the installed version has",
    ),
    option(
        "--max-autotune",
        is_flag=True,
        help="Let inductor time several kernels for each product on its GPU, which takes long; without: torch's own.",
    ),
    _field(
        "max_batch_size",
        click.IntRange(min=1, max=MOST_ROWS),
        "Requests that TensorRT's engines decode in one step at most; 1 compiles engines of one row.",
        str(MAX_BATCH_SIZE),
    ),
    option("--engines-only", is_flag=True, help="Leave out the graphs and weights that engines stand for."),
)
ENGINE_RESOURCES = (
    _flag("--jobs", JOBS, "Engines compiled at once.", "one for two cores, as far as memory allows"),
    _flag("--engine-cache", FOLDER, "Folder where engines are kept for other builds.", "the user's cache"),
    _flag("--engine-cache-limit", FINITE, "Gigabytes of engines that are kept.", f"{CACHE_LIMIT / GIGA:g}"),
)
REDUCTION = (
    _field(
        "reduction",
        click.Choice(("none", "fixed", "adaptive")),
        "How tokens are dropped: not at all, by a schedule that is built in, or by thresholds for each film anew.",
    ),
    _field("cost", float, "Share of the computation over visual tokens that is kept, above 0 up to 1."),
    _field("reducer", str, "What drops tokens (adaptive): a name that ff-run reducers lists."),
    _field("similarity_lower_bound", float, "Merge tokens that are at least this alike (adaptive).", OF_FAMILY),
    _field("ratio_lower_bound", float, "Stop merging after a layer where a smaller share of tokens merges (adaptive)."),
    _field("depth", LAYER, "Deepest layer that a reduction may follow (adaptive).", str(DEFAULT_DEPTH)),
    _field(
        "merge_shares",
        CommaList(float),
        "Share of the tokens merged at each of the first layers, such as 0.4,0.1 (fixed).",
        "none, then give --calibrate",
    ),
    _field("prune_layer", LAYER, "Layer that the prune follows (fixed).", "none, then give --calibrate"),
)
SIZES = (
    _field("max_input_len", COUNT, "Longest prompt in tokens.", f"{DEFAULT_INPUT}, or what the LLM was trained for"),
    _field(
        "max_kv_cache_capacity",
        COUNT,
        "Longest prompt and answer together, in tokens.",
        f"{DEFAULT_NEW_TOKENS} beyond the prompt",
    ),
    _field("max_text_len", COUNT, "Longest text of a prompt in tokens (fixed)."),
    _field(
        "dtype", click.Choice(get_args(DType)), "Type of weights, activations and caches.", "with --backend float16"
    ),
    _field(
        "weights",
        str,
        "Weights of the LLM's layers in int8 or int4, such as int4, int4:64 (weights of a block), int4+zero (with "
        "zero points), int4+head (the head in int8) or int4+head4 (in int4); or in fp8 for TensorRT-RTX, "
        "fp8+activations with activations in fp8 too.",
        "floats of --dtype, or as the checkpoint holds them",
    ),
    _field(
        "kv_cache_dtype",
        click.Choice(get_args(KvCacheDType)),
        "Type of the KV caches: codes by scales that the build measures on films (--calibrate).",
        "that of --dtype",
    ),
    _field("dialect", str, "How the graphs say attention: gqa (ONNX Runtime) or portable.", "with --backend portable"),
    _field(
        "buckets",
        CommaList(int),
        "Lengths in tokens that prefills are padded to, such as 512,2048; the gqa dialect needs none.",
        "some up to --max-input-len",
    ),
    _field("num_decoder_layer", COUNT, "Take only the first layers, for a smoke test.", "all"),
)
PICTURES = (
    _field("fps", POSITIVE, "Frames taken from each second of film.", OF_CHECKPOINT),
    _field("max_frames", COUNT, "Most frames taken from a film.", OF_CHECKPOINT),
    _field("min_pixels", COUNT, "Smallest frame that is shown, width times height.", OF_CHECKPOINT),
    _field("max_pixels", COUNT, "Largest frame that is shown, width times height.", OF_CHECKPOINT),
    _field("total_pixels", COUNT, "Most pixels of all frames together (Qwen2-VL, Qwen2.5-VL).", OF_CHECKPOINT),
    _field("max_slice_nums", COUNT, "Most slices that a frame is cut into (MiniCPM-V).", OF_FAMILY),
    _field("max_tiles", COUNT, "Most tiles that a picture is cut into (InternVL, NVILA, LLaVA).", OF_FAMILY),
    _field("frame_label", str, "Text before each frame, {} its number (InternVL).", OF_CHECKPOINT),
    _field(
        "mm_spatial_pool_mode",
        click.Choice(("bilinear", "average")),
        "How a frame's patches are pooled (LLaVA).",
        OF_CHECKPOINT,
    ),
    _field(
        "resize_rounding",
        click.Choice(("twice", "once")),
        "Round a resized picture to whole levels after each direction, or once at the end (Qwen-VL).",
        "twice",
    ),
    _field(
        "tower_input",
        click.Choice(get_args(TowerInput)),
        "Give the vision tower pictures in bytes, which its graph normalises, or in floats.",
    ),
)
IN_REDUCTION = "Token reduction"
IN_SIZES = "Sizes and graphs"
IN_PICTURES = "Films and pictures"
IN_ENGINES = "Engines"
IN_CHECK = "The check"
BUILD_OPTIONS = (
    *sectioned(IN_REDUCTION, *REDUCTION),
    *sectioned(IN_SIZES, *SIZES),
    *sectioned(IN_PICTURES, *PICTURES),
    *sectioned(IN_ENGINES, BACKEND, *TARGETS),
)
CHECKPOINT_REVISION = _flag("--revision", str, "Branch, tag or commit of a checkpoint on the hub.", "main")
BUNDLE_REVISION = _flag("--revision", str, "Branch, tag or commit of that id on the hub.", "the bundle's own")
TOLERANCE = _flag(
    "--tolerance", FINITE, "Largest error that passes, relative to the reference's maximum.", "by --dtype"
)
ACCEPTANCE = (
    _flag("--questions", FILE, "Questions that quantized weights are judged by: see docs/evaluation.md.", "none"),
    _flag(
        "--max-points-lost",
        _Finite(min=0),
        "Hundredths of the questions that quantized weights may answer wrongly where floats are right; more end the "
        "build.",
        "not compared",
    ),
)
EVAL_OPTIONS = (
    *sectioned(
        "What is asked",
        option("--questions", required=True, type=FILE, help="File with a JSON object a line: see docs/evaluation.md."),
        _flag("--limit", COUNT, "Ask this many of the questions, the first ones.", "all"),
        _flag("--fps", POSITIVE, "Frames taken from each second of film.", "the model's"),
        _flag("--max-frames", COUNT, "Most frames taken from a film.", "the model's"),
        _flag("--system", str, "System prompt, which comes before the question.", OF_FAMILY),
        option("--max-new-tokens", "-n", type=COUNT, default=16, show_default=True, help="Longest answer, in tokens."),
    ),
    *sectioned(
        "What is compared",
        _flag(
            "--reducer",
            CommaList(str),
            "What drops tokens, with commas; the first is compared with the others.",
            "the bundle's own",
        ),
        _flag(
            "--cost",
            CommaList(float),
            "Shares of the computation over visual tokens that are kept, with commas.",
            "1 and the bundle's",
        ),
        option(
            "--seed", type=LAYER, default=0, show_default=True, help="Number that fixes what reducers draw by chance."
        ),
        _flag(
            "--against",
            str,
            "Another bundle or checkpoint, or the file that --output wrote of it: points lost against it on the same "
            "questions, and what is kept otherwise.",
            "none",
        ),
    ),
    *sectioned(
        "Where it runs",
        _flag("--live", click.Choice(LIVE), "What runs a checkpoint.", f"{LIVE[0]} where its processor loads"),
        option(
            "--jobs", type=JOBS, default=1, show_default=True, help="Processes that answer, each with the whole model."
        ),
    ),
    *sectioned(
        "Output",
        _flag("--output", FILE, "Report and all answers; a run that has begun goes on from there.", "none", short="-o"),
    ),
)


def options_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add some options to a command, in this order."""

    def add(command: Command) -> Command:
        for add_option in reversed(options):
            command = add_option(command)
        return command

    return add


build_options = options_of(*BUILD_OPTIONS)
eval_options = options_of(*EVAL_OPTIONS)
