"""How a checkpoint chooses tokens: generation_config.json, and config.json for the tokens that end an answer.

What a bundle's sampler does (sampling.py of the runtime) is read; settings beside it that would change an answer are
refused by name; keys that change none are left alone. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from framefusion.errors import BundleError, CheckpointError
from framefusion.export.checkpoints.class_defaults import CLASS_DEFAULTS
from framefusion.runtime.text.sampling import GenerationConfig

if TYPE_CHECKING:
    from framefusion.export.checkpoints.checkpoint import Checkpoint

FILE = "generation_config.json"


def _unlike(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: value not in neutral


REFUSED: Mapping[str, Callable[[Any], bool]] = {
    "num_beams": _unlike(1),
    "num_beam_groups": _unlike(1),
    "penalty_alpha": _unlike(0, 0.0),
    "typical_p": _unlike(1, 1.0),
    "epsilon_cutoff": _unlike(0, 0.0),
    "eta_cutoff": _unlike(0, 0.0),
    "top_h": _unlike(),
    "encoder_repetition_penalty": _unlike(1, 1.0),
    "encoder_no_repeat_ngram_size": _unlike(0),
    "sequence_bias": _unlike(),
    "min_length": _unlike(0),
    "forced_bos_token_id": _unlike(),
    "forced_eos_token_id": _unlike(),
    "exponential_decay_length_penalty": _unlike(),
    "guidance_scale": _unlike(1, 1.0),
    "watermarking_config": _unlike(),
    "stop_strings": _unlike(),
    "token_healing": _unlike(False),
    "dola_layers": _unlike(),
    "force_words_ids": _unlike(),
    "constraints": _unlike(),
}
"""Key -> whether a value that is not null changes what transformers' `generate` says; none of them is computed here."""


def read_generation(
    checkpoint: Checkpoint, text_config: Mapping[str, Any], terminators: Sequence[int] = ()
) -> GenerationConfig:
    """The settings of a checkpoint, and the ids of a family's own ends of an answer beside its own.

    The end tokens are generation_config.json's; where it names none config.json's, and the LLM's part of it after its
    top, as transformers reads them.

    Raises:
        CheckpointError: naming a value of another type or range, or a setting that is not computed.
    """
    place = FILE
    settings = checkpoint.read_optional_json(FILE)
    if checkpoint.find(FILE) is None:  # of a time when config.json said all of it
        place = "config.json"
        known = {*REFUSED, *(field.name for field in fields(GenerationConfig))} - {"eos_token_ids"}
        settings = _values_of(known, text_config) | _values_of(known, checkpoint.config)
    for key, changes in REFUSED.items():
        if settings.get(key) is not None and changes(settings[key]):
            raise CheckpointError(
                f"{checkpoint.folder}/{place} has {key} {settings[key]!r:.80}, which is not supported: take the key "
                "out to build without it"
            )
    candidates = [source.get("eos_token_id") for source in (settings, checkpoint.config, text_config)]
    end = next((candidate for candidate in candidates if candidate is not None), None)
    try:
        config = GenerationConfig.from_dict(settings | {"eos_token_id": end})
    except BundleError as error:
        raise CheckpointError(f"{checkpoint.folder}/{place}: {error}") from None
    ids = _within(checkpoint, place, config.eos_token_ids or (), text_config)
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*terminators, *ids))))


def _within(checkpoint: Checkpoint, place: str, ids: Sequence[int], text_config: Mapping[str, Any]) -> Sequence[int]:
    """The end tokens that the LLM can say: others beside them end nothing, in transformers neither.

    Raises:
        CheckpointError: it can say none of those that the checkpoint names.
    """
    rows = text_config.get("vocab_size")
    within = [token for token in ids if rows is None or token < rows]
    default = CLASS_DEFAULTS.get(str(text_config.get("model_type")), {}).get("eos_token_id")
    if ids and not within and list(ids) != [default]:
        raise CheckpointError(
            f"{checkpoint.folder}/{place}: eos_token_id {list(ids)!r:.80} is beyond vocab_size {rows}, no answer would "
            "end: the file is of another model, take that of the base model"
        )
    return within


def _values_of(keys: set[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a configuration has and that are not null, with their values."""
    return {key: config[key] for key in keys if config.get(key) is not None}
