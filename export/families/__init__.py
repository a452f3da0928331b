"""The table of model families: one frozen row each, checked when imported; what is heavy is named and loaded on demand.

A family says which checkpoint keys feed which slot of the generic decoder, which tower sees the frames, how frames
become tokens and how a prompt is laid out. Facts that a checkpoint tells (sizes, biases, tied heads, pixel limits, chat
template) are read from it, not repeated here. Each row is in a folder of its own beside its readers.
Another package adds a row by an entry point; a name or an architecture of this table cannot be taken.
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
from framefusion.storage.entry_points import load_named, names, origin

GROUP = "framefusion.families"
WHAT = "family"

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

    Rows of installed packages come after the table.

    Raises:
        UnknownFamilyError: none does; the message lists the known ones. Or a package's row cannot be loaded.
    """
    family = _declaring(config, FAMILIES)
    if family is not None:
        return family
    families = (*FAMILIES, *installed_families())
    family = _declaring(config, families)
    if family is not None:
        return family
    architectures = config.get("architectures") or []
    of_llm = sorted(
        {name for row in families if set(architectures) & set(row.architectures) for name in row.llm_architectures}
    )
    if of_llm:
        raise UnknownFamilyError(
            f"{', '.join(architectures)} with an LLM of architectures {_llm_architectures(config)} is unknown; known "
            f"for its LLM are {', '.join(of_llm)}"
        )
    known = sorted({name for family in families for name in family.architectures})
    raise UnknownFamilyError(
        f"model_type {config.get('model_type')!r} with architectures {architectures} is unknown; known are "
        f"{', '.join(known)}"
    )


def _declaring(config: Mapping[str, Any], families: tuple[Family, ...]) -> Family | None:
    architectures = config.get("architectures") or []
    llm = set(_llm_architectures(config))
    candidates = [row for row in families if not row.llm_architectures or llm & set(row.llm_architectures)]
    for family in candidates:
        if set(architectures) & set(family.architectures):
            return family
    for family in () if architectures else candidates:  # a reward model has the model_type of a chat model
        if config.get("model_type") in family.model_types:
            return family
    return None


def _llm_architectures(config: Mapping[str, Any]) -> list[str]:
    return (llm_config(config) or {}).get("architectures") or []


def installed_families() -> tuple[Family, ...]:
    """Rows of installed packages, by name: entry points of the group `framefusion.families`, name = "module:ROW".

    Raises:
        UnknownFamilyError: a row cannot be loaded, or claims what another one has.
    """
    rows = []
    for name in sorted(set(names(GROUP)) - {family.name for family in FAMILIES}):
        row = load_named(GROUP, name, WHAT, UnknownFamilyError)
        if not isinstance(row, Family) or row.name != name:
            raise UnknownFamilyError(
                f"{origin(GROUP, name, WHAT)} is {row!r:.60}: name a {Family.__module__}.Family that is called {name!r}"
            )
        rows.append(row)
    try:
        _validate((*FAMILIES, *rows))
    except ValueError as error:
        raise UnknownFamilyError(f"an installed family is impossible ({error}): uninstall its package") from None
    for row in rows:
        register((*row.architectures, *row.model_types), row.config)
    return tuple(rows)


def _validate(families: tuple[Family, ...]) -> None:
    """Refuse a table that cannot be right: a double name or architecture, a slot without a name, a tower not named."""
    claimed: dict[tuple[str, str], str] = {}
    for family in families:
        names = (*family.architectures, *family.model_types)
        for claim in itertools.product(names, family.llm_architectures or ("",)):
            if claim in claimed:
                raise ValueError(f"{' '.join(filter(None, claim))} is claimed by {claimed[claim]} and {family.name}")
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
