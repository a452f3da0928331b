"""What checkpoints say of choosing tokens: transformers' order of files, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.reading.configs import generation
from framefusion.runtime.text.sampling import GenerationConfig
from tests.versions import needs


def read(
    folder: Path, config: dict[str, Any], generation_config: dict[str, Any] | None = None, ends: tuple[int, ...] = ()
) -> GenerationConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return generation(Checkpoint(folder), ends)


@needs("transformers", "5.23", "it reads the LLM's part before the top of config.json")
@pytest.mark.parametrize(("top", "text"), [(5, 6), (5, None), (None, 6), ([5, 7], 6)])
def test_end_tokens_come_from_where_transformers_reads_them(top: Any, text: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers import GenerationConfig as Theirs

    config: dict[str, Any] = {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}
    config |= {} if top is None else {"eos_token_id": top}
    config["text_config"] |= {} if text is None else {"eos_token_id": text}
    ours = read(tmp_path, config).eos_token_ids
    theirs = Theirs.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id
    assert ours == (tuple(theirs) if isinstance(theirs, list) else (theirs,))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}},
        {"model_type": "qwen2_5_vl", "text_config": {}},
        {"model_type": "qwen3_vl", "text_config": {}},
        {"model_type": "llava_next_video", "text_config": {"model_type": "llama"}},
        {"model_type": "llava_next_video", "text_config": {"model_type": "mistral"}},
        {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}},
    ],
)
def test_end_tokens_that_save_pretrained_leaves_out(config: dict[str, Any], tmp_path: Path) -> None:
    """They equal the default of the class."""
    from transformers import AutoConfig
    from transformers import GenerationConfig as Theirs

    ours = read(tmp_path, config).eos_token_ids
    theirs = Theirs.from_model_config(AutoConfig.from_pretrained(tmp_path)).eos_token_id
    assert ours == (() if theirs is None else (theirs,))


def test_end_tokens_beyond_the_vocabulary_end_nothing(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "qwen2_vl", "text_config": {"vocab_size": 320}}
    assert read(tmp_path, config).eos_token_ids == ()
    assert read(tmp_path, config, {"eos_token_id": [302, 320]}).eos_token_ids == (302,)
    with pytest.raises(CheckpointError, match=r"eos_token_id \[320\] is beyond vocab_size 320, no answer would end"):
        read(tmp_path, config, {"eos_token_id": 320})


def test_generation_config_goes_before_config(tmp_path: Path) -> None:
    assert read(tmp_path, {"eos_token_id": 5}, {"eos_token_id": [8, 9]}, (9, 3)).eos_token_ids == (9, 3, 8)
    assert read(tmp_path, {"eos_token_id": 5}, {"do_sample": True}).eos_token_ids == (5,)


def test_config_says_it_all_where_there_is_no_generation_config(tmp_path: Path) -> None:
    config = read(tmp_path, {"repetition_penalty": 1.3, "text_config": {"no_repeat_ngram_size": 3, "num_beams": 1}})
    assert (config.repetition_penalty, config.no_repeat_ngram_size) == (1.3, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("typical_p", 0.9),
        ("sequence_bias", [[[3], 1.0]]),
        ("forced_eos_token_id", 5),
        ("stop_strings", ["END"]),
        ("guidance_scale", 1.5),
        ("min_length", 8),
    ],
)
def test_what_is_not_computed_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"generation_config.json has {key} .* is not supported: take the key out"
    ):
        read(tmp_path, {}, {key: value})


def test_values_that_change_nothing_are_left_alone(tmp_path: Path) -> None:
    neutral = {
        "num_beams": 1,
        "typical_p": 1.0,
        "min_length": 0,
        "stop_strings": None,
        "max_length": 20,
        "use_cache": 1,
    }
    assert read(tmp_path, {}, neutral) == GenerationConfig.from_dict({})


@pytest.mark.parametrize("given", [{"eos_token_id": "302"}, {"eos_token_id": 302.0}, {"do_sample": "false"}])
def test_malformed_values_are_the_checkpoint_s_error(given: dict[str, Any], tmp_path: Path) -> None:
    key, value = next(iter(given.items()))
    with pytest.raises(CheckpointError, match=rf"generation_config.json: .*{key} is {value!r}"):
        read(tmp_path, {}, given)
