"""Logits to the next token, in Hugging Face's order: repetition penalty, temperature, top-k, top-p, draw.

Knows no model and no text. The repetition penalty counts the prompt too and acts on greedy decoding as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError, BundleError, PromptError


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen, and which end an answer. A temperature of 0 means greedy."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50  # 0 = off
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, value, good, remedy in (
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf, "above 0, 1 is off"),
        ):
            if not good:
                raise PromptError(f"{name} is {value}: give a number {remedy}")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken instead of one drawn."""
        return not self.do_sample or self.temperature == 0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GenerationConfig:
        """From a generation_config.json; what is absent or null has Hugging Face's default, other keys are ignored."""
        eos = fields.get("eos_token_id")
        eos_token_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "pad_token_id")
        given = {name: fields[name] for name in names if fields.get(name) is not None}
        try:
            return cls(eos_token_ids=eos_token_ids, **given)
        except TypeError as error:
            raise BundleError(
                f"generation settings {given} are not numbers ({error}): correct the checkpoint"
            ) from error


class Sampler:
    """Chooses tokens for one answer; the same seed chooses the same tokens."""

    def __init__(self, config: GenerationConfig, seed: int | None = None, vocab_limit: int | None = None) -> None:
        self._config = config
        self._vocab_limit = vocab_limit  # logits from here on belong to no token
        self._random = np.random.default_rng(seed)

    def next_token(self, logits: NDArray[np.floating[Any]], previous_ids: Sequence[int] | NDArray[np.int64]) -> int:
        """The next id, from logits [V] and all ids before it, those of the prompt included."""
        scores = self._penalised(logits, np.asarray(previous_ids, np.int64))
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            raise BackendError(f"the model's largest logit is {scores[best]}: build with --dtype bfloat16 or float32")
        if self._config.greedy:
            return best
        ids, probabilities = self._candidates(scores)
        drawn = np.searchsorted(np.cumsum(probabilities), self._random.random() * probabilities.sum(), side="right")
        return int(ids[min(int(drawn), ids.size - 1)])

    def _penalised(self, logits: NDArray[np.floating[Any]], previous_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of the valid logits in fp32, tokens already seen made less likely."""
        scores = logits[: self._vocab_limit].astype(np.float32)
        penalty = np.float32(self._config.repetition_penalty)
        if penalty != 1:
            seen = previous_ids[(previous_ids >= 0) & (previous_ids < scores.size)]  # a video's rows have no id
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return scores

    def _candidates(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Ids that may be drawn, least likely first, and their probabilities (not yet scaled to sum to one)."""
        scores = scores / np.float32(self._config.temperature)
        ids = _top_k(scores, self._config.top_k)
        ids = ids[np.argsort(scores[ids], kind="stable")]
        weights = np.exp(scores[ids].astype(np.float64) - scores[ids[-1]])
        probabilities = weights / weights.sum()
        if self._config.top_p < 1:
            kept = np.cumsum(probabilities) > 1 - self._config.top_p
            kept[-1] = True
            ids, probabilities = ids[kept], probabilities[kept]
        return ids, probabilities


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ids of the k largest scores, and of any that tie with the last of them."""
    if not 0 < k < scores.size:
        return np.arange(scores.size)
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])
