"""Tokens kept and probabilities given equal Hugging Face's processors and warpers, in their order."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from framefusion.errors import BackendError, BundleError, PromptError
from framefusion.runtime.text.sampling import DEFAULTS, GenerationConfig, Sampler
from framefusion.storage.records import from_json, to_json
from tests.versions import needs_transformers


def logits_of(seed: int, size: int = 300) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def reference(settings: GenerationConfig, logits: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
    """Probabilities of all tokens after Hugging Face's own chain."""
    import torch
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    config: Any = settings.over(DEFAULTS)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(config.repetition_penalty)])
    if config.do_sample:
        chain.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            chain.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            chain.append(TopPLogitsWarper(config.top_p))
    scores = chain(torch.LongTensor([ids]), torch.from_numpy(logits)[None])
    return np.asarray(scores.softmax(-1)[0].numpy(), np.float32)


@needs_transformers
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [
        (1.0, 0, 1.0, 1.0),
        (0.7, 20, 0.8, 1.05),
        (1.5, 0, 0.9, 1.3),
        (0.1, 50, 0.001, 1.05),
        (2.0, 1000, 0.5, 0.8),
    ],
)
def test_probabilities_equal_hugging_face(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    config = GenerationConfig(True, temperature, top_k, top_p, penalty)
    logits, ids = logits_of(seed), [3, 3, 7, 200, 299]
    sampler = Sampler(config, 0)
    kept, probabilities = sampler._candidates(sampler._penalised(logits, np.array(ids)))
    found = np.zeros(logits.size)
    found[kept] = probabilities / probabilities.sum()
    np.testing.assert_allclose(found, reference(config, logits, ids), rtol=2e-5, atol=1e-9)


@needs_transformers
@pytest.mark.parametrize("seed", range(20))
def test_greedy_obeys_the_repetition_penalty(seed: int) -> None:
    logits = logits_of(seed)
    ids = np.argsort(logits)[-3:].tolist()  # the prompt holds the best tokens
    config = GenerationConfig(repetition_penalty=5.0)
    chosen = Sampler(config).next_token(logits, ids)
    assert chosen == reference(config, logits, ids).argmax() != logits.argmax()


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7], np.float32))
    config = GenerationConfig(do_sample=True, top_k=0)
    sampler = Sampler(config, 3)
    drawn = [sampler.next_token(logits, []) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.2, 0.7], atol=0.03)
    again = Sampler(config, 3)
    assert drawn[:50] == [again.next_token(logits, []) for _ in range(50)]


def test_ids_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = np.array([0.0, 1.0, 9.0, 9.0], np.float32)
    assert Sampler(GenerationConfig(), vocab_limit=2).next_token(logits, [3]) == 1
    sampler = Sampler(GenerationConfig(do_sample=True, repetition_penalty=1.1), 0, vocab_limit=2)
    assert {sampler.next_token(logits, [3]) for _ in range(50)} == {0, 1}


def test_extreme_logits_and_half_precision() -> None:
    logits = np.array([-6e4, 6e4, 5.9e4], np.float16)
    config = GenerationConfig(do_sample=True, temperature=0.01)
    assert Sampler(config, 0).next_token(logits, []) == 1
    assert Sampler(GenerationConfig(do_sample=True, temperature=0)).next_token(logits, []) == 1
    assert logits[0] == -6e4  # the caller's array is left alone


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-30, 2e-9, 1.0, 1e6])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
def test_the_smallest_and_largest_settings_give_probabilities(temperature: float, penalty: float) -> None:
    """In fp32 a smaller divisor is 0, which made of logits no numbers, and of any of them a choice."""
    logits = np.array([0.0, 0.0, -65504.0, 65504.0, 1.0], np.float32)
    config = GenerationConfig(do_sample=True, temperature=temperature, repetition_penalty=penalty, top_k=0)
    for scores in (logits, -logits):
        chosen = {Sampler(config, seed).next_token(scores, [0, 3]) for seed in range(20)}
        if temperature <= 1:
            assert chosen == {scores.argmax()}
        if not config.greedy:
            _, probabilities = Sampler(config)._candidates(scores)
            assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(BackendError, match=r"largest logit is (nan|inf)"):
        Sampler(GenerationConfig()).next_token(np.array([0.0, bad], np.float32), [])


