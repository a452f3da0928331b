"""TensorRT engines of the tiny bundle against ONNX Runtime on the CPU, on a GPU: `make test-gpu`.

Without one, test_tensorrt_emulated.py (tests/runtime/backends/tensorrt) runs this very file over an emulated driver and
library.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from framefusion.errors import BackendError, BundleError
from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.cuda.array import device_array
from framefusion.runtime.backends.cuda.device import CudaDevice
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.backends.tensorrt.backend import TensorRTBackend, TensorRTSegment
from framefusion.runtime.backends.tensorrt.library import LibraryKind, load_library
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.generation.batching.decode_batch import DecodeBatch
from framefusion.runtime.generation.decode import Decoder, GreedyDecoder
from framefusion.runtime.machine.gpu import find_gpu
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.prove import prove
from framefusion.runtime.request import Step, Stopwatch
from framefusion.runtime.text.positions import decode_positions
from framefusion.runtime.text.prompt import Turn, Visual
from tests.bundles import COST
from tests.conftest import made_once
from tests.gpu.driver_calls import Calls

pytestmark = pytest.mark.gpu
EMULATED = "EMULATED_TENSORRT" in os.environ
EXACT = os.environ.get("EMULATED_TENSORRT") == "float32"  # which no engine is built in
DTYPE: Literal["float32", "float16"] = "float32" if EXACT else "float16"
# fp32: the same products in another order. fp16: 2^-11 for each of some dozen roundings along the residual stream.
NEAR = 2e-5 if EXACT else 2e-2
KEPT_ALIKE = 1.0 if EXACT else 0.9  # in fp16 a score next to the threshold may fall on its other side
LEFT = 1 << 12 if EMULATED else 16 << 20  # bytes: less than the kernels of four engines
STEPS = 6
QUESTIONS = ("What happens in this video?", "Who?")


def usable_kind() -> LibraryKind:
    """The library that has kernels for this GPU."""
    gpu, reasons = find_gpu(), []
    assert gpu is not None
    kinds: tuple[LibraryKind, ...] = ("tensorrt-rtx", "tensorrt")
    for kind in kinds:
        try:
            load_library(kind).check_targets((gpu.capability,))
        except BackendError as error:  # noqa: PERF203
            reasons.append(str(error))
        else:
            return kind
    pytest.skip("; ".join(reasons))


@pytest.fixture(scope="module", params=["adaptive", "fixed"])
def portable(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle to compile."""
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    options = BuildOptions(
        cost=COST, similarity_lower_bound=0.9, depth=1, dialect="portable", dtype=DTYPE, max_input_len=192,
        max_kv_cache_capacity=256,
    )  # fmt: skip
    if request.param == "fixed":
        options = replace(options, reduction="fixed", merge_shares=(0.3,), prune_layer=1, max_text_len=64)
    make: Callable[[Path], object] = lambda to: build(Checkpoint(checkpoint), to, options, verify=False)  # noqa: E731
    return made_once(tmp_path_factory, f"to-compile-{request.param}", make)


