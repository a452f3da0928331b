"""OpenVINO beside ONNX Runtime and beside numpy: numbers, caches, tokens, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framefusion.errors import BackendError, BundleError, CheckFailedError
from framefusion.runtime.backends.base import Backend
from framefusion.runtime.backends.host import host_array
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.backends.openvino import operators
from framefusion.runtime.backends.openvino.backend import IN_BF16, OpenVinoBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.prefill import Prefilled
from framefusion.runtime.machine import cpu
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.proof.blocks import cases, checks
from framefusion.runtime.proof.opening import open_proven
from framefusion.runtime.request import Step, Stopwatch
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import shared
from tests.commands import assert_refused, run

pytest.importorskip("openvino", reason="it is not installed: pip install openvino")
pytest.importorskip("torch")  # what draws the clip imports it
from tests.families.case import clip

pytestmark = pytest.mark.slow
HAS_BF16 = bool({"avx512_bf16", "amx_bf16"} & cpu.features())
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no products in bfloat16")
FOLDER = Path(cases.__file__).parent
STEPS = 12
TURNS = [Turn("user", (Visual.VIDEO, "What happens?"))]


@pytest.fixture(autouse=True)
def proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of other runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["bundle", "fixed-gqa"])
def opened(request: pytest.FixtureRequest) -> Bundle:
    return Bundle(shared(request.param), verify=False)


def pipeline(bundle: Bundle, **how: Any) -> Pipeline:
    model = bundle.manifest.model
    return Pipeline(bundle, OpenVinoBackend(bundle.folder, model.dtype, 1, manifest=bundle.manifest, **how))


def reference(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle, OnnxRuntimeBackend(bundle.folder, 1, manifest=bundle.manifest))


def endless(bundle: Bundle, cost: float | None) -> Request:
    """A request whose answer ends at its limit."""
    return Request(STEPS, cost=cost, generation=replace(bundle.manifest.generation, eos_token_ids=(), do_sample=False))


def steps(pipeline: Pipeline, cost: float | None) -> tuple[list[int], Any]:
    """Tokens of an answer, and the logits behind each."""
    request = endless(pipeline.bundle, cost)
    found = [step for step in pipeline.stream(TURNS, [clip()], request, logits=True) if step.token_id is not None]
    return [step.token_id or 0 for step in found], np.stack([np.asarray(step.logits) for step in found])


@pytest.mark.parametrize(
    ("dtype", "in_place"),
    [
        ("float32", True),
        ("float32", False),
        ("float16", True),
        ("float16", False),
        pytest.param("bfloat16", True, marks=needs_bf16),
    ],
)
def test_building_blocks_are_those_of_numpy(dtype: str, in_place: bool) -> None:
    backend = OpenVinoBackend(FOLDER, dtype, 1, in_place=in_place)
    name = cases.graph_name("gqa", dtype)
    importance = "bfloat16" if dtype == "bfloat16" else "float32"
    found = list(checks.check_graph_blocks(backend, name, dtype, importance))
    assert {check.block for check in found} == set(cases.BLOCKS.values())
    assert [check for check in found if not check.right] == []
    assert backend.graph(name).in_place == in_place


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_building_blocks_over_codes_are_those_of_numpy(dtype: str) -> None:
    backend = OpenVinoBackend(FOLDER, dtype, 1, coded_caches=True)
    name = cases.graph_name("gqa", dtype)
    found = list(checks.check_graph_blocks(backend, name, dtype, caches="uint8"))
    assert [check for check in found if not check.right] == []
    over_codes = [check for check in found if check.block == cases.BLOCKS["attended"]]
    assert max(check.error for check in over_codes) > 1e-4, "the caches hold floats"


def test_equal_tokens_and_the_same_numbers(opened: Bundle) -> None:
    """Sums in another order: 1e-6 of the largest logit a layer is what fp32 differs by, 2e-5 is ten times that here."""
    theirs = reference(opened)
    adaptive = opened.manifest.reduction.mode == "adaptive"
    for in_place in (True, False):
        ours = pipeline(opened, in_place=in_place)
        for cost in (1.0, 0.5, 0.3) if adaptive else (None,):
            tokens, logits = steps(ours, cost)
            expected, numbers = steps(theirs, cost)
            assert tokens == expected, (in_place, cost)
            assert np.abs(logits - numbers).max() < 2e-5 * np.abs(numbers).max(), (in_place, cost)


@needs_bf16
def test_bf16_is_within_the_limit_of_bf16(bundle: Path) -> None:
    opened = Bundle(bundle, verify=False)
    _, logits = steps(pipeline(opened, in_bf16=True), 1.0)
    _, numbers = steps(reference(opened), 1.0)
    error = float(np.abs(logits[0] - numbers[0]).max() / np.abs(numbers[0]).max())
    assert 1e-4 < error < 5e-2  # what is nearer was not computed in bf16


def prefilled_by(pipeline: Pipeline) -> Prefilled:
    prompt, rows = pipeline.read(TURNS, [clip()])
    return pipeline.prefill(prompt, rows, endless(pipeline.bundle, 0.5), Stopwatch())


def consumers(model: Any) -> Mapping[str, set[str]]:
    """Kinds of the operations that read each cache, once OpenVINO has compiled a graph."""
    kinds: dict[str, set[str]] = {}
    for node in model.get_runtime_model().get_ordered_ops():
        for given in node.inputs():
            name = given.get_source_output().get_node().get_friendly_name()
            if name.startswith("past_"):
                kinds.setdefault(name, set()).add(str(node.get_rt_info()["layerType"].get()))
    return kinds


@pytest.mark.parametrize(("dtype", "in_bf16"), [("float32", False), pytest.param("float32", True, marks=needs_bf16)])
def test_caches_are_written_where_they_lie(bundle: Path, dtype: str, in_bf16: bool) -> None:
    opened = Bundle(bundle, verify=False)
    ours = pipeline(opened, in_bf16=in_bf16)
    prefilled = prefilled_by(ours)
    expected = prefilled_by(reference(opened))
    backend = ours.backend
    assert isinstance(backend, OpenVinoBackend)
    for record, cache, numbers in zip(opened.manifest.segments, prefilled.caches, expected.caches, strict=True):
        # 1. Attention reads our memory itself: nothing lies between, which would be a copy.
        kinds = consumers(backend.graph(record.prefill).model)
        assert {name: found - {"ShapeOf"} for name, found in kinds.items()} == {
            name: {"PagedAttention"} for name in cache.named("past")
        }
        # 2. And what it wrote is there: whole blocks, as long as the prompt that is left.
        assert cache.lengths.tolist() == numbers.lengths.tolist()
        for mine, theirs in zip(cache.keys + cache.values, numbers.keys + numbers.values, strict=True):
            assert mine.shape[2] % operators.BLOCK == 0
            assert mine.dtype.name == ("bfloat16" if in_bf16 else dtype)
            length = int(cache.lengths[0])
            written = host_array(mine)[:, :, :length].astype(np.float32)
            wanted = host_array(theirs)[:, :, :length]
            assert np.abs(written - wanted).max() < (5e-2 if in_bf16 else 1e-5) * np.abs(wanted).max()


def test_a_conversation_goes_on_where_its_caches_end(bundle: Path) -> None:
    """Caches grow between turns, in whole blocks, and a prefill follows what is in them."""
    opened = Bundle(bundle, verify=False)
    answers = []
    for subject in (pipeline(opened), reference(opened)):
        session = subject.session()
        tokens = []
        for parts, files in (((Visual.VIDEO, "What happens?"), [clip()]), (("And then?",), []), (("Why?",), [])):
            found = session.stream([Turn("user", parts)], files, endless(opened, 0.5))
            tokens.append([step.token_id for step in found if step.token_id is not None])
        assert [record.restart for record in session.records] == [None] * 3
        answers.append(tokens)
    assert answers[0] == answers[1]


def test_several_callers_get_what_each_would_get_alone(bundle: Path) -> None:
    opened = Bundle(bundle, verify=False)
    ours = pipeline(opened)
    costs = (1.0, 0.5, 0.3, 0.5)
    alone = [steps(ours, cost)[0] for cost in costs]
    with ThreadPoolExecutor(len(costs)) as pool:
        together = list(pool.map(lambda cost: steps(ours, cost)[0], costs))
    assert together == alone


@pytest.mark.parametrize("in_bf16", [False, pytest.param(True, marks=needs_bf16)])
def test_requests_are_decoded_together(bundle: Path, in_bf16: bool) -> None:
    """Rows of unequal lengths over shared slabs, and one that leaves while the others go on."""
    opened = Bundle(bundle, verify=False)
    ours = pipeline(opened, in_bf16=in_bf16)
    assert ours.segments.batch_refusal is None
    assert "copies caches" in (pipeline(opened, in_place=False).segments.batch_refusal or "")
    prompt, rows = ours.read(TURNS, [clip()])

    def answer(cost: float, tokens: int, batch: DecodeBatch | None) -> Iterator[Step]:
        request = replace(endless(opened, cost), max_new_tokens=tokens)
        prefilled = ours.prefill(prompt, rows, request, Stopwatch())
        return ours.decode(prompt, prefilled, request, Stopwatch(), logits=True, batch=batch)

    plans = ((1.0, 4), (0.5, STEPS), (0.3, STEPS))
    alone = [[step for step in answer(*plan, None) if step.kind == "token"] for plan in plans]
    sizes: list[int] = []
    batch = DecodeBatch(ours.segments, sizes.append)
    running = [answer(*plan, batch) for plan in plans]
    together: list[list[Step]] = [[] for _ in plans]
    for _ in range(STEPS + 2):
        for steps, found in zip(running, together, strict=True):
            found += [step for step in (next(steps, None),) if step is not None and step.kind == "token"]
    assert sizes == [3] * 3 + [2] * (STEPS - 4)
    for mine, theirs in zip(together, alone, strict=True):
        logits, expected = (np.stack([np.asarray(step.logits) for step in steps]) for steps in (mine, theirs))
        assert np.abs(logits - expected).max() < (5e-2 if in_bf16 else 2e-5) * np.abs(expected).max()
        assert in_bf16 or [step.token_id for step in mine] == [step.token_id for step in theirs]


def test_the_commands_say_what_they_run_in(bundle: Path) -> None:
    for name in ("openvino", *([IN_BF16] if HAS_BF16 else [])):
        result = run("check", bundle, "--backend", name)
        assert result.exit_code == 0, result.output
        assert f"{name} on this device: right" in result.stdout
        assert ("5.7e-02" if name == IN_BF16 else "1.0e-04") in result.stdout
        shown = run("generate", bundle, "--prompt", "Why?", "--max-new-tokens", 2, "--backend", name, "--json")
        assert shown.exit_code == 0, shown.output
        assert f'"name": "{name}"' in shown.stdout
    refused = run("check", shared("fixed-gqa"), "--backend", IN_BF16)
    assert_refused(refused, BackendError, "decides in a graph" if HAS_BF16 else "no products in bfloat16")


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention whose scores are a tenth too large, without an error."""
    inner = operators.attention_scale
    monkeypatch.setattr(operators, "attention_scale", lambda width: 1.1 * inner(width))


