"""Real engines, built without a GPU: their files, bytes, profiles and targets; what ends a build. None is run here."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from framefusion.errors import BackendError, StorageError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.engines.builder import EngineFacts, EngineSpec
from framefusion.export.engines.tensorrt import network as tensorrt_network
from framefusion.export.engines.tensorrt.build import build_engine, estimate_memory
from framefusion.export.engines.tensorrt.profiles import CODE_BYTES, graph_axes, row_axes, weight_bytes
from framefusion.export.graphs.tracing.trace import trace
from framefusion.export.options import BuildOptions, EngineOptions
from framefusion.export.plan.build_plan import BuildPlan
from framefusion.runtime.backends.tensorrt.library import plain_options
from framefusion.runtime.bundle import file_record
from framefusion.runtime.format.engine_record import ProfileRecord
from tests.export.engines.tensorrt.tensorrt_graphs import (
    LOOKED_AT,
    REST,
    TINY,
    tiny_segment,
    write_graph,
    write_segment,
)
from tests.wheel import ROOT

pytest.importorskip("tensorrt_rtx")
CAPACITY = 64
# a shape that kernels exist for, with weights that outweigh the code of a profile
WIDE = replace(TINY, hidden_size=768, intermediate_size=3072, num_heads=6, num_kv_heads=2, head_dim=128)
TRAINED = ROOT / "tests" / "models" / "tiny_qwen2_vl"
VIDEO = 64 * 210  # visual tokens


class StopError(Exception):
    """Somebody has seen enough."""


def spec_of(
    graph: Path,
    sizes: Sequence[int | tuple[int, int]],
    targets: tuple[str, ...] = ("8.6",),
    capacities: tuple[int, ...] = (CAPACITY, CAPACITY),
) -> EngineSpec:
    """Static profiles of these sizes: tokens of one row, or tokens and rows."""
    axis_sizes = {f"capacity_{j}": size for j, size in enumerate(capacities)}
    profiles = []
    for size, rows in ((size, 1) if isinstance(size, int) else size for size in sizes):
        axis_sizes |= {"tokens": size} | row_axes(rows, len(capacities))
        shapes = {
            name: (tuple(axis if isinstance(axis, int) else axis_sizes[axis] for axis in shape),)
            for name, shape in graph_axes(graph).items()
        }
        profiles.append(ProfileRecord(f"{size}", size, shapes))
    return EngineSpec(graph, "tensorrt-rtx", targets, "float16", capacities, tuple(profiles))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_segment(tmp_path_factory)


@pytest.mark.slow
def test_a_builder_loads_its_library_once(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.export.engines.tensorrt import build

    builder = build.TensorRTBuilder("tensorrt-rtx")
    monkeypatch.setattr(build, "load_library", lambda kind: pytest.fail(f"{kind} is loaded again"))
    builder.check(EngineOptions("tensorrt-rtx", ("86",)))
    with pytest.raises(BackendError, match=r"--target-sm 3\.3"):
        builder.check(EngineOptions("tensorrt-rtx", ("33",)))
    facts = builder.build(spec_of(graph, (2,)), tmp_path / "e", None, lambda _: None)
    assert facts.file == file_record(tmp_path / "e")


@pytest.mark.slow
def test_an_engine_and_what_it_says_of_itself(graph: Path, tmp_path: Path) -> None:
    shares: list[float] = []
    target = tmp_path / "rest.engine"
    facts = build_engine(spec_of(graph, (2,), ("8.6", "8.9", "12.0")), target, progress=shares.append)
    content = target.read_bytes()
    assert (facts.size, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert facts.targets == ("8.6", "8.9", "12.0")
    assert [path.name for path in tmp_path.iterdir()] == ["rest.engine"]
    bindings = {(tensor.name, tensor.mode): (tensor.dtype, tensor.shape) for tensor in facts.tensors}
    assert bindings[("hidden", "input")] == ("float16", (1, -1, 32))
    assert bindings[("kv_len", "input")] == ("int64", (2,))
    assert bindings[("logits", "output")] == ("float32", (1, TINY.vocab_size))
    assert (
        bindings[("past_key_1", "input")] == bindings[("present_key_1", "output")] == ("float16", (1, 1, CAPACITY, 16))
    )
    assert facts.layer_kinds["KV_CACHE_UPDATE"] == 4
    assert facts.timing_cache is None
    assert shares == sorted(shares)
    assert shares[-1] > 0.9


def test_what_raises_in_the_progress_ends_the_build(graph: Path, tmp_path: Path) -> None:
    def stop(share: float) -> None:
        raise StopError

    (tmp_path / "rest.engine").write_bytes(b"an older engine")
    with pytest.raises(StopError):
        build_engine(spec_of(graph, (2,)), tmp_path / "rest.engine", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["rest.engine"]
    assert (tmp_path / "rest.engine").read_bytes() == b"an older engine"


def test_a_folder_that_cannot_be_written(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/rest.engine cannot be written \(No such file or directory\)"):
        build_engine(spec_of(graph, (2,)), tmp_path / "nowhere" / "rest.engine")


def test_types_without_kernels_are_refused(graph: Path, tmp_path: Path) -> None:
    spec, target = spec_of(graph, (2,)), tmp_path / "rest.engine"
    with pytest.raises(BackendError, match="no fused attention in float32: build the bundle with --dtype float16 or"):
        build_engine(replace(spec, dtype="float32"), target)
    with pytest.raises(BackendError, match=r"GPUs of compute capability 7.5 have no bfloat16"):
        build_engine(replace(spec, dtype="bfloat16", targets=("7.5", "8.6")), target)
    assert not target.exists()


@pytest.mark.slow
def test_turing_gets_what_it_can(tmp_path: Path) -> None:
    """No bfloat16, and no product in fp32: that of the importance is spelled out."""
    graph = write_segment(tmp_path / "graph.onnx", plan=LOOKED_AT)
    facts = build_engine(spec_of(graph, (32, 2), ("7.5",), (CAPACITY,)), tmp_path / "e")
    plain = build_engine(spec_of(graph, (32, 2), ("8.6",), (CAPACITY,)), tmp_path / "e")
    assert facts.layer_kinds["REDUCE"] == plain.layer_kinds["REDUCE"] + 1
    assert (facts.targets, plain.targets) == (("7.5",), ("8.6",))


@pytest.mark.slow
def test_ctrl_c_ends_a_build(graph: Path, tmp_path: Path) -> None:
    """In the main thread, from the first word of progress on."""
    interrupted = threading.Event()

    def interrupt(share: float) -> None:
        if not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(spec_of(graph, (48, 32, 2)), tmp_path / "rest.engine", progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from framefusion.export.checkpoints.tensors.hashed_file import HashedFile

    write = HashedFile.write

    def full(file: HashedFile, content: bytes | memoryview) -> int:
        if file.position + len(content) > 1 << 20:
            raise OSError(28, "No space left on device")
        return write(file, content)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        build_engine(spec_of(graph, (2,)), tmp_path / "rest.engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_profiles_share_the_weights_and_targets_cost_nothing(dtype: str, tmp_path: Path) -> None:
    """Weights of 17 MB or more, of which a decode of one token gets a copy; the code of a profile is about 2."""
    graph = write_segment(tmp_path / "graph.onnx", WIDE, LOOKED_AT, getattr(torch, dtype))
    weights = weight_bytes(graph)
    assert weights > 8 * CODE_BYTES

    def size(sizes: tuple[int, ...], targets: tuple[str, ...] = ("8.6",)) -> int:
        return build_engine(replace(spec_of(graph, sizes, targets, (CAPACITY,)), dtype=dtype), tmp_path / "e").size

    single_profile, built, single = size((48,)), size((48, 32, 2)), size((48, 32, 1))
    assert weights < single_profile < built < weights + 3 * 2 * CODE_BYTES
    assert abs(single - built - weights) < 2 * CODE_BYTES
    assert abs(size((48, 32, 2), ("8.6", "8.9", "12.0")) - built) < built / 100


BATCHES = ((1, 2), (1, 4), (1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["attention", "plain"])
def test_steps_of_several_rows_share_the_weights_those_of_the_head_included(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's last token is taken twice; taken once, the last MLP and the head had their weights twice."""
    graph = write_segment(tmp_path / "graph.onnx", replace(WIDE, vocab_size=4096), REST)
    options = plain_options(one_length=True) if variant == "plain" else {}

    def built(sizes: Sequence[int | tuple[int, int]]) -> EngineFacts:
        return build_engine(replace(spec_of(graph, sizes), options=options), tmp_path / "e")

    one_row = built((48, 2))
    several = built((48, 2, *BATCHES))
    assert 0 < several.size - one_row.size < len(BATCHES) * 2 * CODE_BYTES
    shapes = {tensor.name: tensor.shape for tensor in several.tensors}
    assert (shapes["hidden"], shapes["kv_len"], shapes["logits"]) == ((-1, -1, 768), (-1,), (-1, 4096))
    assert {tensor.name: tensor.shape for tensor in one_row.tensors}["hidden"] == (1, -1, 768)
    if variant == "attention":
        assert several.layer_kinds["KV_CACHE_UPDATE"] == one_row.layer_kinds["KV_CACHE_UPDATE"] == 4
        assert shapes["past_key_1"] == (-1, 2, CAPACITY, 128)
    monkeypatch.setattr(tensorrt_network, "take_last_twice", lambda model: None)
    head = 2 * 768 * 4096  # bytes
    assert built((48, 2, *BATCHES)).size > several.size + head


