"""What keeps OpenVINO from a bundle, told from a manifest and a description of a machine: nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefusion.errors import BackendError
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.openvino import fit
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.machine import cpu
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.proof.golden import EXACT, GoldenLimits, golden_in, require_golden, rounding_limit
from tests.bundles import shared

WITH = Machine(None, ("CPUExecutionProvider",), "1.31.0", bindings=False, openvino="2026.4.1")
BOTH = ("openvino", "openvino-bf16")


@pytest.fixture(name="bundle")
def opened(bundle: Path) -> Bundle:
    return Bundle(bundle, verify=False)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512f", "avx512_bf16"}))


def in_type(bundle: Bundle, dtype: Any) -> Bundle:
    return bundle.with_manifest(model=replace(bundle.manifest.model, dtype=dtype))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("machine", "changes", "problem"),
    [
        (replace(WITH, openvino=None), {}, r"openvino is not installed \(pip install .*openvino\]"),
        (replace(WITH, openvino="2026.2.0"), {}, r"2026\.3\.0 is the first .*pip install -U 'openvino>=2026\.3\.0'"),
        (WITH, {"dialect": "portable"}, r"has no TensorScatter, .* \(build the bundle again with --dialect gqa\)"),
        (WITH, {"files": {}}, "the bundle has engines only"),
    ],
)
def test_what_keeps_it_from_a_bundle(
    bundle: Bundle, name: str, machine: Machine, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BackendError, match=problem):
        choose(bundle.with_manifest(**changes), name, machine=machine)


def test_bf16_wants_a_processor_that_has_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(bundle, "openvino-bf16", machine=WITH).option.backend == "openvino-bf16"
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512f"}))
    for name, dtype in (("openvino-bf16", "float32"), ("openvino", "bfloat16")):
        with pytest.raises(BackendError, match=r"no products in bfloat16 \(avx512_bf16 or amx_bf16\)"):
            choose(in_type(bundle, dtype), name, machine=WITH)
    assert choose(bundle, "openvino", machine=WITH).option.backend == "openvino"


@pytest.mark.parametrize(("name", "dtype"), [("openvino-bf16", "float32"), ("openvino", "bfloat16")])
def test_a_graph_that_decides_by_itself_is_refused_in_bf16(name: str, dtype: str) -> None:
    fixed = Bundle(shared("fixed-gqa"), verify=False)
    with pytest.raises(BackendError, match="what decides in a graph in float32"):
        choose(in_type(fixed, dtype), name, machine=WITH)
    assert choose(fixed, "openvino", machine=WITH).option.backend == "openvino"


def test_a_type_that_is_not_the_bundles_is_never_taken_by_itself(bundle: Bundle) -> None:
    without = replace(WITH, onnxruntime=None, providers=())
    chosen = choose(bundle, machine=without)
    assert (chosen.option.backend, chosen.option.device) == ("openvino", "cpu")
    refused: list[str] = []

    def everything(option: Any) -> tuple[str, str]:
        refused.append(option.backend)
        return "wrong", "none"

    with pytest.raises(BackendError, match="nothing can run this bundle"):
        choose(bundle, machine=without, objection=everything)
    assert refused == ["openvino"]


def test_a_bundle_in_bf16_runs_on_a_cpu_that_has_it(bundle: Bundle) -> None:
    half = in_type(bundle, "bfloat16")
    chosen = choose(half, machine=WITH)
    assert chosen.option.backend == "openvino"
    assert "not onnxruntime on cpu: the bundle is in bfloat16" in chosen.text.replace("; ", "\n")
    with pytest.raises(BackendError, match="openvino is not installed"):
        choose(half, machine=replace(WITH, openvino=None))


def test_another_type_has_its_own_limits(bundle: Bundle) -> None:
    golden = require_golden(bundle)
    layers = bundle.manifest.model.num_layers
    assert golden.limits == GoldenLimits(EXACT, 0.0)
    wider = golden_in(golden, "bfloat16", layers)
    assert wider.limits == GoldenLimits(rounding_limit("bfloat16", layers), 0.05)
    assert wider.limits.numbers == pytest.approx(8 * rounding_limit("float16", layers))
    assert golden_in(wider, "float32", layers).limits == wider.limits  # a wider one of the bundle stays
    assert fit.LEAST == (2026, 3, 0)  # pyproject.toml says the same to pip
