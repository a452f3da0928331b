"""golden.json as a stranger may have written it: refused, or a wrong proof, and never a traceback."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.proof.golden import GOLDEN, RULES, Golden, golden_to_json, read_golden, require_golden
from framefusion.runtime.proof.prove import prove
from tests.runtime.bundle_edits import copied
from tests.runtime.proof.wrong_backends import Honest
from tools.attack.bundles import edit, places


@pytest.fixture(name="folder")
def of_its_own(bundle: Path, tmp_path: Path) -> Path:
    return copied(bundle, tmp_path / "bundle")


def shortened(plain: dict[str, Any]) -> dict[str, Any]:
    """Few runs, so that edits hit more than numbers in long lists."""
    plain = copy.deepcopy(plain)
    plain["runs"] = plain["runs"][:1] + plain["runs"][-1:]
    return plain


def few_places(plain: dict[str, Any]) -> list[Any]:
    """Places of all fields, and of the first items of lists."""
    return [at for at in places(plain) if all(not isinstance(key, int) or key < 2 for key in at)]


@pytest.mark.slow
def test_mutations(folder: Path) -> None:
    opened = Bundle(folder, verify=False)
    backend = Honest(opened)
    plain = shortened(json.loads((folder / GOLDEN).read_text()))
    known = few_places(plain)
    random = np.random.default_rng(0)
    ends: Counter[str] = Counter()
    for _ in range(150):
        (folder / GOLDEN).write_text(json.dumps(edit(plain, known, random)))
        try:
            ends["right" if prove(opened, backend, require_golden(opened)).right else "wrong"] += 1
        except (BundleError, BackendError) as error:
            ends[type(error).__name__] += 1
    assert ends["BundleError"] > 75
    assert ends["wrong"] > 0
    assert ends["right"] > 0  # a field that only people read


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (("version",), 3, "version 3, this package reads 1 and 2"),
        (("request", "frames"), 200, "the request has 1616 tokens, at most 1024 are run"),
        (("request", "answer"), 7, "logits behind 9 tokens, expected 8"),
        (("request", "scale"), 0.0, "request.scale"),
        (("runs", 1, "cost"), 0.0, "cost: expected a number, more than 0"),
        (("runs", 0, "kept", 0, 3), 2, "not ascending places of 64 tokens"),
        (("runs", 0, "kept"), [[63]], "tokens of 1 segments, the bundle has 3"),
        (("runs", 0, "logits", 0, "values"), [0.0], "1 logits"),
        (("runs", 0, "logits", 0, "largest"), 0.0, "more than 0"),
        (("limits", "numbers"), 3.0, "at most 0.5"),
        (("tower", "picture", "height"), 7, "does not fit the vision tower"),
        (("tower", "picture", "height"), 256, "the tower's rows are|at most 4096"),
        (("tower", "picture", "patches"), 4097, "at most 4096"),
        (("tower", "shape"), [1, 20, 33], r"the tower's rows are \(1, 20, 33\)"),
    ],
)
def test_a_contradiction_is_said(folder: Path, at: tuple[Any, ...], value: Any, words: str) -> None:
    plain = json.loads((folder / GOLDEN).read_text())
    holder = plain
    for key in at[:-1]:
        holder = holder[key]
    holder[at[-1]] = value
    (folder / GOLDEN).write_text(json.dumps(plain))
    with pytest.raises(BundleError, match=words):
        read_golden(Bundle(folder, verify=False))


def test_every_number_has_a_rule() -> None:
    """A field without one would be read as it comes."""
    for kind, rules in RULES.items():
        fields = {name: str(hint) for name, hint in kind.__annotations__.items()}
        counted = {name for name, hint in fields.items() if any(word in hint for word in ("int", "float", "str"))}
        assert counted == set(rules) - {"runs", "calls", "logits"}, kind


def test_it_is_written_as_it_is_read(folder: Path) -> None:
    opened = Bundle(folder)
    golden = require_golden(opened)
    assert isinstance(golden, Golden)
    assert golden.limits.of("similarity") == golden.limits.numbers  # as goldens of older builds have it
    assert golden_to_json(golden) == json.loads((folder / GOLDEN).read_text())
    assert (folder / GOLDEN).stat().st_size < 300_000
