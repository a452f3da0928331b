"""How the configuration of a family's checkpoints is to be read, where its class does not do as most do.

Each row of the table of families says it in a `ConfigFormat`, which is registered under the names that mean the family;
what reads a config.json asks for the format of its names. Knows no family and no checkpoint. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Tied = Literal["llm", "either", "top", "top unless false"]
"""Where `tie_word_embeddings` is read: in the LLM's configuration, in that or at the top, at the top alone, or there
and true where it is absent."""


@dataclass(frozen=True)
class LlmClass:
    """A class of decoder in transformers, or in the files of a checkpoint.

    Attributes:
        biased: slots of the generic decoder whose linear map has a bias, whatever the configuration says.
        switches: key of the configuration -> slots that have a bias where it is true.
        qk_norm: queries and keys are normed, head by head.
        mrope: sections of its M-RoPE where the configuration names none; None for one-dimensional RoPE.
        interleaved: how the sections of its M-RoPE lie; no key of the configuration changes that.
        window: what decides that tokens see a window only: "always", "use_sliding_window" or "" for nothing.
    """

    biased: Sequence[str] = ()
    switches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    qk_norm: bool = False
    mrope: tuple[int, ...] | None = None
    interleaved: bool = False
    window: str = ""


@dataclass(frozen=True, kw_only=True)
class ConfigFormat:
    """How a family's class reads config.json.

    Attributes:
        llm_key: of the LLM's configuration, "" for the top of the file. A key that a class does not read may say
            anything: trainers that open LLaVA-Video's config.json as transformers' own LLaVA leave Llama's defaults.
        llm_type, vision_type: `model_type` of the LLM and of the tower where the file names none, "" for unknown.
        llm_class: of a decoder that no other family has, under the name `llm_type`.
        overridden: values that the class sets whatever the top of config.json says, so that no weight was ever trained
            with another.
        pad_ids: key of the id of a pad token -> its value where the key is absent.
        tied: where `tie_word_embeddings` is read.
        typed_as_whole: releases before 4.52 wrote the whole model's `model_type` into the parts' configurations.
        default_tower: without `vision_config` the class makes a tower of its defaults.
    """

    llm_key: str = "text_config"
    llm_type: str = ""
    vision_type: str = ""
    llm_class: LlmClass | None = None
    overridden: Mapping[str, Any] = field(default_factory=dict)
    pad_ids: Mapping[str, int] = field(default_factory=dict)
    tied: Tied = "llm"
    typed_as_whole: bool = False
    default_tower: bool = False


COMMON = ConfigFormat()
_FORMATS: dict[str, ConfigFormat] = {}


def register(names: Iterable[str], config_format: ConfigFormat) -> None:
    """Make the format known that architectures or model_types of these names have."""
    for name in names:
        _FORMATS.setdefault(name, config_format)


def format_of(config: Mapping[str, Any]) -> ConfigFormat:
    """The format of a config.json, by its architectures, then by its model_type."""
    architectures = config.get("architectures")
    names = [*architectures] if isinstance(architectures, list) else []
    known = (name for name in (*names, config.get("model_type")) if isinstance(name, str) and name in _FORMATS)
    return _FORMATS.get(next(known, ""), COMMON)


def llm_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The LLM's configuration within a config.json, as the file says it; None where it is the top of the file."""
    nested = config.get(format_of(config).llm_key)
    return nested if isinstance(nested, dict) else None


def token_id(config: Mapping[str, Any], key: str) -> int | None:
    """The id of a pad token by its key in config.json, as its class has it where the key is absent."""
    value: int | None = config.get(key, format_of(config).pad_ids.get(key))
    return value


def whole_types() -> frozenset[str]:
    """Names of whole models that old releases wrote into the configurations of their parts."""
    return frozenset(name for name, config_format in _FORMATS.items() if config_format.typed_as_whole)


def family_llm_classes() -> dict[str, LlmClass]:
    """model_type -> class of the decoders that are one family's alone."""
    formats = _FORMATS.values()
    return {each.llm_type: each.llm_class for each in formats if each.llm_class is not None}
