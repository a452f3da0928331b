"""The two libraries: what is missing or unknown is told before anything is built."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from framefusion.errors import BackendError
from framefusion.installation import install_command
from framefusion.runtime.backends.tensorrt import library as tensorrt_library
from framefusion.runtime.backends.tensorrt.library import Library, dotted, load_library
from framefusion.runtime.machine.gpu import GPU

trt = pytest.importorskip("tensorrt_rtx")


def without_targets(gpu: GPU | None, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The library as `tensorrt` is: the very module, less the words for other GPUs than the one at hand."""
    monkeypatch.setattr(tensorrt_library, "find_gpu", lambda: gpu)
    return Library("tensorrt", ModuleType("tensorrt"), "11.4.0", load_library("tensorrt-rtx").messages)


@pytest.mark.parametrize("word", ["86", "8.6", "sm_86", "SM86", " 86 "])
def test_a_compute_capability_has_one_name(word: str) -> None:
    assert dotted(word) == "8.6"
    assert dotted("120") == "12.0"


def test_targets_are_what_the_library_knows() -> None:
    library = load_library("tensorrt-rtx")
    assert library.version == trt.__version__
    assert not library.measures
    assert library.check_targets(("120", "8.6", "86")) == ("8.6", "12.0")
    assert set(library.check_targets(())) == {target for target in library.capabilities if float(target) >= 8}
    with pytest.raises(BackendError, match=r"--target-sm 9.0,x: tensorrt-rtx .* only for 75,80,86,89,120,121"):
        library.check_targets(("90", "86", "x"))


def test_the_other_library_builds_for_the_gpu_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    here = without_targets(GPU("Some GPU", "8.9", 1 << 34, (13, 0)), monkeypatch)
    assert here.measures
    assert here.check_targets(()) == here.check_targets(("89",)) == ("8.9",)
    with pytest.raises(BackendError, match=r"--target-sm 86 is not the GPU of this machine \(8.9\)"):
        here.check_targets(("86", "89"))


def test_no_gpu_for_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"here is none: build there, or with --backend tensorrt-rtx"):
        without_targets(None, monkeypatch).check_targets(())


def test_a_library_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=re.escape(f"tensorrt is not installed: {install_command('tensorrt')}")):
        load_library("tensorrt")
    with pytest.raises(BackendError, match="'onednn' is unknown, known are tensorrt-rtx, tensorrt"):
        load_library("onednn")


def test_a_library_too_old_for_caches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 11 whose attention layers have no lengths; and JetPack 6.0 has 8.6, which runs no network of ours."""
    old = SimpleNamespace(
        __version__="11.0.0", IAttentionInputLayer=trt.IAttentionInputLayer, IAttention=SimpleNamespace(mask=None)
    )
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(BackendError, match=r"tensorrt 11.0.0 has no IAttention.key_value_lengths.*pip install -U"):
        load_library("tensorrt")
    for version in ("8.6.2", "10.2.0.19"):
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
        with pytest.raises(BackendError, match=rf"tensorrt {version} is older than 10.3, .*JetPack, to 6.1 or later"):
            load_library("tensorrt")


def test_a_library_without_layers_for_attention_is_taken_for_plain_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT 10.3's bindings have, and nothing of what came later."""
    members = {name: getattr(trt, name) for name in (
        "NetworkDefinitionCreationFlag", "ExecutionContextAllocationStrategy", "IExecutionContext", "ICudaEngine",
        "IProgressMonitor", "ILogger")}  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0", **members))
    library = load_library("tensorrt")
    assert library.variants == ("plain",)
    assert library.check_variant(None) == "plain"
    del members["IProgressMonitor"]
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0", **members))
    with pytest.raises(BackendError, match=r"tensorrt 10.3.0 has no IProgressMonitor"):
        load_library("tensorrt")
