"""A bundle against the eager model: vision features, dense and reduced logits, kept tokens, sixteen decoded tokens.

The bundle runs in the runtime as it will for users. What is dense is compared with transformers' own model where it
fits in memory, what is reduced with this project's torch graph under the same pipeline. Errors are relative to the
largest magnitude of the reference; fp32 against fp32 in another order of sums differs by about 1e-6 a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from framefusion.errors import BundleError, CheckpointError
from framefusion.export.checkpoint import Checkpoint
from framefusion.export.engines.eager import EagerBackend
from framefusion.export.options import BuildOptions
from framefusion.export.plan import BuildPlan
from framefusion.runtime.bundle import Bundle, read_manifest
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.preprocess import Patches, patchify
from framefusion.runtime.prompt import Prompt, Turn, Visual
from framefusion.runtime.records import RecordError, from_json
from framefusion.runtime.stitching import Prefilled, Stopwatch, TokenRows

LIMIT = 1e-4
DECODED = 16
FRAMES, HEIGHT, WIDTH = 12, 112, 168
QUESTION = "What happens in this video?"
_MEMORY_SHARE = 0.4  # of the free memory that transformers' model in fp32 may take

Array = NDArray[np.float32]


def check_bundle(folder: Path, plan: BuildPlan) -> dict[str, Any]:
    """Compare and report.

    Returns:
        passed, reference, lines (each what, value, limit) and failures, as plain values for the manifest.
    """
    bundle = Bundle(folder)
    compiled = Pipeline(bundle)
    eager = Pipeline(bundle, EagerBackend(plan.eager_loaders()))
    case = Case(compiled, eager)
    lines = [_line("vision features", relative_error(case.compiled_visual, case.eager_visual))]
    reference = "none: the fixed mode has no dense path"
    if bundle.manifest.reduction.mode != "fixed":
        dense = case.compare(Request(max_new_tokens=DECODED, cost=_dense_cost(bundle)))
        lines += [_line(f"dense {what}", value) for what, value in dense.items()]
        reference = "framefusion.export in eager torch"
        logits = transformers_logits(plan, case.prompt, case.patches)
        if logits is not None:
            reference = f"transformers {plan.family.reference}"
            lines.append(_line("dense logits against transformers", relative_error(case.dense_logits, logits)))
    if bundle.manifest.reduction.mode != "none":
        reduced = case.compare(Request(max_new_tokens=DECODED))
        lines += [_line(f"reduced {what}", value) for what, value in reduced.items()]
    failures = [line for line in lines if not line["value"] <= line["limit"]]  # a NaN fails as well
    kept = {"prompt_tokens": int(case.prompt.token_ids.size), "kept_tokens": case.kept_tokens}
    return {"passed": not failures, "reference": reference, "lines": lines, "failures": failures} | kept


def check_again(folder: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Repeat the comparison for a bundle that was published, from the options in its manifest.

    Raises:
        BundleError: the manifest does not say how it was built.
        CheckpointError: the checkpoint is not the one that the bundle was built from.
    """
    manifest = read_manifest(folder)
    try:
        options = from_json(BuildOptions, manifest.options)
    except RecordError as error:
        raise BundleError(f"{folder} does not say how it was built ({error}): rebuild it") from None
    plan = BuildPlan(checkpoint, options)
    ours, theirs = asdict(manifest.model), asdict(plan.model_record())
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{checkpoint.folder} has {name} {theirs[name]}, the bundle was built from one with {value}: "
                "give the checkpoint that it was built from"
            )
    return check_bundle(folder, plan)


