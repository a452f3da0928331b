"""The attacks that other modules of this folder run by themselves, as kinds of `make attack`: many trials a process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.attack import bundles as bundle_attack
from tools.attack import checkpoints as checkpoint_attack
from tools.attack import films as film_attack
from tools.attack import pictures as picture_attack
from tools.attack.harness import Fault, World

BATCH = 50
SECONDS = 1200.0
"""Of a batch; each trial has its own limit."""


def bundles(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """Bundles as a stranger could hand them in."""
    return faults_of(bundle_attack.attack(BATCH, rng.getrandbits(31), world.bundle))


def pictures(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """Mutated pictures."""
    return faults_of(picture_attack.attack(BATCH, rng.getrandbits(31)))


def films(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """Mutated films."""
    return faults_of(film_attack.attack(BATCH, rng.getrandbits(31)))


def checkpoints(rng: random.Random, world: World, folder: Path) -> list[Fault]:
    """Checkpoints of every family, with one thing changed."""
    return faults_of(checkpoint_attack.attack(BATCH, rng.getrandbits(31), world.checkpoints))


def faults_of(facts: dict[str, Any]) -> list[Fault]:
    """The failed trials of an attack, by what went wrong."""
    failed: Sequence[dict[str, Any]] = facts["failed"]
    return [Fault(_kind(str(trial["error"])), str(trial)) for trial in failed]


def _kind(error: str) -> str:
    signs = {"hang": ("seconds", "took", "Timeout"), "memory": ("memory", "bytes"), "wrong": ("answer", "printable")}
    return next((kind for kind, texts in signs.items() if any(text in error for text in texts)), "traceback")
