"""The bundles whose answers are compared: the tiny trained model in every format, codes searched, read, or by films.

Knows no question that is asked of them: films that choose codes are none of those.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from framefusion.export.build import build
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.calibration.codes import calibrated_codes
from framefusion.export.eager.calibration.prompts import read_prompts
from framefusion.export.options import BuildOptions
from tests import quantized_checkpoints
from tools.accuracy import CHECKPOINT
from tools.bench.setting import open_bundle
from tools.tiny import clips

FLOATS = "float32"
FIRST_FILM = clips.HELD_OUT + 500_000  # seed of the calibration films
GROUP = 128  # of weights that share a scale in published checkpoints
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["visual"],
}  # fmt: skip


def built(work: Path, options: BuildOptions, name: str, checkpoint: Path = CHECKPOINT) -> Path:
    return open_bundle(checkpoint, work / name, options)


def read(work: Path, name: str, write: Callable[..., quantized_checkpoints.Tensors], setting: dict[str, Any]) -> Path:
    """A bundle of a checkpoint whose codes it takes as they are: rounded to the nearest, with no calibration."""
    folder = work / f"{name}-checkpoint"
    if not folder.exists():
        quantized_checkpoints.written(CHECKPOINT, folder, partial(write, group=GROUP), setting)
    return built(work, BuildOptions(), name, folder)


def calibrated(work: Path, weights: str, count: int, first: int = 0, with_questions: bool = True) -> Path:
    """A bundle whose codes films chose, which are none of those that are asked about.

    Args:
        work: gets it, and the films.
        weights: how they are stored.
        count: of the films.
        first: of the films.
        with_questions: with a question about each of them; else it is to be described.
    """
    folder = work / f"{weights.replace(':', '-')}-by-{count}-{'questions' if with_questions else 'films'}-from-{first}"
    if folder.exists():
        return folder
    films = []
    rows = []
    for index in range(first, first + count):
        films.append(work / f"film-{index}.mp4")
        kind = clips.KINDS[index % len(clips.KINDS)]
        scene = clips.scene_for(FIRST_FILM + index, kind)
        clips.write_mp4(films[-1], scene)
        question = clips.ask(scene, kind, np.random.default_rng((FIRST_FILM + index, 7)))
        rows.append({"video": films[-1].name, "question": question.text, "answer": question.answer})
    questions_file = work / f"questions-{count}-from-{first}.jsonl"
    questions_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = read_prompts([questions_file] if with_questions else films)
    checkpoint = Checkpoint(CHECKPOINT)
    with TemporaryDirectory(dir=work) as store:
        options, codes = calibrated_codes(checkpoint, BuildOptions(weights=weights), prompts, Path(store))
        return build(checkpoint, folder, options, codes=codes, verify=False).folder


def _by_films(work: Path, first: int) -> Path:
    return calibrated(work, "int4:128", 8, first, with_questions=False)


def _by_questions(work: Path, count: int, first: int) -> Path:
    return calibrated(work, "int4:128", count, first)


FORMATS: dict[str, Callable[[Path], Path]] = {
    FLOATS: lambda work: built(work, BuildOptions(), "fp32"),
    "float16": lambda work: built(work, BuildOptions(dtype="float16"), "float16"),
    "int8": lambda work: built(work, BuildOptions(weights="int8"), "int8"),
    "int4:32": lambda work: built(work, BuildOptions(weights="int4:32"), "int4-32"),
    "int4:32+zero": lambda work: built(work, BuildOptions(weights="int4:32+zero"), "int4-32+zero"),
    "int4:128": lambda work: built(work, BuildOptions(weights="int4:128"), "int4-128"),
    "int4:128+zero": lambda work: built(work, BuildOptions(weights="int4:128+zero"), "int4-128+zero"),
    "GPTQ, 128": lambda work: read(work, "gptq", quantized_checkpoints.gptq, GPTQ),
    "AWQ, 128": lambda work: read(work, "awq", quantized_checkpoints.awq, AWQ),
}
"""Name -> how its bundle is made in a folder."""
HEADS: dict[str, Callable[[Path], Path]] = {
    FLOATS: FORMATS[FLOATS],
    "int8+head4": lambda work: built(work, BuildOptions(weights="int8+head4"), "int8+head4"),
    "int4:32+head": lambda work: built(work, BuildOptions(weights="int4:32+head"), "int4_32+head"),
    "int4:32+head4": lambda work: built(work, BuildOptions(weights="int4:32+head4"), "int4_32+head4"),
}
"""The same with quantized heads."""
FLOAT8: dict[str, Callable[[Path], Path]] = {
    FLOATS: FORMATS[FLOATS],
    "fp8": lambda work: built(work, BuildOptions(weights="fp8", dialect="portable"), "fp8"),
    "fp8+activations": lambda work: built(
        work, BuildOptions(weights="fp8+activations", dialect="portable"), "fp8+activations"
    ),
}
"""Weights in floats of 8 bits, and activations too."""
BY_FILMS: dict[str, Callable[[Path], Path]] = {
    **{name: FORMATS[name] for name in (FLOATS, "int4:32", "int4:128")},
    **{f"int4:128 by 8 films, set {n}": partial(_by_films, first=8 * n) for n in range(2)},
    **{f"int4:128 by 8 questions, set {n}": partial(_by_questions, count=8, first=8 * n) for n in range(4)},
    **{f"int4:128 by 32 questions, set {n}": partial(_by_questions, count=32, first=32 * n) for n in range(2)},
    "int4:32 by 32 questions": lambda work: calibrated(work, "int4:32", 32),
}
"""Those whose codes calibration films chose, and the same without."""