@pytest.fixture(scope="module")
def bundle(portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With engines for this GPU."""
    scratch = tmp_path_factory.mktemp("engines")
    if EMULATED:
        from tests.runtime.backends.tensorrt.emulated_tensorrt import compile_for_emulation, install

        install()
        return compile_for_emulation(Bundle(portable, verify=False), scratch)
    from framefusion.export.engines.compile import compile_bundle
    from framefusion.export.options import EngineOptions, Resources

    gpu = find_gpu()
    assert gpu is not None
    compile_bundle(portable, EngineOptions(usable_kind(), (gpu.capability,)), Resources(cache=scratch))
    return Bundle(portable)


@pytest.fixture(scope="module")
def kind(bundle: Bundle) -> LibraryKind:
    found = bundle.manifest.engines[0].kind
    return "tensorrt" if found == "tensorrt" else "tensorrt-rtx"


@pytest.fixture(scope="module")
def kernels(portable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"kernels-{portable.name}")


@pytest.fixture(scope="module")
def ours(bundle: Bundle, kind: LibraryKind, kernels: Path) -> Pipeline:
    return Pipeline(bundle, TensorRTBackend(bundle, kind, kernels=kernels))


@pytest.fixture(scope="module")
def theirs(portable: Path) -> Pipeline:
    return Pipeline(Bundle(portable, verify=False), OnnxRuntimeBackend(portable, threads=1))


def watched(pipeline: Pipeline, question: str, film: Path) -> dict[str, Any]:
    """Rows of a prompt, places kept, logits of a prefill and of steps that say fixed tokens."""
    prompt, rows = pipeline.read([Turn("user", (Visual.VIDEO, question))], [film])
    done = pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch())
    decoder, logits = Decoder(pipeline.segments, done.caches), [done.logits.copy()]
    cos, sin = pipeline.rope(decode_positions(prompt.token_ids.size, prompt.rope_delta, STEPS))
    for step in range(STEPS - 1):
        row = pipeline.embedding(np.array([7 * step + 5]))[0]
        logits.append(decoder.step(row, cos[step], sin[step]).copy())
    hidden = pipeline.backend.device.download(rows.hidden)[: rows.length].astype(np.float32)
    return {"rows": hidden, "kept": [set(map(int, kept)) for kept in done.kept], "logits": np.stack(logits)}


def test_a_greedy_token_is_one_graph_and_one_id(ours: Pipeline, film: Path) -> None:
    """What comes to the host is the token before, 16 bytes; nothing goes there, and the host waits once."""
    device: Any = ours.backend.device
    prompt, rows = ours.read([Turn("user", (Visual.VIDEO, QUESTIONS[0]))], [film])
    done = ours.prefill(prompt, rows, Request(STEPS + 4), Stopwatch())
    decoder = Decoder(ours.segments, done.caches)
    rotary = ours.rope(decode_positions(prompt.token_ids.size, prompt.rope_delta, STEPS + 4))
    table = ours.embedding.upload(device, decoder.float_type)
    assert table is not None
    greedy = GreedyDecoder(decoder, ours.embedding, table, rotary, ours.manifest.model.vocab_size)
    token = int(done.logits.argmax())
    for step in range(STEPS):
        with Calls(device) as calls:
            token = greedy.step(token)
        if step > 2:
            assert calls["cuGraphLaunch"] == 1
            assert calls.journeys == (0, 0, 1)
            assert calls.waits == 1


def test_greedy_tokens_are_those_of_the_logits(ours: Pipeline, film: Path) -> None:
    turns = [Turn("user", (Visual.VIDEO, QUESTIONS[0]))]
    request = Request(STEPS, generation=replace(ours.manifest.generation, eos_token_ids=()))
    answers = [
        [step.token_id for step in ours.stream(turns, [film], request, logits=logits) if step.kind == "token"]
        for logits in (False, True)
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == STEPS


def apart(found: Any, expected: Any) -> float:
    """The largest difference, of the largest magnitude expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_the_golden_is_reproduced(ours: Pipeline, bundle: Bundle) -> None:
    proof = prove(bundle, ours.backend, require_golden(bundle))
    assert proof.right, proof.stages
    assert any("decoded logits" in stage.what for stage in proof.stages)
    assert [stage.what for stage in proof.stages[-2:]] == [
        "8 rows at once: decoded logits",
        "tokens chosen on the device",
    ]


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_the_cpu(ours: Pipeline, theirs: Pipeline, film: Path, question: str) -> None:
    found, expected = watched(ours, question, film), watched(theirs, question, film)
    assert apart(found["rows"], expected["rows"]) < NEAR
    for own, other in zip(found["kept"], expected["kept"], strict=True):
        assert len(own) == len(other)  # the budget counts tokens, whichever they are
        assert len(own & other) >= KEPT_ALIKE * len(other)
    if found["kept"] == expected["kept"]:  # else the logits are those of another prompt
        assert apart(found["logits"], expected["logits"]) < NEAR
    else:
        assert np.isfinite(found["logits"]).all()


def test_text_alone(ours: Pipeline, theirs: Pipeline) -> None:
    turn = [Turn("user", ("What do you see?",))]
    logits = []
    for pipeline in (ours, theirs):
        prompt, rows = pipeline.read(turn)
        logits.append(pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch()).logits.copy())
    assert apart(*logits) < NEAR
    assert len(ours.generate(turn, [], Request(STEPS)).token_ids) > 0


def test_an_earlier_request_does_not_show(ours: Pipeline, film: Path) -> None:
    first = watched(ours, QUESTIONS[0], film)
    watched(ours, "Something else, and longer than that?", film)
    np.testing.assert_array_equal(watched(ours, QUESTIONS[0], film)["logits"], first["logits"])