def test_settings_from_a_checkpoint() -> None:
    config = GenerationConfig.from_dict(
        {"eos_token_id": [5, 6], "top_k": None, "top_p": 0.001, "transformers_version": "4"}
    )
    assert (config.eos_token_ids, config.top_k, config.top_p, config.greedy) == ((5, 6), 50, 0.001, True)
    assert GenerationConfig.from_dict({"eos_token_id": 5}).eos_token_ids == (5,)
    assert GenerationConfig.from_dict({}).eos_token_ids == ()
    assert from_json(GenerationConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", 1e9),
        ("top_k", -1),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(PromptError, match=re.escape(f"{name} is {value}: give a number")):
        GenerationConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="are not numbers"):
        GenerationConfig.from_dict({name: "warm"})


@pytest.mark.parametrize(
    "given",
    [
        {"eos_token_id": "302"},
        {"eos_token_id": 302.0},
        {"eos_token_id": [302, True]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": -1},
        {"do_sample": "false"},
        {"do_sample": 0},
        {"temperature": True},
        {"top_k": 1.5},
        {"pad_token_id": "5"},
        {"suppress_tokens": "5"},
        {"bad_words_ids": [5]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": "ab"},
        {"no_repeat_ngram_size": -1},
    ],
)
def test_malformed_settings_name_their_key(given: dict[str, object]) -> None:
    key, value = next(iter(given.items()))
    with pytest.raises(BundleError, match=rf"\({key} is "):
        GenerationConfig.from_dict({key: value})


def test_settings_of_a_request_leave_the_rest_to_the_bundle() -> None:
    bundle = GenerationConfig.from_dict({"eos_token_id": [5, 6], "repetition_penalty": 1.05, "suppress_tokens": [3]})
    asked = GenerationConfig(do_sample=True, temperature=0.5).over(bundle)
    assert (asked.eos_token_ids, asked.repetition_penalty, asked.suppress_tokens) == ((5, 6), 1.05, (3,))
    assert (asked.do_sample, asked.temperature, asked.top_k) == (True, 0.5, 50)
    assert GenerationConfig(eos_token_ids=()).over(bundle).eos_token_ids == ()
    assert GenerationConfig(eos_token_ids=7).eos_token_ids == (7,)  # type: ignore[arg-type]


@needs_transformers
@pytest.mark.parametrize("seed", range(20))
def test_bans_equal_hugging_face(seed: int) -> None:
    """Each against transformers' own processor, over an answer that grows: the same tokens stay possible."""
    import torch
    from transformers.generation import logits_process as theirs

    random = np.random.default_rng(seed)
    prompt, answer = random.integers(0, 6, 12).tolist(), random.integers(0, 6, 8).tolist()
    words, ends = [[4], [1, 2], [3, 3, 0], [5], [0] * 30], (4, 7)
    config = GenerationConfig(
        eos_token_ids=ends, no_repeat_ngram_size=int(random.integers(1, 4)), suppress_tokens=(8, 9),
        begin_suppress_tokens=(6, 0), bad_words_ids=tuple(map(tuple, words)), min_new_tokens=3,
    )  # fmt: skip
    assert config.no_repeat_ngram_size is not None
    chain = theirs.LogitsProcessorList(
        [
            theirs.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size),
            theirs.NoBadWordsLogitsProcessor(words, torch.tensor(ends)),
            theirs.MinNewTokensLengthLogitsProcessor(len(prompt), 3, torch.tensor(ends)),
            theirs.SuppressTokensLogitsProcessor([8, 9]),
            theirs.SuppressTokensAtBeginLogitsProcessor([6, 0], len(prompt)),
        ]
    )
    sampler = Sampler(config, prompt_length=len(prompt))
    for count in range(len(answer)):
        ids, logits = [*prompt, *answer[:count]], logits_of(seed + count, 24)
        expected = chain(torch.LongTensor([ids]), torch.from_numpy(logits)[None])[0].numpy()
        scores = logits.copy()
        sampler._ban(scores, np.array(ids))
        np.testing.assert_array_equal(scores, expected)
        assert sampler.next_token(logits, ids) == expected.argmax()


@needs_transformers
@pytest.mark.parametrize("seed", range(5))
def test_min_p_equals_hugging_face(seed: int) -> None:
    import torch
    from transformers.generation.logits_process import MinPLogitsWarper

    logits = logits_of(seed)
    kept, _ = Sampler(GenerationConfig(True, top_k=0, min_p=0.05))._candidates(logits)
    scores = MinPLogitsWarper(0.05)(torch.LongTensor([[0]]), torch.from_numpy(logits)[None])[0]
    assert sorted(kept.tolist()) == torch.isfinite(scores).nonzero()[:, 0].tolist()


def test_settings_that_leave_no_token_are_refused() -> None:
    with pytest.raises(PromptError, match="leave no token: allow some"):
        Sampler(GenerationConfig(suppress_tokens=(0, 1))).next_token(np.zeros(2, np.float32), [])
