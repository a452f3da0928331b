"""One way of answering in a process of its own, so that its peak of memory is its own and no library is warm for it.

The film is read, preprocessed and laid out by the bundle's rules in every way, so that all of them answer the same
tokens. Knows no other way and no table; torch is imported by the ways of transformers alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from framefusion.errors import BackendError, CheckpointError, FrameFusionError
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.host import NoGraphs
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.stages import Stages
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.media.sources import Source
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.request import Generation, Request, Stopwatch
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import Prompt, Turn

TRANSFORMERS = "transformers"
DENSE = 1.0


@dataclass(frozen=True)
class Way:
    """How one process answers.

    Attributes:
        engine: TRANSFORMERS, or a backend of the bundle on the CPU.
        cost: 1 drops nothing; of transformers it is then the unmodified model.
    """

    engine: str
    cost: float

    @property
    def name(self) -> str:
        """For the table."""
        reduced = self.engine == TRANSFORMERS and self.cost < DENSE
        return f"{self.engine} + apply_framefusion" if reduced else self.engine


@dataclass(frozen=True)
class Task:
    """The question that every way answers, and with what."""

    checkpoint: Path
    bundle: Path
    turns: tuple[Turn, ...]
    files: tuple[Source, ...]
    fps: float | None
    max_frames: int | None
    max_new_tokens: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """One answer.

    Attributes:
        read: seconds until the prompt is there: film, preprocessing, layout.
        first_token: seconds from the question to the first token, `read` among them.
        decode: seconds of the tokens behind it.
        token_ids: of the answer.
        visual_tokens: of the prompt.
        visual_kept: of them, in the last layer.
        prompt_tokens: all of the prompt.
    """

    read: float
    first_token: float
    decode: float
    token_ids: tuple[int, ...]
    visual_tokens: int
    visual_kept: int
    prompt_tokens: int


Answer = Callable[[], Outcome]


def serve(connection: Connection, way: Way, task: Task) -> None:
    """Open the way, then answer once for each message: an `Outcome`, at last the peak of memory in bytes."""
    try:
        answer = opened(way, task)
        connection.send(None)
        while connection.recv() == "answer":
            connection.send(answer())
        connection.send(peak_bytes())
    except FrameFusionError as error:
        connection.send(error)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass


def opened(way: Way, task: Task) -> Answer:
    """What answers the question."""
    if way.engine == TRANSFORMERS:
        return TransformersWay(way, task).answer
    return BundleWay(way, task).answer


def peak_bytes() -> int | None:
    """The most memory that this process has had; what its parent had before it does not count.  None: not known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    (kilobytes,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kilobytes * 1024


class BundleWay:
    """A backend of the bundle, on the CPU."""

    def __init__(self, way: Way, task: Task) -> None:
        bundle = Bundle(task.bundle)
        self._pipeline = Pipeline(bundle, threads=task.threads, choice=choose(bundle, way.engine, "cpu"))
        self._request = Request(task.max_new_tokens, cost=way.cost, temperature=0.0)
        self._task = task
        self._sampling = bundle.manifest.sampling.overridden(task.fps, task.max_frames)

    def answer(self) -> Outcome:
        """Answer as `ff-run generate` does."""
        start = time.perf_counter()
        times: list[float] = []

        def watched() -> Any:
            steps = self._pipeline.stream(self._task.turns, self._task.files, self._request, sampling=self._sampling)
            for step in steps:
                if step.kind == "token":
                    times.append(time.perf_counter() - start)
                yield step

        answer = Generation.from_steps(watched())
        return Outcome(
            read=sum(answer.seconds[stage] for stage in ("video", "preprocess")),
            first_token=times[0],
            decode=times[-1] - times[0],
            token_ids=tuple(answer.token_ids),
            visual_tokens=answer.visual_tokens,
            visual_kept=answer.kept_tokens,
            prompt_tokens=answer.prompt_tokens,
        )


class Captured(Exception):
    """What a class of transformers was called with, in place of the call."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


class TransformersWay:
    """transformers' own class on the bundle's prompt, in the bundle's type; greedy, with its own cache."""

    def __init__(self, way: Way, task: Task) -> None:
        import torch
        from transformers.utils import logging

        from framefusion.export.checkpoints.checkpoint import Checkpoint
        from framefusion.export.families import family_of
        from framefusion.interface import apply_framefusion
        from framefusion.live.seams import CACHE_ARGUMENTS

        torch.set_num_threads(task.threads)
        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        bundle = Bundle(task.bundle)
        self._stages = Stages(bundle, NoGraphs(), MediaLimits())
        self._task = task
        self._torch = torch
        self._checkpoint = Checkpoint(task.checkpoint)
        self._family = family_of(self._checkpoint.config)
        self._model = self._load(getattr(torch, bundle.manifest.model.dtype))
        parameters = inspect.signature(self._model.forward).parameters
        self._cache = next(name for name in CACHE_ARGUMENTS if name in parameters)
        self._sampling = bundle.manifest.sampling.overridden(task.fps, task.max_frames)
        self._handle = None
        if way.cost < DENSE:
            reduction = bundle.manifest.reduction
            self._handle = apply_framefusion(
                self._model,
                way.cost,
                reduction.similarity_lower_bound,
                reduction.ratio_lower_bound,
                reducer=reduction.reducer,
                importance_rows=bundle.manifest.model.importance_rows,
                depth=reduction.depth,
            )

    def answer(self) -> Outcome:
        """Answer greedily: one forward of the prompt, one of each token behind it."""
        task = self._task
        start = time.perf_counter()
        # 1. The bundle's prompt, and what transformers' class wants of it.
        visuals = self._stages.read_visuals(task.turns, task.files, self._sampling, Stopwatch())
        prompt = self._stages.prompt(task.turns, visuals)
        inputs = self._inputs(prompt, visuals)
        read = time.perf_counter() - start
        # 2. The prompt in one forward, with the logits of its last token alone, as generate() does.
        with self._torch.inference_mode():
            out = self._model(**inputs, use_cache=True)
            tokens = [int(out.logits[0, -1].argmax())]
            first_token = time.perf_counter() - start
            left = prompt.num_visual if self._handle is None else self._handle.last[0].visual_after
            # 3. A token a forward, at the positions that the bundle gives it.
            ends = self._stages.manifest.generation.eos_token_ids or ()
            places = decode_positions(prompt.token_ids.size, prompt.rope_delta, task.max_new_tokens)
            while tokens[-1] not in ends and len(tokens) < task.max_new_tokens:
                place = places[:, len(tokens) - 1]
                step: dict[str, Any] = {"input_ids": self._torch.tensor([tokens[-1:]])}
                if "position_ids" in inputs:
                    step["position_ids"] = self._torch.from_numpy(place)[:, None, None]
                out = self._model(**step, **{self._cache: out[self._cache]}, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
        decode = time.perf_counter() - start - first_token
        return Outcome(read, first_token, decode, tuple(tokens), prompt.num_visual, left, prompt.token_ids.size)

    def _inputs(self, prompt: Prompt, visuals: Sequence[Any]) -> dict[str, Any]:
        """What the family's reference calls its class with.

        Raises:
            BackendError: transformers has no class that takes a whole prompt of this family.
        """
        from framefusion.export.families.family import load
        from framefusion.export.families.reference.transformers_call import TransformersCall

        class Capturing(TransformersCall):
            def model(self, name: str, **how: Any) -> Any:
                if how:  # a part of the format, or names of somebody else's
                    raise no_whole_class(self.checkpoint)

                def capture(**inputs: Any) -> None:
                    raise Captured(inputs)

                return capture

        call = Capturing(self._checkpoint, prompt, visuals)
        try:
            load(self._family.reference_logits)(call)
        except Captured as captured:
            return captured.inputs
        except AttributeError:  # it asks the class for its parts
            raise no_whole_class(self._checkpoint) from None
        raise no_whole_class(self._checkpoint)

    def _load(self, dtype: Any) -> Any:
        import transformers

        model_class: Any = getattr(transformers, self._family.reference, None) if self._family.reference else None
        if model_class is None or not self._family.reference_logits:
            raise no_whole_class(self._checkpoint)
        try:
            model = model_class.from_pretrained(self._checkpoint.folder, dtype=dtype, local_files_only=True)
        except (ImportError, OSError, ValueError) as error:  # quantized weights ask for packages of their own
            raise CheckpointError(f"transformers cannot load {self._checkpoint.folder}: {error}") from None
        return model.eval()


def no_whole_class(checkpoint: Any) -> BackendError:
    """The refusal of what transformers has no class for."""
    return BackendError(
        f"{checkpoint.config.get('model_type')}: transformers has no class that takes a whole prompt of this family, "
        "so there is nothing to compare with; `ff-run bench` measures a bundle alone"
    )