class Case:
    """One prompt with a drawn clip, prepared for the compiled and the eager pipeline."""

    def __init__(self, compiled: Pipeline, eager: Pipeline) -> None:
        self.compiled, self.eager = compiled, eager
        turns = [Turn("user", (Visual.VIDEO, QUESTION))]
        self.patches = patchify(draw_clip(), compiled.manifest.preprocessing)
        self.prompt: Prompt = compiled.prompt(turns, [self.patches])
        self.compiled_visual = compiled.encode_visual(self.patches)
        self.eager_visual = eager.encode_visual(self.patches)
        self.dense_logits = np.zeros(0, np.float32)
        self.kept_tokens = 0

    def compare(self, request: Request) -> dict[str, float]:
        """Prefill and decode both ways from the same rows; decoding follows the eager model's tokens."""
        rows = self.eager.embed(self.prompt, [self.eager_visual])
        ours, theirs = (self._prefill(pipeline, rows, request) for pipeline in (self.compiled, self.eager))
        self.dense_logits, self.kept_tokens = ours.logits.copy(), len(ours.kept[-1])
        differing = float(sum(np.setxor1d(a, b).size for a, b in zip(ours.kept, theirs.kept, strict=True)))
        if differing:
            return {"kept tokens": differing}  # the logits of other tokens say nothing
        errors = {"kept tokens": 0.0, "logits": relative_error(ours.logits, theirs.logits)}
        return errors | {"decoded logits": self._decode_error(ours, theirs)}

    def _prefill(self, pipeline: Pipeline, rows: TokenRows, request: Request) -> Prefilled:
        return pipeline.prefill(self.prompt, rows, request, Stopwatch())

    def _decode_error(self, ours: Prefilled, theirs: Prefilled) -> float:
        decoders = [p.stitcher.decoder(x) for p, x in ((self.compiled, ours), (self.eager, theirs))]
        length, worst, logits = self.prompt.token_ids.size, 0.0, theirs.logits
        places = length + self.prompt.rope_delta + np.arange(DECODED - 1)
        cos, sin = self.compiled.rope(np.broadcast_to(places, (3, DECODED - 1)))
        for step in range(DECODED - 1):
            token = np.array([logits.argmax()])
            row = self.eager.embedding(token)[0]
            mine, logits = (decoder.step(row, cos[step], sin[step]) for decoder in decoders)
            worst = max(worst, relative_error(mine, logits))
        return worst


def draw_clip() -> NDArray[np.uint8]:
    """A small film with what reduction looks for: a still background, a moving patch, a cut in the middle."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    still = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) % 256], -1)
    frames = np.stack([still if t < FRAMES // 2 else 255 - still for t in range(FRAMES)]).astype(np.uint8)
    for t, frame in enumerate(frames):
        frame[20:60, 8 * t : 8 * t + 40] = (200, 40, 40)
    noise = np.random.default_rng(0).integers(0, 6, frames.shape, np.uint8)
    clip: NDArray[np.uint8] = np.minimum(frames, 249) + noise
    return clip


def relative_error(ours: Array, reference: Array) -> float:
    """Largest difference over the largest magnitude of the reference."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def transformers_logits(plan: BuildPlan, prompt: Prompt, patches: Patches) -> Array | None:
    """Logits of the prompt's last token from transformers' own class; None where it does not fit in memory.

    Positions are passed explicitly: transformers 5 places text after a video by another rule (see positions.py).
    """
    parameters = sum(int(np.prod(plan.checkpoint.shape(key))) for key in plan.checkpoint.files)
    if plan.options.num_decoder_layer is not None or 4 * parameters > _MEMORY_SHARE * _available_memory():
        return None
    import transformers

    load: Callable[..., Any] = getattr(transformers, plan.family.reference).from_pretrained
    with _no_progress_bars():
        model = load(plan.checkpoint.folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True)
    visual = torch.from_numpy(prompt.labels >= 0)
    with torch.inference_mode():
        result = model.eval()(
            input_ids=torch.from_numpy(prompt.token_ids)[None],
            position_ids=torch.from_numpy(prompt.positions)[:, None],
            pixel_values_videos=torch.from_numpy(patches.values.reshape(-1, patches.values.shape[-1])),
            video_grid_thw=torch.tensor([list(patches.grid)]),
            mm_token_type_ids=torch.where(visual, 2, 0)[None].int(),
            logits_to_keep=1,
        )
    logits: Array = result.logits[0, -1].numpy()
    return logits


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its own bars over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(what: str, value: float) -> dict[str, Any]:
    return {"what": what, "value": value, "limit": 0.0 if what.endswith("kept tokens") else LIMIT}


def _dense_cost(bundle: Bundle) -> float | None:
    return 1.0 if bundle.manifest.reduction.mode == "adaptive" else None


def _available_memory() -> int:
    """Bytes that could be allocated now."""
    try:
        lines: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
