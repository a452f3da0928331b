"""Logits to the next token, in Hugging Face's order: repetition penalty, bans, temperature, top-k, top-p, min-p, draw.

Knows no model and no text. The repetition penalty and the n-grams count the prompt too and act on greedy decoding as
well. Bans by n-grams and by sequences are those of transformers' NoRepeatNGramLogitsProcessor and
NoBadWordsLogitsProcessor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from framefusion.errors import BackendError, BundleError, PromptError

NUMBERS: Mapping[str, tuple[float, float, str]] = {
    "temperature": (0, 1e6, "between 0 (greedy) and a million"),
    "top_k": (0, np.inf, "0 (off) or more"),
    "top_p": (0, 1, "between 0 and 1"),
    "min_p": (0, 1, "between 0 (off) and 1"),
    "repetition_penalty": (0.01, 100, "between 0.01 and 100, 1 is off"),
    "no_repeat_ngram_size": (0, np.inf, "0 (off) or more"),
    "min_new_tokens": (0, np.inf, "0 (off) or more"),
}
"""Field -> smallest and largest value, the largest not infinite, and how to say so."""
COUNTS = ("top_k", "no_repeat_ngram_size", "min_new_tokens")
LEAST_TEMPERATURE = 1e-9
"""Below it only the likeliest token has a chance: logits of a model, some tens, differ by 1e-6 in fp32 if they do, and
divided by much less they would be infinite."""
TOKEN_LISTS = ("eos_token_ids", "suppress_tokens", "begin_suppress_tokens")

DRAWING = ("temperature", "top_p", "top_k")
"""Fields that ask for a token to be drawn where a caller gives one of them."""


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen, and which end an answer. What is None is as the bundle says (`over`).

    Attributes:
        do_sample: draw a token by its probability instead of taking the best one.
        temperature: logits are divided by it before a draw; 0 means greedy.
        top_k: tokens that may be drawn; 0 = all.
        top_p: share of the probability that may be drawn, from the top.
        repetition_penalty: what logits of tokens already there are divided by, or multiplied with below 0.
        eos_token_ids: tokens that end an answer; () never ends one before the limit.
        pad_token_id: as generation_config.json has it; not used.
        no_repeat_ngram_size: no so many tokens in a row occur twice, the prompt counted; 0 = off.
        suppress_tokens: never chosen.
        begin_suppress_tokens: not chosen as the first token of an answer.
        bad_words_ids: sequences of tokens that are not completed.
        min_new_tokens: so many tokens come before the end.
        min_p: least probability that may be drawn, as a share of the best token's; 0 = off.

    Raises:
        PromptError: a value has another type or is out of range.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    no_repeat_ngram_size: int | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    min_new_tokens: int | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, (bool, np.bool_)) and self.do_sample is not None:
            raise PromptError(f"do_sample is {self.do_sample!r}: give True or False")
        for name, (low, high, remedy) in NUMBERS.items():
            value: Any = getattr(self, name)
            if value is None:
                continue
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            if not whole and (name in COUNTS or not isinstance(value, (float, np.floating))):
                kind = "a whole number" if name in COUNTS else "a number"
                raise PromptError(f"{name} is {value!r}: give {kind}, {remedy}")
            if not low <= value <= high or value == np.inf:
                raise PromptError(f"{name} is {value}: give a number {remedy}")
        if self.pad_token_id is not None and type(self.pad_token_id) is not int:
            raise PromptError(f"pad_token_id is {self.pad_token_id!r}: give a token id")
        for name in TOKEN_LISTS:
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        if self.bad_words_ids is not None:
            listed = self.bad_words_ids
            if not isinstance(listed, (list, tuple)) or not all(isinstance(ids, (list, tuple)) for ids in listed):
                raise PromptError(f"bad_words_ids is {self.bad_words_ids!r}: give a list of lists of token ids")
            sequences = tuple(_token_ids("bad_words_ids", ids) or () for ids in listed)
            if not all(sequences):
                raise PromptError(f"bad_words_ids is {self.bad_words_ids!r}: a sequence is empty, leave it out")
            object.__setattr__(self, "bad_words_ids", sequences)

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is that of the largest logit whatever came before it, so that no other one counts."""
        config = self.over(DEFAULTS)
        bans = (config.suppress_tokens, config.begin_suppress_tokens, config.bad_words_ids)
        counts = (config.no_repeat_ngram_size, config.min_new_tokens)
        return config.greedy and config.repetition_penalty == 1 and not any((*bans, *counts))

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken instead of one drawn."""
        return not self.do_sample or (self.temperature is not None and self.temperature < LEAST_TEMPERATURE)

    def over(self, base: GenerationConfig) -> GenerationConfig:
        """These settings, with those of `base` where this one says nothing."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(base, **{name: value for name, value in given.items() if value is not None})

    def drawing(self, **given: float | None) -> GenerationConfig:
        """These settings with those that a caller gives; one of `DRAWING` among them means to draw.

        Args:
            given: fields by name, None where nothing is given.

        Raises:
            PromptError: a value has another type or is out of range.
        """
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if any(name in values for name in DRAWING):
            values["do_sample"] = True
        return replace(self, **values)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> GenerationConfig:
        """From a generation_config.json; what is absent or null has Hugging Face's default, other keys are ignored.

        Raises:
            BundleError: a value has another type or is out of range.
        """
        names = {field.name: field.name for field in fields(cls)} | {"eos_token_ids": "eos_token_id"}
        values = {name: given[key] for name, key in names.items() if given.get(key) is not None}
        try:
            return cls(**values).over(DEFAULTS)
        except PromptError as error:
            problem = str(error).replace("eos_token_ids", "eos_token_id")
            raise BundleError(
                f"generation settings are not numbers, flags and tokens as expected ({problem}): correct the checkpoint"
            ) from None


