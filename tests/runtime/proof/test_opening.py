"""What is opened is right on this device: proven once, remembered, refused by name where it is wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from framefusion.errors import BackendError, CheckFailedError
from framefusion.reduction import policy
from framefusion.runtime.backends import host, table
from framefusion.runtime.backends.choice import Option, choose
from framefusion.runtime.backends.table import BACKENDS, BackendKind
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.families import qwen2_vl
from framefusion.runtime.format.manifest import QuantizationRecord, WeightFormatRecord
from framefusion.runtime.generation import embedder
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.gpu import GPU
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.media import tower_kinds, visual_input
from framefusion.runtime.pipeline import Pipeline
from framefusion.runtime.proof import rehearsal, remembered
from framefusion.runtime.proof.opening import check_backend, open_proven
from framefusion.runtime.proof.remembered import Verdict, combination_of, combination_of_blocks, recall, remember
from framefusion.runtime.text import positions
from tests.commands import assert_refused, run
from tests.runtime.bundle_edits import copied, edited
from tests.runtime.proof.wrong_backends import OPENED, Honest
from tests.tiers import in_tiers

WRONG = "tests.runtime.proof.wrong_backends:open_wrong"
HONEST = "tests.runtime.proof.wrong_backends:open_honest"
RUNS = "tests.runtime.proof.test_opening:runs_anything"
NAME = "first-choice"
NO_GOLDEN = "no golden: rebuild the bundle to have one"
GPU_9_0 = GPU("NVIDIA H200", "9.0", 141 << 30, (13, 0))


def runs_anything(_row: BackendKind, _bundle: Bundle, _machine: Machine) -> None:
    """Nothing speaks against it."""


def first(opener: str, **row: Any) -> tuple[BackendKind, ...]:
    """The table with a backend before all others."""
    return (BackendKind(NAME, ("cpu",), "onnxruntime", opener, problem=RUNS, **row), *BACKENDS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which nothing is remembered, and no backend opened yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    OPENED.clear()
    return tmp_path / "cache" / "framefusion-aot" / "proofs"


@pytest.fixture(name="old")
def without_golden(bundle: Path, tmp_path: Path) -> Path:
    folder = copied(bundle, tmp_path / "old")
    (folder / "golden.json").unlink()
    return edited(folder, lambda plain: plain["files"].pop("golden.json"))


def said(bundle: Bundle, **how: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    return open_proven(bundle, say=lines.append, **how), lines


def generated(bundle: Path, picture: Path, *flags: str) -> Any:
    return run("generate", bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 2, "--verbose", *flags)


def test_the_first_answer_proves_and_the_next_one_remembers(bundle: Path, picture: Path, cache: Path) -> None:
    result = generated(bundle, picture)
    assert result.exit_code == 0, result.output
    line, summary, *_ = result.stderr.splitlines()
    assert line.startswith("onnxruntime on cpu proven on this device, once: right, largest error ")
    assert summary.startswith("backend: onnxruntime on cpu (right on this device); not ")
    assert len(list(cache.iterdir())) == 1
    again = generated(bundle, picture)
    assert again.stderr.splitlines()[0] == summary
    assert again.stdout == result.stdout


def test_no_check_proves_nothing(bundle: Path, picture: Path, cache: Path) -> None:
    result = generated(bundle, picture, "--no-check")
    assert result.stderr.startswith("backend: onnxruntime on cpu; not ")
    assert not cache.exists()
    generated(bundle, picture)
    assert "(right on this device)" in generated(bundle, picture, "--no-check").stderr


def test_a_pipeline_is_opened_with_what_is_right(bundle: Path) -> None:
    pipeline = Pipeline(Bundle(bundle), threads=1)
    assert pipeline.choice is not None
    assert pipeline.choice.proven
    assert pipeline.choice.facts["right_here"]
    assert not choose(pipeline.bundle).proven  # by what is committed alone nothing is


def test_a_wrong_backend_is_passed_over_by_name(
    bundle: Path, picture: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "BACKENDS", first(WRONG))
    result = generated(bundle, picture)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"{NAME} proven on this device, once: wrong: dense: decoded logits are off by ")
    assert lines[1].startswith("onnxruntime on cpu proven on this device, once: right")
    assert f"not {NAME}: it answers wrongly on this device (wrong: dense: decoded logits are off" in lines[2]
    assert OPENED == ["ScalesACache"]
    again = generated(bundle, picture)
    assert OPENED == ["ScalesACache"]  # it is remembered as wrong, too
    assert again.stderr.splitlines()[0] == lines[2]
    assert len(list(cache.iterdir())) == 2


def test_a_wrong_backend_that_is_named_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BACKENDS", first(WRONG))
    opened = Bundle(bundle)
    for _ in range(2):
        with pytest.raises(CheckFailedError, match=f"{NAME} answers wrongly on this device .*decoded logits"):
            open_proven(opened, NAME)
    with pytest.raises(CheckFailedError):
        open_proven(opened, NAME, check=False)  # what is remembered counts all the same


def test_what_is_right_is_opened_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BACKENDS", first(HONEST))
    opened, lines = said(Bundle(bundle))
    assert opened.choice.option.backend == NAME
    assert opened.choice.text == f"backend: {NAME} (experimental, right on this device)"
    assert not opened.choice.proven  # no committed result shows it
    assert (OPENED, len(lines)) == (["Honest"], 1)


@pytest.mark.parametrize("changed", ["library", "device", "code", "bundle"])
def test_whatever_changes_is_proven_again(
    bundle: Path, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle(bundle)
    assert len(said(opened)[1]) == 1
    assert said(opened)[1] == []
    if changed == "library":
        monkeypatch.setattr(onnxruntime, "__version__", "9.0.0")
    elif changed == "device":
        monkeypatch.setattr(cpu, "model_name", lambda: "another")
    elif changed == "code":
        monkeypatch.setattr(remembered, "own_code", lambda: "0" * 32)
    else:
        opened = Bundle(edited(copied(bundle, tmp_path / "other"), lambda plain: plain["tools"].update(x="1")))
    assert len(said(opened)[1]) == 1


def test_another_driver_or_gpu_is_another_combination(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened = Bundle(bundle)
    machine = replace(Machine.here(), gpu=GPU_9_0)
    option = replace(choose(opened).option, device="cuda")
    known = combination_of(opened, option, machine)
    assert known.device == "NVIDIA H200, compute capability 9.0"
    others = [replace(machine, gpu=replace(GPU_9_0, **change)) for change in ({"cuda": (13, 1)}, {"capability": "8.9"})]
    assert len({known.entry, *(combination_of(opened, option, other).entry for other in others)}) == 3
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159\nGCC version\n")
    monkeypatch.setattr(remembered, "NVIDIA_DRIVER", driver)
    assert combination_of(opened, option, machine).driver.endswith("Kernel Module  580.159")


def opens_another_version(bundle: Bundle, *_: Any) -> Any:
    """A library that, once it is loaded, gives its version with a suffix, as torch's "2.9.0+cpu"."""
    setattr(onnxruntime, "__version__", f"{onnxruntime.__version__}+cpu")  # noqa: B010
    return Honest(bundle)