@pytest.mark.slow
def test_a_graph_of_whom_nobody_told_the_size_is_refused(graph: Path, tmp_path: Path) -> None:
    """A free axis without a profile: the library's own words come through."""
    with pytest.raises(BackendError, match=r"cannot build .*graph.onnx for compute capability 8.6: .*profile"):
        build_engine(replace(spec_of(graph, (2,)), profiles=()), tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_the_estimate_of_memory_grows_with_weights(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of the 7B shape and eight profiles took 0.99 GB, beside 0.47 GB of weights mapped from their file."""
    from framefusion.export.engines.tensorrt import build as tensorrt_build

    monkeypatch.setattr(tensorrt_build, "weight_bytes", lambda path: 466_115_584)
    estimate = estimate_memory(spec_of(graph, (2,) * 8))
    assert 0.99e9 < estimate < 2.0e9


FIXED = {
    "prune behind two plain layers": (("trained", BuildOptions(reduction="fixed", cost=0.6, merge_shares=(0.3,),
                                                               prune_layer=2, max_input_len=192, max_text_len=64,
                                                               num_decoder_layer=4, dialect="portable"))),
    "tiny": (("checkpoint", BuildOptions(reduction="fixed", cost=0.5, merge_shares=(0.3, 0.2), prune_layer=1,
                                         max_input_len=128, max_text_len=32, dialect="portable"))),
    "nothing merges": (("checkpoint", BuildOptions(reduction="fixed", cost=0.5, merge_shares=(), prune_layer=1,
                                                   max_input_len=128, max_text_len=32, dialect="portable"))),
    "64 frames": (("trained", BuildOptions(reduction="fixed", cost=0.5, merge_shares=(0.3,), prune_layer=1,
                                           max_input_len=VIDEO + 64, max_text_len=64, max_frames=128,
                                           dialect="portable", num_decoder_layer=3))),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXED)
def test_the_fixed_reduction_is_inside_one_engine(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """Merging and pruning of 13440 visual tokens: no plug-in, no large TopK, no scatter that reduces."""
    source, options = FIXED[name]
    plan = BuildPlan(Checkpoint(checkpoint if source == "checkpoint" else TRAINED), options)
    assert plan.fixed is not None
    module = plan.graph(plan.segment_records[0].prefill).module()
    model = trace(module, plan.dialect, torch.float16).model
    graph = write_graph(tmp_path / "graph.onnx", model, module.to_empty(device="cpu"), torch.float16)
    length = plan.fixed.max_text + plan.fixed.max_visual
    capacities = tuple(size + 16 for size in plan.fixed.lengths)
    facts = build_engine(spec_of(graph, (length,), ("8.6", "8.9", "12.0"), capacities), tmp_path / "e")
    kinds = facts.layer_kinds
    assert kinds["ATTENTION_INPUT"] == plan.config.num_layers == kinds["KV_CACHE_UPDATE"] / 2
    assert not {"TOPK", "NON_ZERO", "PLUGIN_V2", "PLUGIN_V3"} & kinds.keys()
    assert kinds["SCATTER"] > 0
    shapes = {tensor.name: tensor.shape for tensor in facts.tensors}
    assert shapes["hidden"][1] == length
    assert shapes["origin"] == (length - sum(plan.fixed.drops),)
    assert np.all([-1 not in shape for shape in shapes.values()])