@pytest.mark.usefixtures("scaled")
def test_wrong_answers_are_refused(bundle: Path) -> None:
    opened = Bundle(bundle, verify=False)
    with pytest.raises(CheckFailedError, match="openvino answers wrongly on this device"):
        open_proven(opened, "openvino", threads=1)
    found = list(checks.check_graph_blocks(OpenVinoBackend(FOLDER), "gqa-float32.onnx", "float32"))
    assert {check.block for check in found if not check.right} == {cases.BLOCKS["attended"]}


def test_a_release_with_another_operator_copies_caches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle(bundle, verify=False)
    inner = operators._last_inputs
    monkeypatch.setattr(operators, "_last_inputs", lambda longest: inner(longest)[:-1])
    ours = pipeline(opened)
    assert steps(ours, 0.5)[0] == steps(reference(opened), 0.5)[0]
    backend = ours.backend
    assert isinstance(backend, OpenVinoBackend)
    assert not any(backend.graph(segment.prefill).in_place for segment in opened.manifest.segments)


def test_a_strangers_graph_is_refused_before_openvino_reads_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    onnx = pytest.importorskip("onnx", reason="it is not installed: it makes the graph that is refused")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    name = "segments/rest/graph.onnx"
    model = onnx.load(folder / name, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Loop", ["a", "b"], ["c"]))
    (folder / name).write_bytes(model.SerializeToString())
    read: list[str] = []
    monkeypatch.setattr("framefusion.runtime.backends.openvino.backend.read_model", lambda path, **_: read.append(path))
    backend: Backend = OpenVinoBackend(folder, manifest=Bundle(bundle, verify=False).manifest)
    with pytest.raises(BundleError, match="operator 'Loop' is none of those that builds write"):
        backend.open([name])
    assert read == []


def test_what_openvino_refuses_is_an_error_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """A file that is another type than the graph says is found by the reader, in one line without a stack."""
    onnx = pytest.importorskip("onnx", reason="it is not installed: it makes the graph that is refused")
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("MatMul", ["x", "y"], ["z"])]
    given = [value("x", 1, [2, 3]), value("y", 1, [2, 3])]
    graph = onnx.helper.make_graph(nodes, "wrong", given, [value("z", 1, [2, 3])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "wrong.onnx")
    with pytest.raises(BundleError, match=r"wrong\.onnx cannot be loaded by openvino 20\d\d") as refused:
        OpenVinoBackend(tmp_path).open(["wrong.onnx"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "gone",
    [
        "first.clear(); second.clear()",
        "second.clear(); thread = Thread(target=first.clear); thread.start(); thread.join()",
    ],
    ids=["in the order of opening", "on another thread"],
)
def test_ctrl_c_is_an_exception_behind_backends_that_are_gone(bundle: Path, gone: str) -> None:
    """OpenVINO's cores leave their thread a stack for signals that is unmapped."""
    program = f"""
import gc, signal, sys
from pathlib import Path
from threading import Thread
from framefusion.runtime.backends.openvino.backend import OpenVinoBackend
folder = Path(sys.argv[1])
first = [OpenVinoBackend(folder)]
second = [OpenVinoBackend(folder)]
for backend in (*first, *second):
    backend.open(["segments/rest/graph.onnx"])
del backend
{gone}
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run((sys.executable, "-c", program, bundle), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
