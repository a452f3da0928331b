"""The committed constraints against pyproject.toml: nothing here asks a package index."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.lock import EXTRA, LIBRARIES, LOCK, OLDEST, OLDEST_PYTHON, pinned, pins, requirements

PYTHONS = ("3.11", "3.12", "3.13")


def wanted(extra: str, python: str) -> list[Requirement]:
    place = {"python_version": python, "sys_platform": "linux", "platform_machine": "x86_64"}
    return [item for item in requirements(extra) if item.marker is None or item.marker.evaluate(place)]


def allows(requirement: Requirement, version: str) -> bool:
    return version != "no version" and version in requirement.specifier


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_the_project_asks_for_within_its_bounds(python: str) -> None:
    direct = [requirement for extra in ("", EXTRA) for requirement in wanted(extra, python)]
    locked = {str(requirement): pinned(LOCK, requirement.name, python) or "no version" for requirement in direct}
    outside = [f"{text}: {version}" for text, version in locked.items() if not allows(Requirement(text), version)]
    assert outside == [], "run `make lock`"


def test_the_oldest_set_is_the_lower_bounds_of_the_project() -> None:
    """A bound that the resolver had to leave was never true, so nobody would have tested it."""
    for requirement in [item for extra in LIBRARIES for item in wanted(extra, OLDEST_PYTHON)]:
        (lowest,) = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        version = pinned(OLDEST, requirement.name, OLDEST_PYTHON)
        assert version is not None, f"{requirement.name} has no pin: run `make lock`"
        assert Version(version) == lowest, (
            f"pyproject.toml says {requirement}, the oldest set that resolves has {version}"
        )


@pytest.mark.parametrize("path", [LOCK, OLDEST], ids=lambda path: path.name)
def test_every_line_pins_one_version_and_names_no_host(path: Path) -> None:
    for pin in pins(path):
        assert [bound.operator for bound in pin.specifier] == ["=="], pin
        assert pin.url is None