def test_what_a_check_finds_is_what_the_next_answer_looks_up(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "9.0.0")
    monkeypatch.setattr(table, "BACKENDS", first("tests.runtime.proof.test_opening:opens_another_version"))
    opened = Bundle(bundle)
    machine = Machine.here()
    before = combination_of(opened, choose(opened, NAME).option, machine)
    check_backend(opened, NAME)
    assert onnxruntime.__version__ == "9.0.0+cpu"
    assert recall(before) is not None


def test_another_compiler_of_our_kernels_is_another_combination(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle(bundle)
    machine = replace(Machine.here(), gpu=GPU_9_0)
    cpu_option = choose(opened).option
    known = set()
    for version in ("13.9.1", "13.9.2"):
        site = tmp_path / version
        metadata = site / "nvidia_cuda_nvrtc-99.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: nvidia-cuda-nvrtc\nVersion: {version}\n")
        sys.path.insert(0, str(site))
        try:
            library = combination_of(opened, replace(cpu_option, device="cuda"), machine).library
            assert library.endswith(f", nvidia-cuda-nvrtc {version}")
            assert "nvrtc" not in combination_of(opened, cpu_option, machine).library
            known.add(library)
        finally:
            sys.path.remove(str(site))
    assert len(known) == 2


@pytest.mark.parametrize(
    "content",
    in_tiers([b"", b"{}", b"[1]", b"\xff", b'{"right": true, "text": "right"}', b"x" * 100_000], fast=2),
    ids=["empty", "no entry", "a list", "no text", "of nothing", "too long"],
)
def test_what_cannot_be_believed_counts_as_absent(bundle: Path, cache: Path, content: bytes) -> None:
    opened = Bundle(bundle)
    said(opened)
    (entry,) = cache.iterdir()
    entry.write_bytes(content)
    assert len(said(opened)[1]) == 1
    assert json.loads(entry.read_text())["right"] is True


