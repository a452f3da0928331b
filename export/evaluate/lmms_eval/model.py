"""The model that lmms-eval drives: one request at a time to whatever `open_answerer` opens.

Decoding is greedy and a request that cannot be met ends the run: an answer that is missing would count as a wrong one.
Scores nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from framefusion.errors import EvaluationError, FrameFusionError
from framefusion.export.evaluate.answering import DENSE, Answer, Answerer, Condition, Setup, default_condition
from framefusion.export.evaluate.lmms_eval.requests import Decoding, TaskQuestion, decoding_of, question_of
from framefusion.export.evaluate.open import open_answerer

MAX_NEW_TOKENS = 128
"""Of a task that does not say."""


class FrameFusionModel(lmms):  # type: ignore[misc]  # lmms-eval brings no types
    """A bundle, or a checkpoint under `apply_framefusion`, by `--model_args`.

    Args:
        pretrained: a bundle's folder, a checkpoint's, or an id on the hub.
        cost: share of the computation over visual tokens that is kept; by default the model's own.
        reducer: a name of framefusion.reducers; by default the model's own.
        live: how a checkpoint is run, see `ff-export eval --live`; refused for a bundle.
        revision: of an id on the hub.
        fps, max_frames: of the sampling of frames; by default the model's own.
        max_new_tokens: where a task does not say.
        system_prompt: in place of the task's or the family's.
        seed: of reducers that draw.
        threads: 0 takes the physical cores it has.
        device, dtype: of a live checkpoint; by default the CPU and float32. `--device` says the same.
        batch_size, max_batch_size: what lmms-eval gives to every model; requests are answered one by one.

    Raises:
        EvaluationError: an argument that is unknown or has no meaning here.
        FrameFusionError: a model that cannot be opened, or a reducer or cost that it does not have.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        cost: float | None = None,
        reducer: str | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        system_prompt: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        known = {"live", "revision", "fps", "max_frames", "seed", "threads"}
        unknown = sorted(set(options) - known)
        if unknown:
            names = sorted(
                known | {"pretrained", "cost", "reducer", "max_new_tokens", "system_prompt", "device", "dtype"}
            )
            raise EvaluationError(
                f"model_args {unknown[0]}={options[unknown[0]]!r} is unknown: known are {', '.join(names)}"
            )
        if str(batch_size) != "1":
            raise EvaluationError(f"--batch_size {batch_size}: requests are answered one by one, give 1")
        self.setup = Setup(str(pretrained), max_new_tokens=max_new_tokens, system=system_prompt, **options)
        self.condition = condition_of(default_condition(self.setup), reducer, cost)
        self.answerer = _open(self.setup, device, dtype)
        logger.info(f"{pretrained} under {self.condition}, by {self.answerer.engine}")
        if self.answerer.note is not None:
            logger.warning(f"not by transformers' own model: {self.answerer.note}")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests of (context, messages of a document, generation_kwargs, document, task, split)."""
        texts = list[str]()
        answers = list[Answer]()
        for request in tqdm(requests, desc="framefusion", disable=self.rank != 0):
            _, messages_of, generation_kwargs, number, task, split = request.args
            messages = ChatMessages(messages=messages_of(self.task_dict[task][split][number])).messages
            question = question_of(f"{task}/{split}/{number}", messages)
            decoding = decoding_of(generation_kwargs, self.setup.max_new_tokens)
            answers.append(self._answer(question, decoding))
            texts.append(decoding.cut(answers[-1].text).strip())
        logger.info(summary_of(answers))
        return texts

    def _answer(self, question: TaskQuestion, decoding: Decoding) -> Answer:
        """Raises: FrameFusionError: as the answerer says, with the document's name before it."""
        self.answerer.setup = replace(self.setup, max_new_tokens=decoding.max_new_tokens)
        answer: Answer
        try:
            (answer,) = self.answerer.answers(question, [self.condition])
        except FrameFusionError as error:
            raise type(error)(f"{question.name}: {error}") from error
        return answer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises: EvaluationError: always."""
        raise EvaluationError(
            "the task compares likelihoods of given texts, the model only writes: choose the task's variant of "
            "output_type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises: EvaluationError: always."""
        raise EvaluationError("the task goes on after each answer: choose one of output_type generate_until")


def _open(setup: Setup, device: str | None, dtype: str | None) -> Answerer:
    if device is None and dtype is None:
        return open_answerer(setup)
    from framefusion.export.evaluate.lmms_eval.placed import PlacedAnswerer

    return PlacedAnswerer(setup, device or "cpu", dtype or "float32")


def condition_of(default: Condition, reducer: str | None, cost: float | None) -> Condition:
    """Reducer and cost of the arguments; the model's where they are None.

    Raises:
        EvaluationError: a cost below 1 under the reducer that drops nothing.
    """
    name = default.reducer if reducer is None else str(reducer)
    if name == DENSE:
        if cost is not None and cost != 1.0:
            raise EvaluationError(f"reducer {DENSE} drops nothing, cost {cost:g} cannot be had by it: name another one")
        return Condition(name, 1.0)
    return Condition(name, float(default.cost if cost is None else cost))


def summary_of(answers: Sequence[Answer]) -> str:
    """One line: what was kept on the average, and what a reducer could not do."""
    if not answers:
        return "nothing was asked"
    kept = sum(answer.reached for answer in answers) / len(answers)
    tokens = [sum(getattr(answer, name) for answer in answers) for name in ("visual_tokens", "visual_left")]
    outcomes: Mapping[str, int] = Counter(outcome for answer in answers for outcome in answer.outcomes)
    line = f"{len(answers)} answers: keeps {kept:.1%} of the computation over visual tokens, drops {1 - kept:.1%}; "
    line += f"{tokens[0]} visual tokens, {tokens[1]} of them in the last layer"
    return line + "".join(f"; {outcome}: {count}" for outcome, count in outcomes.items())
