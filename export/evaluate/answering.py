"""What answers the questions of an evaluation: a bundle, a checkpoint in eager torch, or a live model of transformers.

Each reads and encodes what a question shows once, and then answers it under every condition. Decoding is greedy.
Scores nothing and writes nothing; the live model is in live_answering.py.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from framefusion.export.evaluate.questions import Question
from framefusion.export.options import LIVE
from framefusion.reduction.policy import CallRecord
from framefusion.runtime.format.bundle_files import sha256_of
from framefusion.runtime.format.manifest_file import MANIFEST, read_manifest
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.pipeline import Generation, Pipeline, Request, dense_pipeline

ONNXRUNTIME = "onnxruntime"
TRANSFORMERS, EAGER = LIVE
DENSE = "none"
"""The reducer that drops nothing: it has no cost but 1."""


@dataclass(frozen=True)
class Condition:
    """How a question is answered: by which reducer, at which cost."""

    reducer: str
    cost: float

    def __str__(self) -> str:
        return f"{self.reducer} at cost {self.cost:g}"


@dataclass(frozen=True)
class Answer:
    """One answer under one condition, and what it cost."""

    text: str
    reached: float  # share of the computation over visual tokens that was kept
    visual_tokens: int  # of the prompt
    visual_left: int  # of them in the last layer
    outcomes: tuple[str, ...] = ()  # what the reducer could not do as asked
    kept: str = ""  # a bit for each visual token of the prompt, whether the last layer holds it, in hex; "": not known


@dataclass(frozen=True)
class Setup:
    """How to open what answers; another process can, too.

    Attributes:
        model: a bundle's folder, a checkpoint's, or an id on the hub.
        revision: of an id on the hub.
        live: one of LIVE for a checkpoint; None takes transformers where its processor can be loaded.
        max_new_tokens: of an answer.
        fps, max_frames: of the sampling of frames; None leaves them to the bundle or the checkpoint.
        system: system prompt; None leaves it to the family.
        seed: of reducers that draw.
        threads: of one process; 0 takes the physical cores it has.
    """

    model: str
    revision: str | None = None
    live: str | None = None
    max_new_tokens: int = 16
    fps: float | None = None
    max_frames: int | None = None
    system: str | None = None
    seed: int = 0
    threads: int = 0

    @property
    def is_bundle(self) -> bool:
        """Whether the model is a bundle."""
        return (Path(self.model) / MANIFEST).is_file()

    def seed_of(self, question: Question) -> int:
        """For the draws of a question: the same whichever other questions are in the file."""
        return (int(question.key, 16) + self.seed) % 2**32

    def sampling(self, default: FrameSampling) -> FrameSampling:
        """A model's sampling of frames with this setup's fps and max_frames in place of its."""
        return default.overridden(self.fps, self.max_frames)


class Answerer(ABC):
    """A model that is open.

    Attributes:
        setup: how it was opened; its length of answers may be changed between two questions.
        engine: what runs it, with versions; answers of another engine are another evaluation's.
        note: why it is this engine, where no setup named it.
    """

    setup: Setup
    engine: str
    note: str | None = None

    @abstractmethod
    def answers(self, question: Question, conditions: Sequence[Condition]) -> Iterator[Answer]:
        """An answer to the question under each condition, in their order.

        Raises:
            FrameFusionError: media that cannot be read, or a condition that cannot be met; no answer comes before it.
        """


def engine_of(name: str) -> str:
    """An engine's name with the versions that its numbers depend on: "transformers (transformers 5.1, torch 2.9)"."""
    from importlib.metadata import version

    packages = {ONNXRUNTIME: ("onnxruntime",), EAGER: ("torch",), TRANSFORMERS: ("transformers", "torch")}[name]
    return f"{name} ({', '.join(f'{package} {version(package)}' for package in packages)})"


def outcomes_of(calls: Sequence[CallRecord]) -> tuple[str, ...]:
    """What the calls of a reduction could not do as asked, each outcome once."""
    return tuple(dict.fromkeys(call.outcome for call in calls if call.outcome))


def kept_bits(generation: Generation) -> str:
    """See `Answer.kept`."""
    bits = np.zeros(generation.visual_tokens, np.uint8)
    bits[generation.kept(-1, visual=True)] = 1
    return np.packbits(bits).tobytes().hex()


class PipelineAnswerer(Answerer):
    """The runtime's pipeline, over compiled graphs or those of eager torch: our own prompt and preprocessing."""

    def __init__(self, pipeline: Pipeline, setup: Setup, engine: str) -> None:
        bundle = pipeline.bundle
        sampling = setup.sampling(pipeline.manifest.sampling)
        if sampling != pipeline.manifest.sampling:
            pipeline = Pipeline(bundle.with_manifest(sampling=sampling), pipeline.backend)
        self.pipeline = pipeline
        self.setup = setup
        self.engine = engine
        self.dense = dense_pipeline(pipeline)
        self.parts: tempfile.TemporaryDirectory[str] | None = None

    def answers(self, question: Question, conditions: Sequence[Condition]) -> Iterator[Answer]:
        """See `Answerer.answers`."""
        # 1. Films are decoded and encoded once: conditions differ behind the tower alone.
        prompt, rows = self.pipeline.read(question.turns(self.setup.system), question.files)
        text_tokens = prompt.token_ids.size - prompt.num_visual
        # 2. What cannot be met is refused before the first prefill, which may take minutes.
        runs = [self._run_of(question, condition) for condition in conditions]
        for pipeline, request in runs:
            pipeline.reduction(prompt, request)
        # 3. One prefill a condition; at cost 1 every reducer has nothing to do, so one answer serves all of them.
        dense: Generation | None = None
        for (pipeline, request), condition in zip(runs, conditions, strict=True):
            if condition.cost == 1.0 and dense is not None:
                generation = dense
            else:
                generation = pipeline.answer(prompt, rows, request)
            if condition.cost == 1.0:
                dense = generation
            left = generation.kv_lengths[-1] - text_tokens
            outcomes = outcomes_of(generation.reduction)
            kept = kept_bits(generation)
            yield Answer(generation.text, generation.cost, generation.visual_tokens, left, outcomes, kept)

    def _run_of(self, question: Question, condition: Condition) -> tuple[Pipeline, Request]:
        """The pipeline that answers under a condition, and what it is to do."""
        greedy = replace(self.pipeline.manifest.generation, do_sample=False)
        most = self.setup.max_new_tokens
        seed = self.setup.seed_of(question)
        if condition.cost == 1.0 and self.dense.manifest.reduction.mode == "none":
            return self.dense, Request(most, generation=greedy)
        return self.pipeline, Request(most, condition.cost, generation=greedy, seed=seed, reducer=condition.reducer)


def fingerprint(setup: Setup) -> str:
    """What tells a model from any other: a bundle by its manifest, which hashes all its files; a checkpoint by names,
    sizes and times of its files, as reading all of them would take longer than many an evaluation.
    """
    if setup.is_bundle:
        return sha256_of(Path(setup.model) / MANIFEST)
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.plan.build_plan import identity_of
    from framefusion.export.writing.staging import identity

    return identity(identity_of(Checkpoint.named(setup.model, setup.revision)))


def default_condition(setup: Setup) -> Condition:
    """Reducer and cost of a bundle's manifest; for a checkpoint those of a build without flags."""
    if setup.is_bundle:
        record = read_manifest(Path(setup.model)).reduction
        return Condition(DENSE if record.mode == "none" else record.reducer, record.cost)
    from framefusion.export.options import BuildOptions

    return Condition(BuildOptions().reducer, BuildOptions().cost)