def test_an_entry_of_another_combination_or_user_counts_as_absent(bundle: Path, cache: Path) -> None:
    opened = Bundle(bundle)
    here = combination_of(opened, choose(opened).option, Machine.here())
    other = replace(here, library="onnxruntime 0.1")
    remember(other, Verdict(True, "right"), {})
    here.entry.write_bytes(other.entry.read_bytes())
    assert recall(here) is None
    remember(here, Verdict(False, "wrong"), {})
    assert recall(here) == Verdict(False, "wrong")
    here.entry.chmod(0o666)
    assert recall(here) is None


def test_files_that_were_not_compared_are_not_remembered(bundle: Path, cache: Path) -> None:
    assert len(said(Bundle(bundle, verify=False))[1]) == 1
    assert not cache.exists()


def test_a_bundle_without_a_golden_is_opened_as_before(old: Path, cache: Path) -> None:
    opened, lines = said(Bundle(old))
    assert opened.choice.text.startswith("backend: onnxruntime on cpu; not ")
    assert lines == []
    assert not cache.exists()


def test_what_was_wrong_once_is_never_taken_unproven(bundle: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BACKENDS", first(HONEST, wrong_once="that device"))
    for opened, _ in (said(Bundle(old)), said(Bundle(bundle), check=False)):
        assert opened.choice.option.backend == "onnxruntime"
        assert f"not {NAME}: it was not proven on this device (" in opened.choice.text
        assert "and answered wrongly without an error on that device" in opened.choice.text
    assert open_proven(Bundle(old), NAME).choice.option.backend == NAME  # whoever names it takes it as it is
    assert open_proven(Bundle(bundle)).choice.option.backend == NAME
    assert open_proven(Bundle(bundle), check=False).choice.option.backend == NAME  # it is remembered


def test_onnxruntime_on_a_gpu_is_such_a_backend() -> None:
    assert [(row.name, row.devices) for row in BACKENDS if row.wrong_once] == [("onnxruntime", ("cuda",))]


def test_a_backend_that_fails_is_passed_over_or_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BACKENDS", first("tests.runtime.proof.wrong_backends:open_failing"))
    opened, _ = said(Bundle(bundle))
    assert f"not {NAME}: it fails on the golden's request (no kernel for this device)" in opened.choice.text
    with pytest.raises(BackendError, match="no kernel for this device"):
        open_proven(Bundle(bundle), NAME)


def test_the_command_remembers_what_it_finds(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("check", bundle, "--json").exit_code == 0
    assert generated(bundle, picture).stderr.startswith("backend: onnxruntime on cpu (right on this device)")
    monkeypatch.setattr(table, "BACKENDS", first(WRONG))
    result = run("check", bundle, "--json")
    assert_refused(result, CheckFailedError, f"{NAME} on this device: wrong: dense: decoded logits")
    facts = json.loads(result.stdout)
    assert (facts["backend"], facts["right"]) == (NAME, False)
    assert NO_GOLDEN not in result.stderr


def test_blocks_that_doctor_found_wrong_keep_a_backend_from_their_bundles(bundle: Path) -> None:
    opened = Bundle(bundle)
    machine = replace(Machine.here(), openvino=None)  # which would be taken next
    option = choose(opened, machine=machine).option
    model = opened.manifest
    text = "ff-run doctor: attention over a cache, chunk: error 1.0e+00, limit 4.0e-03"
    # 1. Those of another type say nothing of this bundle.
    other = combination_of_blocks(model.dialect, "bfloat16", option, machine)
    remember(other, Verdict(False, text), {})
    assert open_proven(opened).choice.right_here
    # 2. Blocks that are right do not stand for the bundle's golden, which is run all the same.
    blocks = combination_of_blocks(model.dialect, model.model.dtype, option, machine)
    combination_of(opened, option, machine).entry.unlink()
    remember(blocks, Verdict(True, text), {})
    _, lines = said(opened)
    assert len(lines) == 1
    # 3. Wrong ones refuse it before anything is opened, also without a check and for a bundle without a golden.
    combination_of(opened, option, machine).entry.unlink()
    remember(blocks, Verdict(False, text), {})
    for how in ({}, {"check": False}, {"name": option.backend}):
        with pytest.raises(CheckFailedError, match=r"ff-run doctor: attention over a cache, chunk"):
            open_proven(opened, machine=machine, **how)


@pytest.mark.parametrize(
    ("form", "wrong_in", "refused"),
    [
        (None, "int8", False),
        (WeightFormatRecord(4, 32, True, 28), "int8", False),
        (WeightFormatRecord(8, 0, True, 28, "float"), "int8", False),
        (WeightFormatRecord(8, 128, True, 28), "int8", True),
        (WeightFormatRecord(8, 128, True, 28), "", True),
    ],
)
def test_wrong_products_keep_a_backend_from_bundles_of_such_codes(
    bundle: Path, form: WeightFormatRecord | None, wrong_in: str, refused: bool
) -> None:
    """Also where the golden passed before: it has ordinary numbers, and doctor has others."""
    opened = Bundle(bundle)
    machine = replace(Machine.here(), openvino=None)  # which would be taken next
    model = opened.manifest
    option = choose(opened, machine=machine).option
    if form is not None:
        opened.manifest = replace(model, quantization=QuantizationRecord("search", False, (form,), 1))
    assert open_proven(opened, machine=machine).choice.right_here
    text = "ff-run doctor: product of int8, blocks of 128, step, largest: error 1.0e-01, limit 4.0e-03"
    subject = (model.dialect, model.model.dtype, option, machine)
    remember(combination_of_blocks(*subject, weights=wrong_in), Verdict(False, text), {})
    if refused:
        for how in ({}, {"check": False}, {"name": option.backend}):
            with pytest.raises(CheckFailedError, match="ff-run doctor: product of int8"):
                open_proven(opened, machine=machine, **how)
    else:
        assert open_proven(opened, machine=machine).choice.right_here


def test_blocks_are_remembered_in_the_type_that_a_backend_computes_in(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = first(HONEST, computes="bfloat16", blocks="-")
    monkeypatch.setattr(table, "BACKENDS", rows)
    opened = Bundle(bundle)
    machine = Machine.here()
    option = Option(NAME, "cpu")
    assert opened.manifest.model.dtype == "float32"
    subject = combination_of_blocks(opened.manifest.dialect, "bfloat16", option, machine)
    remember(subject, Verdict(False, "ff-run doctor: rotary"), {})
    with pytest.raises(CheckFailedError, match="ff-run doctor: rotary"):
        open_proven(opened, NAME, machine=machine)


def test_a_proof_holds_for_the_code_that_it_goes_through() -> None:
    """From a tower's inputs to logits: a package whose code differs there has proven nothing yet."""
    hashed = {path.resolve() for path in remembered._sources()}
    for module in (tower_kinds, visual_input, embedder, positions, host, policy, qwen2_vl, rehearsal):
        assert Path(str(module.__file__)).resolve() in hashed, module.__name__
