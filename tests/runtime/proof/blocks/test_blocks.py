"""What is right passes as building blocks, whatever is wrong in one situation alone does not, and is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from framefusion.errors import BackendError
from framefusion.runtime.backends.host import HostDevice
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.backends.table import BACKENDS
from framefusion.runtime.machine.machine import Machine
from framefusion.runtime.proof.blocks import cases, checks, codes, reference
from framefusion.runtime.proof.blocks.checks import check_device_blocks, check_graph_blocks
from framefusion.runtime.proof.blocks.child import prove_backend
from tests.runtime.proof.blocks import eager_blocks
from tests.runtime.proof.blocks.eager_blocks import EagerBlocks, Mistake

FOLDER = Path(cases.__file__).parent
CACHE = "attention over a cache"


def everywhere(block: str) -> set[tuple[str, str]]:
    return {(block, case) for case in ("prefill", "chunk", "decode", "padding", "after padding")}


def wrong_in(mistake: Mistake) -> set[tuple[str, str]]:
    found = check_graph_blocks(EagerBlocks(mistake), "graph", "float32")
    return {(check.block, check.case) for check in found if not check.right}


@pytest.mark.slow
def test_eager_torch_is_right() -> None:
    found = list(check_graph_blocks(EagerBlocks(), "graph", "float32"))
    assert {check.block for check in found} == set(cases.BLOCKS.values())
    assert {check.case for check in found} == {"prefill", "chunk", "decode", "padding", "after padding"}
    assert [check for check in found if not check.right] == []
    assert max(check.error / check.limit for check in found if check.limit) < 0.6


def test_a_mask_that_is_right_for_a_whole_prompt_alone_is_found() -> None:
    assert wrong_in(eager_blocks.upper_left) == {(CACHE, case) for case in ("chunk", "decode", "after padding")}


def test_the_wider_limit_over_codes_finds_a_mask_that_is_wrong() -> None:
    found = list(check_graph_blocks(EagerBlocks(eager_blocks.upper_left), "graph", "float32", caches="uint8"))
    assert {check.case for check in found if not check.right} == {"chunk", "decode", "after padding"}
    assert not {check.block for check in found} & {"keys in the cache", "values in the cache"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "where"),
    [
        (eager_blocks.no_mask, {(CACHE, case) for case in ("prefill", "chunk", "padding")}),
        (eager_blocks.slot_too_many, everywhere(CACHE)),
        (eager_blocks.heads_in_turn, everywhere(CACHE)),
        (eager_blocks.padding_counts, {("importance", "padding")}),
        (eager_blocks.other_pairs, everywhere("rotary")),
        (eager_blocks.scale_lost, everywhere("activation")),
        (eager_blocks.not_a_number, everywhere("norm")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_mistake_is_found_where_it_is(mistake: Mistake, where: set[tuple[str, str]]) -> None:
    assert wrong_in(mistake) == where


@pytest.mark.slow
def test_what_is_moved_may_not_lose_a_bit() -> None:
    blocks = {block for block, _ in wrong_in(eager_blocks.cache_rounded)}
    assert "keys in the cache" in blocks
    assert "values in the cache" not in blocks


@pytest.mark.slow
def test_a_kernel_that_did_not_run_is_wrong() -> None:
    assert ("similarity", "decode") in wrong_in(eager_blocks.nothing_written)


class _Wrong(HostDevice):
    def similarity(self, rows: Any, labels: Any) -> Any:
        return super().similarity(rows, labels) * np.float32(1.001)

    def reduced(self, rows: Any, plan: Any) -> Any:
        return np.asarray(rows)[plan.kept]  # heads of runs stay as they are


def test_a_device_that_is_wrong_is_found() -> None:
    assert all(check.right for check in checks.host_blocks())
    wrong = {(check.block, check.case) for check in check_device_blocks(_Wrong(), "float32") if not check.right}
    assert wrong == {("similarity", ""), ("reduction", "merge")}


def test_a_graph_of_each_dialect_and_type_is_there() -> None:
    kinds = [(dialect, dtype) for dialect in ("gqa", "portable") for dtype in checks.EPSILON]
    names = {cases.graph_name(*kind) for kind in kinds}
    names |= {codes.codes_name(*kind, weights) for kind in kinds for weights in codes.WEIGHTS}
    assert {path.name for path in FOLDER.glob("*.onnx")} == names


@pytest.mark.slow
def test_what_was_found_is_remembered_for_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = prove_backend("onnxruntime", "cpu")
    assert facts["state"] == "right", facts["problem"]
    assert all(graph["remembered"] for graph in facts["graphs"])
    assert len(list((tmp_path / "framefusion-aot" / "proofs").iterdir())) == len(facts["graphs"])


@pytest.mark.slow
def test_a_library_without_products_of_codes_runs_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bind = OnnxRuntimeBackend.bind

    def without_codes(self: OnnxRuntimeBackend, graph: str, *arguments: Any) -> Any:
        if "-int" in graph:
            raise BackendError(f"{graph} cannot be opened: no kernel for DequantizeLinear(24)")
        return bind(self, graph, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "bind", without_codes)
    facts = prove_backend("onnxruntime", "cpu")
    assert facts["state"] == "right", facts["problem"]
    states = {graph["weights"]: graph["state"] for graph in facts["graphs"]}
    assert states == {"floats": "right", "int8": "unproven", "int4": "unproven"}
    assert "remembered" not in facts["graphs"][1]


def test_every_backend_that_runs_graphs_is_proven_by_them() -> None:
    assert {row.name for row in BACKENDS if not row.blocks} == {row.name for row in BACKENDS if row.engines}
    assert Machine.here().onnxruntime is not None


@pytest.mark.slow
def test_the_reference_is_what_transformers_computes() -> None:
    from transformers.models.qwen2 import modeling_qwen2

    generator = torch.Generator().manual_seed(0)
    hidden, query, key, value = (
        torch.randn(1, 40, width, generator=generator, dtype=torch.float64)
        for width in (cases.WIDTH, cases.QUERY_WIDTH, cases.KEY_WIDTH, cases.KEY_WIDTH)
    )
    # 1. Norm: transformers computes it in fp32, whatever it is given.
    norm = modeling_qwen2.Qwen2RMSNorm(cases.WIDTH, cases.EPS)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    ours = reference.rms_norm(hidden[0].numpy(), norm.weight.detach().double().numpy(), cases.EPS)
    np.testing.assert_allclose(ours, norm(hidden.float())[0].detach().numpy(), rtol=1e-5, atol=1e-6)
    # 2. Rotary: its tables hold each value twice.
    angles = torch.rand(1, 40, cases.HEAD_DIM // 2, generator=generator, dtype=torch.float64) * 6
    cos = angles.cos()
    sin = angles.sin()
    heads = query.view(1, -1, cases.HEADS, cases.HEAD_DIM).transpose(1, 2)
    tables = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    turned = modeling_qwen2.apply_rotary_pos_emb(heads, heads, *tables)[0].transpose(1, 2).flatten(2)
    turned_here = reference.rotary(query[0].numpy(), cos[0].numpy(), sin[0].numpy(), cases.HEADS)
    np.testing.assert_allclose(turned_here, turned[0].numpy(), atol=1e-12)
    # 3. Attention of the last 9 tokens over all.
    module = torch.nn.Module()
    module.num_key_value_groups = cases.HEADS // cases.KV_HEADS  # type: ignore[assignment]
    keys, values = (part.view(1, -1, cases.KV_HEADS, cases.HEAD_DIM).transpose(1, 2) for part in (key, value))
    visible = reference.lower_right(9, 40)
    mask = torch.where(torch.from_numpy(visible), 0.0, float("-inf"))[None, None]
    out, _ = modeling_qwen2.eager_attention_forward(
        module, heads[:, :, -9:], keys, values, mask, cases.HEAD_DIM**-0.5, dropout=0.0
    )
    rows = query[0, -9:].numpy()
    attended = reference.attention(rows, keys[0].numpy(), values[0].numpy(), visible)
    np.testing.assert_allclose(attended, out[0].flatten(1).numpy(), atol=1e-6)  # its softmax is in fp32


@pytest.mark.slow
def test_the_graphs_are_those_that_the_dialects_write(tmp_path: Path) -> None:
    from framefusion.export.graphs.tracing.blocks import write_block_graphs

    write_block_graphs(tmp_path, (torch.float16,))
    for path in sorted(tmp_path.iterdir()):
        assert _structure(FOLDER / path.name) == _structure(path), "python -m tools.block_graphs"
        for dtype in ("float32", "bfloat16"):
            other = FOLDER / path.name.replace("float16", dtype)
            assert _operators(other) == _operators(path), "python -m tools.block_graphs"


def _structure(path: Path) -> Any:
    """Operators with their attributes, inputs, outputs: not the names of values, which torch's releases change."""
    graph = onnx.load(str(path)).graph
    nodes = [
        (node.domain, node.op_type, sorted((a.name, str(onnx.helper.get_attribute_value(a))) for a in node.attribute))
        for node in graph.node
        if node.op_type != "Constant"
    ]
    weights = sorted((value.data_type, tuple(value.dims), value.raw_data) for value in graph.initializer)
    return sorted(map(str, nodes)), weights, [str(value) for value in (*graph.input, *graph.output)]


def _operators(path: Path) -> list[str]:
    return sorted(node.op_type for node in onnx.load(str(path)).graph.node)


@pytest.mark.slow
def test_onnxruntime_opens_graphs_as_it_opens_those_of_bundles() -> None:
    backend = OnnxRuntimeBackend(FOLDER)
    kinds = {node.op_type for node in onnx.load(str(FOLDER / "gqa-float16.onnx")).graph.node}
    assert {"GroupQueryAttention", "RMSNormalization", "RotaryEmbedding", "QuickGelu", "MultiHeadAttention"} <= kinds
    portable = {node.op_type for node in onnx.load(str(FOLDER / "portable-float16.onnx")).graph.node}
    assert {"TensorScatter", "Attention"} <= portable
    assert backend.session("gqa-float16.onnx") is not None
