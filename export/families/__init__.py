"""The table of model families: one frozen row each, checked when imported; what is heavy is named and loaded on demand.

A family says which checkpoint keys feed which slot of the generic decoder, which tower sees the frames, how frames
become tokens and how a prompt is laid out. Facts that a checkpoint tells (sizes, biases, tied heads, pixel limits, chat
template) are read from it, not repeated here. Each row is in a module of its own beside its readers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from framefusion.errors import UnknownFamilyError
from framefusion.export.families.family import QWEN2_NAMES, Family
from framefusion.export.families.internvl import row as internvl
from framefusion.export.families.llava import hf_rows as llava_hf
from framefusion.export.families.llava import row as llava
from framefusion.export.families.minicpmv import row as minicpmv
from framefusion.export.families.nvila import row as nvila
from framefusion.export.families.qwen2_5_vl import row as qwen2_5_vl
from framefusion.export.families.qwen2_vl import row as qwen2_vl
from framefusion.export.families.qwen3_vl import row as qwen3_vl
from framefusion.export.families.reading.formats import llm_config, register

FAMILIES: tuple[Family, ...] = (
    qwen2_vl.ROW,
    qwen2_5_vl.ROW,
    qwen3_vl.ROW,
    llava.ROW,
    llava_hf.ONEVISION,
    llava_hf.NEXT_VIDEO,
    minicpmv.ROW,
    nvila.ROW,
    internvl.CHAT,
    internvl.CHAT_INTERNLM2,
    internvl.NATIVE,
)  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that declares a config.json, by its architecture where it names one, else by its model_type.

    Raises:
        UnknownFamilyError: none does; the message lists the known ones.
    """
    architectures = config.get("architectures") or []
    llm = (llm_config(config) or {}).get("architectures") or []
    candidates = [row for row in FAMILIES if not row.llm_architectures or set(llm) & set(row.llm_architectures)]
    for family in candidates:
        if set(architectures) & set(family.architectures):
            return family
    model_type = config.get("model_type")
    for family in () if architectures else candidates:  # a reward model has the model_type of a chat model
        if model_type in family.model_types:
            return family
    of_llm = sorted(
        {name for row in FAMILIES if set(architectures) & set(row.architectures) for name in row.llm_architectures}
    )
    if of_llm:
        raise UnknownFamilyError(
            f"{', '.join(architectures)} with an LLM of architectures {llm} is unknown; known for its LLM are "
            f"{', '.join(of_llm)}"
        )
    known = sorted({name for family in FAMILIES for name in family.architectures})
    raise UnknownFamilyError(
        f"model_type {model_type!r} with architectures {architectures} is unknown; known are {', '.join(known)}"
    )


def _validate(families: tuple[Family, ...]) -> None:
    """Refuse a table that cannot be right: a double name or architecture, a slot without a name, a tower not named."""
    claimed: dict[tuple[str, str], str] = {}
    for family in families:
        names = (*family.architectures, *family.model_types)
        for claim in itertools.product(names, family.llm_architectures or ("",)):
            if claim in claimed:
                raise ValueError(f"{' '.join(claim)} is claimed by {claimed[claim]} and {family.name}")
            claimed[claim] = family.name
        missing = set(QWEN2_NAMES) - set(family.llm.names)
        if missing:
            raise ValueError(f"family {family.name} names no key for {sorted(missing)}")
        for function in filter(None, (family.tower, family.reference_logits)):
            if function.count(":") != 1:
                raise ValueError(f"family {family.name}: {function!r} is not module:function")
    if len({family.name for family in families}) != len(families):
        raise ValueError("two families have one name")


_validate(FAMILIES)
for _family in FAMILIES:
    register((*_family.architectures, *_family.model_types), _family.config)