def test_steps_are_replayed_from_a_captured_graph(ours: Pipeline, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ours.backend
    assert isinstance(backend, TensorRTBackend)
    replayed = watched(ours, QUESTIONS[0], film)["logits"]
    assert backend.captured
    monkeypatch.setattr(TensorRTSegment, "capturable", False)
    backend.forget_graphs()
    np.testing.assert_array_equal(watched(ours, QUESTIONS[0], film)["logits"], replayed)
    assert not backend.captured


def steps_of(
    pipeline: Pipeline, request: Request, film: Path | None, question: str, batch: DecodeBatch | None
) -> Iterator[Step]:
    """Token steps of a request, by itself or in a batch."""
    turn = Turn("user", (question,) if film is None else (Visual.VIDEO, question))
    laid_out, rows = pipeline.read([turn], [] if film is None else [film])
    stopwatch = Stopwatch()
    done = pipeline.prefill(laid_out, rows, request, stopwatch)
    steps = pipeline.decode(laid_out, done, request, stopwatch, logits=True, batch=batch)
    return (replace(step, logits=np.array(step.logits)) for step in steps if step.kind == "token")


def assert_alike(found: Sequence[Step], expected: Sequence[Step], limit: float) -> None:
    """The same tokens with logits this near; a token that rounding decides ends the comparison."""
    for ours, theirs in zip(found, expected, strict=False):
        assert apart(ours.logits, theirs.logits) <= limit
        if ours.token_id != theirs.token_id:
            assert not EXACT
            return


def test_requests_are_decoded_together(ours: Pipeline, film: Path) -> None:
    """Drawn joins and leaves: a row has what its request has by itself, in fp32 bit for bit, whoever is there."""
    assert ours.segments.batch_refusal is None
    assert ours.segments.max_batch_size == 8
    generation = replace(ours.manifest.generation, eos_token_ids=())
    kinds = [
        (film, QUESTIONS[0], 12),
        (None, "Hello", 9),
        (film, QUESTIONS[1], 4),
        (None, "What do you see there?", 14),
    ]
    alone, in_a_batch = [], []
    for shown, question, count in kinds:
        request = Request(count, generation=generation)
        alone.append(list(steps_of(ours, request, shown, question, None)))
        in_a_batch.append(list(steps_of(ours, request, shown, question, DecodeBatch(ours.segments))))
        assert_alike(in_a_batch[-1], alone[-1], NEAR)
        assert len(in_a_batch[-1]) == count
    random = np.random.default_rng(0)
    rows: list[int] = []
    batch = DecodeBatch(ours.segments, rows.append)
    running: list[tuple[int, Iterator[Step], list[Step]]] = []
    for number in range(60):
        while len(running) < 8 and number < 40 and random.random() < 0.7:
            kind = int(random.integers(len(kinds)))
            (shown, question, count) = kinds[kind]
            running.append((kind, steps_of(ours, Request(count, generation=generation), shown, question, batch), []))
        for each in list(running):
            (kind, steps, found) = each
            if random.random() < 0.1:  # a consumer that is slow: its row is not fed
                continue
            step = next(steps, None)
            found += [] if step is None else [step]
            if step is None or random.random() < 0.02:  # at its end, or given up
                steps.close()  # type: ignore[attr-defined]
                assert_alike(found, in_a_batch[kind], 0.0 if EXACT else NEAR)
                running.remove(each)
    for kind, steps, found in running:
        found += steps
        assert_alike(found, in_a_batch[kind], 0.0 if EXACT else NEAR)
        assert len(found) == kinds[kind][2]
    assert max(rows) > 4
    assert len(batch) == 0


def test_a_step_of_a_batch_is_replayed_for_each_number_of_rows(ours: Pipeline) -> None:
    """Slabs stay where they are: who joins a batch as large as one before finds its graph."""
    device: Any = ours.backend.device
    generation = replace(ours.manifest.generation, eos_token_ids=())
    batch = DecodeBatch(ours.segments)
    launches: list[int] = []
    for _ in range(2):
        running = [steps_of(ours, Request(8, generation=generation), None, f"Hello {n}", batch) for n in range(3)]
        for steps in running:
            next(steps)
        for _ in range(4):
            with Calls(device) as calls:
                for steps in running:
                    next(steps)
            launches.append(calls["cuGraphLaunch"])
        for steps in running:
            steps.close()  # type: ignore[attr-defined]
    assert launches == [0, 1, 1, 1, *[1] * 4]


def test_more_requests_than_an_engine_has_rows_are_refused(ours: Pipeline) -> None:
    batch = DecodeBatch(ours.segments)
    rows = []
    for _ in range(8):
        prompt, content = ours.read("Hello")
        rows.append(batch.join(ours.prefill(prompt, content, Request(4), Stopwatch()).caches))
    prompt, content = ours.read("Hello")
    with pytest.raises(BackendError, match=r"8 requests are decoded, .*--max-batch-size"):
        batch.join(ours.prefill(prompt, content, Request(4), Stopwatch()).caches)
    for row in rows:
        row.leave()
    assert len(batch) == 0


@pytest.mark.skipif(not EMULATED, reason="engines of one row would be compiled for it")
def test_engines_of_one_row_answer_and_say_what_brings_more(
    portable: Path, ours: Pipeline, kind: LibraryKind, tmp_path: Path
) -> None:
    from tests.runtime.backends.tensorrt.emulated_tensorrt import compile_for_emulation

    one_row = compile_for_emulation(Bundle(portable, verify=False), tmp_path, 1)
    backend = TensorRTBackend(one_row, kind, kernels=tmp_path)
    pipeline = Pipeline(one_row, backend)
    refusal = pipeline.segments.batch_refusal
    assert refusal is not None
    assert refusal.startswith(f"the engines of {kind} decode one row: compile them with several, ff-export compile")
    (found, expected) = (list(steps_of(each, Request(4), None, "Hello", None)) for each in (pipeline, ours))
    assert_alike(found, expected, NEAR)


def test_slabs_that_have_no_room_are_declined(
    ours: Pipeline, kind: LibraryKind, bundle: Bundle, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TensorRTBackend(bundle, kind, kernels=kernels)
    monkeypatch.setattr(CudaDevice, "free_memory", lambda device: 1)
    refusal = backend.batch_refusal(bundle.manifest.segments[0].decode)
    assert refusal is not None
    assert re.match(r"the caches of 8 requests take .*, .* has 1 B free: compile with a smaller --max-batch", refusal)


def test_caches_are_allocated_once(ours: Pipeline, film: Path) -> None:
    prompt, rows = ours.read([Turn("user", (Visual.VIDEO, "What?"))], [film])
    places = []
    for _ in range(3):
        done = ours.prefill(prompt, rows, Request(STEPS), Stopwatch())
        places.append([device_array(keys).address for cache in done.caches for keys in (*cache.keys, *cache.values)])
        del done
        gc.collect()
    assert places[0] == places[1] == places[2]


def test_kernels_are_kept_for_the_next_process(ours: Pipeline, film: Path, kind: LibraryKind, kernels: Path) -> None:
    watched(ours, QUESTIONS[0], film)
    backend = ours.backend
    assert isinstance(backend, TensorRTBackend)
    if not hasattr(load_library(kind).module, "IRuntimeCache"):
        pytest.skip("TensorRT proper compiles nothing at run time")
    backend.loader.save()
    (kept,) = kernels.iterdir()
    assert kept.stat().st_size > 0


def test_the_engines_are_chosen(bundle: Bundle, kind: LibraryKind) -> None:
    chosen = choose(bundle, kind)
    assert chosen.option.backend == kind
    assert choose(bundle).option.device == "cuda"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("1.0",)}, "it was built for 1.0 and"),
        ({"version": "1.2.0"}, "1.2.0 and"),
    ],
)
def test_engines_for_something_else_are_refused(
    bundle: Bundle, kind: LibraryKind, changes: dict[str, Any], words: str
) -> None:
    engines = tuple(replace(engine, **changes) for engine in bundle.manifest.engines)
    with pytest.raises(BackendError, match=words):
        TensorRTBackend(bundle.with_manifest(engines=engines), kind)


@pytest.mark.parametrize("content", [b"", b"not an engine" * 20])
def test_files_that_are_no_engines_are_refused(
    bundle: Bundle, kind: LibraryKind, tmp_path: Path, content: bytes
) -> None:
    path, first = tmp_path / "broken.engine", bundle.manifest.engines[0]
    path.write_bytes(content)
    broken = replace(first, file=str(path))
    files = {**bundle.manifest.files, str(path): replace(bundle.manifest.files[first.file], size=len(content))}
    other = bundle.with_manifest(engines=(broken, *bundle.manifest.engines[1:]), files=files)
    with pytest.raises((BackendError, BundleError), match=r"broken\.engine"):
        TensorRTBackend(other, kind).open([first.graph])


def test_a_full_gpu_is_refused_before_anything_is_loaded(bundle: Bundle, kind: LibraryKind) -> None:
    device = CudaDevice(np.float32)
    others = device.empty((device.free_memory() - LEFT,), np.uint8)  # what else runs on it
    with pytest.raises(BackendError, match=r"the engines need .* of GPU memory \(weights .*--max-kv-cache-capacity"):
        TensorRTBackend(bundle, kind)
    del others
    device.synchronize()
