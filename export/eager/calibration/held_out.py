"""Whether codes that films chose are nearer to the model in floats than those of the search, on prompts held out.

    logits of the floats, token by token of their answer   <--divergence-->   those behind the films' codes
                                                           <--divergence-->   those behind the search's codes

All three keep the tokens that the floats kept, so that weights alone are compared: by what each token of an answer is
chosen by, the one that ends it among them. Most tokens are certain and a few nearly undecided, whose divergence is a
million times as large and of either sign by chance: so the mean is the geometric one, in which each token counts alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from framefusion.export.checkpoints.tensors.weights import read_parameter
from framefusion.export.eager.calibration.prompts import CalibrationPrompt, CalibrationRows
from framefusion.export.graphs.decoder import Segment
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.export.quantization.code_store import CodeStore
from framefusion.reduction.plan import Plan
from framefusion.reduction.policy import Decision, ReductionState

Scores = NDArray[np.float32]
ROUNDING = 1e-10
"""Divergence that sums in fp32 alone make."""
LEAST = 4
"""Films from where on prompts about some of them are held out; questions, where they are about fewer films."""
EVERY = 4
"""One of so many is held out, the last of them."""


@dataclass(frozen=True)
class Judgement:
    """How far codes are from floats on prompts that took no part in their choice.

    Attributes:
        prompts: that were held out.
        chosen: geometric mean of the divergence, in nats a token, behind the codes that films chose.
        searched: the same behind those of the search alone.
    """

    prompts: int
    chosen: float
    searched: float

    @property
    def is_better(self) -> bool:
        """Whether the films' codes are to be taken."""
        return self.chosen <= self.searched

    def noted(self, store: CodeStore) -> CodeStore:
        """What is known of the codes, with this."""
        return replace(
            store,
            held_out=self.prompts,
            divergence=self.chosen,
            search_divergence=self.searched,
            taken=self.is_better,
        )


def held_out(prompts: Sequence[CalibrationPrompt], digests: Mapping[Path, str]) -> list[int]:
    """Numbers of the prompts that are held out: none shows a film that others show, or is at least another question.

    Args:
        prompts: conversations.
        digests: of their files, see `file_digests`.
    """
    contents = [tuple(digests[file] for file in prompt.files) for prompt in prompts]
    groups = _joined(contents)
    if len(set(groups)) < LEAST:
        groups = _numbered([(prompt.turns, content) for prompt, content in zip(prompts, contents, strict=True)])
    if len(set(groups)) < LEAST:
        return []
    return [number for number, group in enumerate(groups) if group % EVERY == EVERY - 1]


def _joined(contents: Sequence[tuple[str, ...]]) -> list[int]:
    """A group for each prompt, one for all that are joined by the content of their files; numbered as they come."""
    leaders: dict[str, str] = {}

    def leader(name: str) -> str:
        while leaders.setdefault(name, name) != name:
            name = leaders[name]
        return name

    names = [content or (f"prompt {number}",) for number, content in enumerate(contents)]
    for first, *others in names:
        for other in others:
            leaders[leader(other)] = leader(first)
    return _numbered([leader(first) for first, *_ in names])


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


class Repeated(ReductionState):
    """The decisions of another model for a prompt with an answer behind it, which stays.

    Args:
        labels: of prompt and answer.  [S]
        decisions: of the other model about the prompt alone.
        answer: tokens of the answer.
    """

    def __init__(self, labels: NDArray[np.int64], decisions: Sequence[Decision], answer: int) -> None:
        super().__init__(labels)
        self._decisions = decisions
        self._answer = answer
        self.finished = not decisions

    @property
    def wants_similarity(self) -> bool:
        """Never: it is decided."""
        return False

    @property
    def wants_importance(self) -> bool:
        """Never."""
        return False

    def _decide(self, similarity: Scores | None, importance: Scores | None, features: Scores | None) -> Plan:
        plan = self._decisions[self.call].plan
        self.finished = self.call + 1 == len(self._decisions)
        length = self.labels.size
        kept = np.concatenate([plan.kept, np.arange(length - self._answer, length)])
        return Plan(plan.kind, kept, plan.heads, plan.members, plan.run_starts)


def judged(
    floats: BuildPlan, items: Sequence[CalibrationRows], chosen: Sequence[Tensor], searched: Sequence[Tensor]
) -> Judgement:
    """Compare two choices of codes on the same prompts.

    Args:
        floats: the plan of the model in floats, whose head is read.
        items: the prompts.
        chosen: what leaves the last layer behind the films' codes, of each prompt.  [answer + 1, D] each
        searched: the same behind the search's.
    """
    head = _head(floats)
    divergences = []
    for states in (chosen, searched):
        each = [_divergence(item.logits, _logits(head, rows)) for item, rows in zip(items, states, strict=True)]
        divergences.append(float(np.exp(np.log(np.maximum(np.concatenate(each), ROUNDING)).mean())))
    return Judgement(len(items), *divergences)


def _head(floats: BuildPlan) -> torch.nn.Module:
    """Final norm and vocabulary projection, in fp32."""
    graph = next(graph for graph in reversed(floats.graphs) if graph.role == "both")
    module = graph.module()
    assert isinstance(module, Segment)
    assert module.head is not None  # it is the last segment
    module.head.to_empty(device="cpu")
    for name, parameter in module.head.named_parameters():
        source = graph.sources[f"head.{name}"]
        parameter.data = read_parameter(floats.checkpoint, source, tuple(parameter.shape), torch.float32)
    return module.head


@torch.no_grad()
def _logits(head: torch.nn.Module, rows: Tensor) -> NDArray[np.float32]:
    """[R, D] -> [R, V]"""
    found: NDArray[np.float32] = torch.cat([head(rows[None, row : row + 1]) for row in range(len(rows))]).numpy()
    return found


def _divergence(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of each row from the reference's, in nats.  [R, V], [R, V] -> [R]"""
    theirs = _log_softmax(reference)
    found: NDArray[np.float64] = (np.exp(theirs) * (theirs - _log_softmax(logits))).sum(1)
    return found


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found