def _token_ids(name: str, value: Any) -> tuple[int, ...] | None:
    """One id or several as a tuple."""
    if value is None:
        return None
    listed = [value] if isinstance(value, (int, np.integer)) else value
    if isinstance(listed, (str, bytes, Mapping)) or not hasattr(listed, "__iter__"):
        raise PromptError(f"{name} is {value!r}: give a token id or a list of them")
    ids = tuple(listed)
    for index in ids:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or index < 0:
            raise PromptError(f"{name} is {value!r}: {index!r} is no token id, which are whole numbers from 0 up")
    return tuple(map(int, ids))


DEFAULTS = GenerationConfig(
    do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0, eos_token_ids=()
)
"""Hugging Face's."""


def require_number(largest: float | np.floating[Any]) -> None:
    """Refuse the largest of some logits where it is none.

    Raises:
        BackendError: it is not finite.
    """
    if not np.isfinite(largest):
        raise BackendError(f"the model's largest logit is {largest}: build with --dtype bfloat16 or float32")


class Sampler:
    """Chooses tokens for one answer; the same seed chooses the same tokens.

    Args:
        config: what is None in it has Hugging Face's default.
        seed: of the draws; None draws otherwise each time.
        vocab_limit: logits from here on belong to no token.
        prompt_length: ids before the answer; None where the first call is given no answer yet.
    """

    def __init__(
        self,
        config: GenerationConfig,
        seed: int | None = None,
        vocab_limit: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self._config = config.over(DEFAULTS)
        self._vocab_limit = vocab_limit
        self._random = np.random.default_rng(seed)
        self._prompt_length = prompt_length

    def next_token(self, logits: NDArray[np.floating[Any]], previous_ids: Sequence[int] | NDArray[np.int64]) -> int:
        """The next id, from logits [V] and all ids before it, those of the prompt included.

        Raises:
            BackendError: the logits are no numbers.
            PromptError: the settings leave no token to choose.
        """
        ids = np.asarray(previous_ids, np.int64)
        scores = self._penalised(logits, ids)
        require_number(scores.max())
        self._ban(scores, ids)
        best = int(scores.argmax())
        if np.isneginf(scores[best]):
            raise PromptError("suppress_tokens, bad_words_ids and no_repeat_ngram_size leave no token: allow some")
        if self._config.greedy:
            return best
        candidates, probabilities = self._candidates(scores)
        drawn = np.searchsorted(np.cumsum(probabilities), self._random.random() * probabilities.sum(), side="right")
        return int(candidates[min(int(drawn), candidates.size - 1)])

    def _penalised(self, logits: NDArray[np.floating[Any]], previous_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of the valid logits in fp32, tokens that are there already less likely."""
        scores = logits[: self._vocab_limit].astype(np.float32)
        penalty = np.float32(self._config.repetition_penalty or 1.0)
        if penalty != 1:
            present = previous_ids[(previous_ids >= 0) & (previous_ids < scores.size)]  # a video's rows have no id
            scores[present] = np.where(scores[present] < 0, scores[present] * penalty, scores[present] / penalty)
        return scores

    def _ban(self, scores: NDArray[np.float32], previous_ids: NDArray[np.int64]) -> None:
        """Give what may not be said now a logit of minus infinity, in place."""
        config = self._config
        if self._prompt_length is None:
            self._prompt_length = previous_ids.size
        said = previous_ids.size - self._prompt_length
        ends = config.eos_token_ids or ()
        banned: list[int] = [*(config.suppress_tokens or ())]
        if config.begin_suppress_tokens and not said:
            banned += config.begin_suppress_tokens
        if said < (config.min_new_tokens or 0):
            banned += ends
        if config.bad_words_ids:  # an end token by itself is never a bad word
            sequences = [ids for ids in config.bad_words_ids if len(ids) > 1 or ids[0] not in ends]
            banned += banned_by_sequences(sequences, previous_ids)
        if config.no_repeat_ngram_size:
            banned += banned_by_ngrams(config.no_repeat_ngram_size, previous_ids)
        if banned:
            ids = np.array(banned, np.int64)
            scores[ids[(ids >= 0) & (ids < scores.size)]] = -np.inf

    def _candidates(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Ids that may be drawn, least likely first, and their probabilities (not yet scaled to sum to one)."""
        config = self._config
        scores = scores / np.float32(1.0 if config.temperature is None else config.temperature)
        ids = _top_k(scores, config.top_k or 0)
        ids = ids[np.argsort(scores[ids], kind="stable")]
        weights = np.exp(scores[ids].astype(np.float64) - scores[ids[-1]])
        probabilities = weights / weights.sum()
        if config.top_p is not None and config.top_p < 1:
            kept = np.cumsum(probabilities) > 1 - config.top_p
            kept[-1] = True
            ids = ids[kept]
            probabilities = probabilities[kept]
        if config.min_p:
            kept = probabilities >= config.min_p * probabilities[-1]
            ids = ids[kept]
            probabilities = probabilities[kept]
        return ids, probabilities


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ids of the k largest scores, and of any that tie with the last of them."""
    if not 0 < k < scores.size:
        return np.arange(scores.size)
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def banned_by_ngrams(size: int, ids: NDArray[np.int64]) -> list[int]:
    """Tokens that would end an n-gram of `size` tokens that `ids` [S] holds already."""
    if size < 1 or ids.size < size:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    repeated = (windows[:, :-1] == ids[ids.size - size + 1 :]).all(axis=1)
    banned: list[int] = windows[repeated, -1].tolist()
    return banned


def banned_by_sequences(sequences: Iterable[Sequence[int]], ids: NDArray[np.int64]) -> list[int]:
    """Last tokens of those sequences whose other tokens `ids` [S] ends with."""
    banned = []
    for sequence in sequences:
        before = list(sequence[:-1])
        if len(before) <= ids.size and ids[ids.size - len(before) :].tolist() == before:
            banned.append(sequence[-1])
    return banned
