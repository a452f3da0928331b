"""ONNX Runtime's CUDA provider against its CPU kernels, on a GPU with onnxruntime-gpu: `make test-gpu`.

Not run anywhere yet: the emulated driver has no CUDA provider.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from framefusion.runtime.backends.choice import choose
from framefusion.runtime.backends.onnxruntime.backend import CUDA_PROVIDER, OnnxRuntimeBackend, OnnxRuntimeCudaBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.proof.golden import require_golden
from framefusion.runtime.proof.opening import open_proven
from framefusion.runtime.proof.prove import prove
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Turn
from tests.bundles import COST
from tests.conftest import made_once
from tests.gpu.test_tensorrt import QUESTIONS, STEPS, apart, watched

pytestmark = pytest.mark.gpu
NEAR = 2e-2  # fp16, as for engines: 2^-11 for each of some dozen roundings along the residual stream
KEPT_ALIKE = 0.9


@pytest.fixture(scope="module", params=["gqa", "portable"])
def pair(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Pipeline]:
    """The same bundle on the GPU and on the CPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has no CUDA provider: pip install onnxruntime-gpu in its place")
    from framefusion.export.build import build
    from framefusion.export.checkpoints.checkpoint import Checkpoint
    from framefusion.export.options import BuildOptions

    options = BuildOptions(
        cost=COST, similarity_lower_bound=0.9, depth=1, dialect=request.param, dtype="float16", max_input_len=192
    )
    make: Callable[[Path], object] = lambda to: build(Checkpoint(checkpoint), to, options, verify=False)  # noqa: E731
    bundle = Bundle(made_once(tmp_path_factory, f"for-cuda-{request.param}", make))
    chosen = choose(bundle, "onnxruntime", "cuda")
    return Pipeline(bundle, choice=chosen), Pipeline(bundle, OnnxRuntimeBackend(bundle.folder, threads=1))


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_those_of_the_cpu(pair: tuple[Pipeline, Pipeline], film: Path, question: str) -> None:
    assert isinstance(pair[0].backend, OnnxRuntimeCudaBackend)
    found, expected = (watched(pipeline, question, film) for pipeline in pair)
    assert apart(found["rows"], expected["rows"]) < NEAR
    for own, other in zip(found["kept"], expected["kept"], strict=True):
        assert len(own) == len(other)
        assert len(own & other) >= KEPT_ALIKE * len(other)
    if found["kept"] == expected["kept"]:
        assert apart(found["logits"], expected["logits"]) < NEAR


def test_nothing_is_left_over_between_requests(pair: tuple[Pipeline, Pipeline], film: Path) -> None:
    first = watched(pair[0], QUESTIONS[0], film)
    watched(pair[0], QUESTIONS[1], film)
    np.testing.assert_array_equal(watched(pair[0], QUESTIONS[0], film)["logits"], first["logits"])


def test_text_alone(pair: tuple[Pipeline, Pipeline]) -> None:
    logits = []
    for pipeline in pair:
        prompt, rows = pipeline.read([Turn("user", ("What do you see?",))])
        logits.append(pipeline.prefill(prompt, rows, Request(STEPS), Stopwatch()).logits.copy())
    assert apart(*logits) < NEAR


def test_a_gpu_that_does_not_reproduce_the_golden_is_never_taken(pair: tuple[Pipeline, Pipeline]) -> None:
    bundle = pair[0].bundle
    right = prove(bundle, pair[0].backend, require_golden(bundle)).right
    taken = open_proven(bundle).choice.option
    assert (taken.backend, taken.device) == ("onnxruntime", "cuda" if right else "cpu")
    assert right, "this GPU answers wrongly with this onnxruntime: the proof found it, and the CPU was taken"
