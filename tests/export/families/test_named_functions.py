"""The functions that the table of families names in strings: mypy sees none of them, so their signatures are read."""

from __future__ import annotations

import inspect

import pytest

from framefusion.export.families import FAMILIES
from framefusion.export.families.family import load

TOWERS = sorted({family.tower for family in FAMILIES})
REFERENCES = sorted({family.reference_logits for family in FAMILIES if family.reference_logits})


def signature_of(name: str) -> tuple[list[str], str]:
    """What the parameters without a default are, and what comes back, as the source says it."""
    signature = inspect.signature(load(name))
    needed = [parameter for parameter in signature.parameters.values() if parameter.default is parameter.empty]
    return [str(parameter.annotation) for parameter in needed], str(signature.return_annotation)


def test_the_table_names_functions() -> None:
    assert len(TOWERS) + len(REFERENCES) >= 15


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_planned_of_a_checkpoint(name: str) -> None:
    assert signature_of(name) == (["Checkpoint"], "TowerPlan")


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_gives_logits_for_a_call(name: str) -> None:
    parameters, result = signature_of(name)
    assert parameters == ["TransformersCall"]
    assert result.startswith("NDArray")
