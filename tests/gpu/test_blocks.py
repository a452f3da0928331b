"""The building blocks on a GPU: this package's kernels, and ONNX Runtime's of both dialects: `make test-gpu`.

ONNX Runtime's part has not been run anywhere yet.
"""

from __future__ import annotations

import pytest

from framefusion.runtime.backends.onnxruntime.backend import CUDA_PROVIDER
from framefusion.runtime.proof.blocks.child import prove_backend, prove_device

pytestmark = pytest.mark.gpu


def test_kernels_compute_what_numpy_does() -> None:
    facts = prove_device("cuda")
    assert facts["state"] == "right", facts["problem"]


def test_onnxruntime_computes_what_numpy_does() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("the installed onnxruntime has no CUDA provider: pip install onnxruntime-gpu in its place")
    facts = prove_backend("onnxruntime", "cuda")
    found = {
        (graph["dialect"], graph["dtype"]): graph["worst"] for graph in facts["graphs"] if graph["state"] != "right"
    }
    assert found == {}, facts["problem"]
