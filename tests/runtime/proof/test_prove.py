"""A backend that is right reproduces the golden, and one that is wrong anywhere does not, and is told where."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import CheckFailedError
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.prove import Proof, prove
from tests.commands import assert_refused, run
from tests.runtime.bundle_edits import copied, edited, resealed
from tests.runtime.proof.wrong_backends import (
    AnswersNaN,
    BlursTheTower,
    Chooses,
    ConfusesRows,
    Honest,
    LosesImportance,
    LosesNumbers,
    MisplacesSimilarity,
    Misreads,
    ScalesACache,
)


def proof_of(folder: Path, kind: type[Honest] = Honest) -> Proof:
    bundle = Bundle(folder)
    return prove(bundle, kind(bundle), require_golden(bundle))


def wrong_in(proof: Proof) -> set[str]:
    return {stage.what for stage in proof.stages if not stage.right}


def test_onnxruntime_on_the_cpu_is_right(bundle: Path) -> None:
    proof = proof_of(bundle)
    assert proof.right
    names = [stage.what for stage in proof.stages]
    assert names[:3] == ["rows of the vision tower", "dense: logits", "dense: decoded logits"]
    assert "cost 0.3: importance" in names
    assert "cost 0.4: similarity" in names
    assert names[-2:] == ["dense, in parts: logits", "3 rows at once: decoded logits"]
    assert (proof.stages[-1].error, proof.stages[-1].note) == (0.0, "")  # bit for bit
    assert proof.worst.error < 2e-5  # the limit is not what makes it right
    assert proof.text.startswith("right, largest error ")


def test_tokens_that_a_device_chooses_are_compared_with_its_own_logits(bundle: Path) -> None:
    right = proof_of(bundle, Chooses)
    assert right.right
    assert (right.stages[-1].what, right.stages[-1].error) == ("tokens chosen on the device", 0.0)
    wrong = proof_of(bundle, Misreads)
    assert wrong_in(wrong) == {"tokens chosen on the device"}
    assert 0.1 < wrong.stages[-1].error <= 1


def test_weights_of_another_checkpoint_in_one_segment(bundle: Path, tmp_path: Path) -> None:
    folder = copied(bundle, tmp_path / "bundle")
    name = "segments/rest/weights.bin"
    weights = np.fromfile(folder / name, np.float32)
    weights[len(weights) // 2 :] *= 1.05
    weights.tofile(folder / name)
    proof = proof_of(resealed(folder, name))
    assert "dense: logits" in wrong_in(proof)
    assert "rows of the vision tower" not in wrong_in(proof)
    assert_refused(run("check", folder), CheckFailedError, "onnxruntime on cpu", "dense: logits are off by")


@pytest.mark.parametrize(
    ("kind", "stages", "right"),
    [
        (ScalesACache, {"dense: decoded logits", "cost 0.3: decoded logits"}, {"dense: logits", "cost 0.3: logits"}),
        (MisplacesSimilarity, {"cost 0.4: similarity", "cost 0.3: similarity"}, {"dense: logits"}),
        (LosesImportance, {"cost 0.3: kept tokens", "cost 0.3: importance"}, {"dense: logits"}),
        (LosesNumbers, {"cost 0.3: kept tokens", "cost 0.3: importance"}, {"dense: logits"}),
        (ConfusesRows, {"3 rows at once: decoded logits"}, {"dense: decoded logits", "cost 0.3: decoded logits"}),
        (AnswersNaN, {"dense: logits", "dense: decoded logits"}, {"rows of the vision tower"}),
        (BlursTheTower, {"rows of the vision tower"}, {"dense: logits", "cost 0.3: logits"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_is_wrong_is_named(bundle: Path, kind: type[Honest], stages: set[str], right: set[str]) -> None:
    proof = proof_of(bundle, kind)
    assert not proof.right
    assert stages <= wrong_in(proof)
    assert not right & wrong_in(proof)
    assert proof.text.startswith(f"wrong: {proof.worst.what} are off by ")


def test_a_golden_whose_tokens_do_not_follow_from_its_scores_is_not_reproduced(bundle: Path) -> None:
    opened = Bundle(bundle)
    golden = require_golden(opened)
    runs = list(golden.runs)
    (index,) = (i for i, run in enumerate(runs) if run.cost == 0.3)
    kept = list(runs[index].kept)
    missing = sorted(set(range(golden.request.length)) - set(kept[-1]))
    kept[-1] = tuple(sorted({*kept[-1][:5], *kept[-1][6:], missing[0]}))
    runs[index] = replace(runs[index], kept=tuple(kept))
    proof = prove(opened, Honest(opened), replace(golden, runs=tuple(runs)))
    assert "cost 0.3: kept tokens" in wrong_in(proof)


def test_a_dense_run_that_keeps_other_tokens_is_not_left_out(bundle: Path) -> None:
    opened = Bundle(bundle)
    golden = require_golden(opened)
    dense, *others = golden.runs
    fewer = replace(dense, kept=tuple(tokens[1:] for tokens in dense.kept))
    proof = prove(opened, Honest(opened), replace(golden, runs=(fewer, *others)))
    assert wrong_in(proof) == {"dense: kept tokens"}
    assert "dense: logits" in [stage.what for stage in proof.stages]


@pytest.mark.parametrize("name", ["similarity", "importance"])
def test_scores_that_only_one_of_the_two_read_are_wrong(bundle: Path, name: str) -> None:
    opened = Bundle(bundle)
    golden = require_golden(opened)
    runs = list(golden.runs)
    (index,) = (i for i, run in enumerate(runs) if run.cost == 0.3)
    nothing: dict[str, Any] = {name: ()}
    runs[index] = replace(runs[index], calls=tuple(replace(call, **nothing) for call in runs[index].calls))
    proof = prove(opened, Honest(opened), replace(golden, runs=tuple(runs)))
    assert wrong_in(proof) == {f"cost 0.3: {name}"}


def test_a_bundle_of_an_older_build_has_none_and_says_so(bundle: Path, tmp_path: Path) -> None:
    folder = copied(bundle, tmp_path / "bundle")
    edited(folder, lambda plain: plain["files"].pop("golden.json"))
    (folder / "golden.json").unlink()
    result = run("check", folder)
    assert result.exit_code == 13
    assert "no golden: rebuild the bundle to have one" in result.stderr
    shutil.rmtree(folder)


def test_the_command_prints_a_table(bundle: Path) -> None:
    result = run("check", bundle)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["compared", "with", "the", "golden", "error", "limit"]
    assert lines[-1].startswith("onnxruntime on cpu on this device: right, largest error ")
    assert all(line.endswith("right") for line in lines[2:-1])
