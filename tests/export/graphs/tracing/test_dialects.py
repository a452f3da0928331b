"""Every custom op in every dialect, run in ONNX Runtime, against its eager kernel; and the in-graph reduction's twin.

Tolerance 2e-6 relative to the largest value: one op in fp32, sums in another order.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import framefusion.ops.kernels  # noqa: F401
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.graphs.graph_plan import GraphModule, Signature
from framefusion.export.graphs.segments import cut_after, segment_module, whole_decoder
from framefusion.export.graphs.tracing.dialects import DIALECTS
from framefusion.export.graphs.tracing.trace import trace, trace_graph
from framefusion.export.plan.build_plan import BuildOptions, BuildPlan
from framefusion.reduction.budget import schedule_for_cost
from framefusion.reduction.policy import FixedReduction
from tests.versions import needs_portable
from tests.wheel import ROOT

OPS = torch.ops.framefusion
TOLERANCE = 2e-6
HEADS, KV_HEADS, HEAD_DIM, LENGTH, CAPACITY = 6, 2, 8, 11, 19
TRAINED = ROOT / "tests" / "models" / "tiny_qwen2_vl"  # its positions reach far enough
FORBIDDEN = {"TopK", "NonZero", "Unique", "Loop", "If"}


class Call(GraphModule):
    """One op as a graph of its operands x0, x1, ... and results y0, y1, ..."""

    def __init__(self, function: Callable[..., Any], operands: Sequence[Tensor], outputs: int = 1) -> None:
        super().__init__()
        self.function = function
        self.operands = tuple(operand.to("meta") for operand in operands)
        self.outputs = outputs

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands)

    def signature(self) -> Signature:
        inputs = tuple(f"x{i}" for i in range(len(self.operands)))
        outputs = tuple(f"y{i}" for i in range(self.outputs))
        return Signature(self.operands, (tuple(None for _ in inputs),), inputs, outputs)


def run(dialect: str, function: Callable[..., Any], operands: Sequence[Tensor], outputs: int) -> list[np.ndarray]:
    module = Call(function, operands, outputs)
    names = module.signature().inputs
    model = trace(module, DIALECTS[dialect]).model
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feeds = {name: operand.numpy() for name, operand in zip(names, operands, strict=True)}
    found: list[np.ndarray] = session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(ours: np.ndarray, reference: Tensor) -> None:
    expected = reference.numpy()
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-6)


QUERY, KEY = draw(1, LENGTH, HEADS * HEAD_DIM), draw(1, LENGTH, KV_HEADS * HEAD_DIM)
TABLE = draw(1, LENGTH, HEAD_DIM // 2)
PREVIOUS = torch.tensor([-1, 0, 1, -1, 2, 3, 0, 6, 7, 5, -1])
CASES: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "rms_norm": (lambda x, w: OPS.rms_norm(x, w, 1e-6), [QUERY, draw(HEADS * HEAD_DIM)]),
    "silu": (lambda x: OPS.swish(x, 1.0), [QUERY]),
    "quick_gelu": (lambda x: OPS.swish(x, 1.702), [QUERY]),
    "rotary": (lambda x, c, s: OPS.rotary(x, c, s, HEADS), [QUERY, TABLE.cos(), TABLE.sin()]),
    "full_attention": (lambda q, k, v: OPS.full_attention(q, k, v, HEADS), [QUERY, draw(1, 11, 48), QUERY]),
    "full attention of few queries": (
        lambda q, k, v: OPS.full_attention(q, k, v, HEADS), [QUERY, draw(1, 29, 48), draw(1, 29, 48)],
    ),
    "similarity": (OPS.similarity, [QUERY, PREVIOUS]),
    "similarity of zero tokens": (OPS.similarity, [QUERY * (torch.arange(LENGTH) % 3 > 0)[None, :, None], PREVIOUS]),
    "importance": (lambda q, k, n: OPS.importance(q, k, n, 1, HEADS, KV_HEADS), [QUERY, KEY, torch.tensor([10])]),
    "importance of 4 rows, padded": (
        lambda q, k, n: OPS.importance(q, k, n, 4, HEADS, KV_HEADS), [QUERY, KEY, torch.tensor([7])],
    ),
    "importance of more rows than tokens": (
        lambda q, k, n: OPS.importance(q, k, n, 4, HEADS, KV_HEADS), [QUERY, KEY, torch.tensor([1])],
    ),
}  # fmt: skip


BY_DIALECT = [
    pytest.param("portable", marks=needs_portable),
    pytest.param("gqa", marks=pytest.mark.slow),  # the recordings try gqa before each commit
]


def in_each_dialect() -> Iterator[Any]:
    """Each export takes half a second: before a commit those that decide are tried in one dialect, the rest in CI."""
    for name in CASES:
        quick = "gqa" if name in ("rms_norm", "rotary", "similarity", "importance") else "portable"
        for dialect in DIALECTS:
            slow = dialect != quick or name not in ("similarity", "importance")
            yield pytest.param(name, dialect, id=f"{name}-{dialect}", marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("name", "dialect"), [*in_each_dialect()])
def test_op_equals_its_eager_kernel(name: str, dialect: str) -> None:
    function, operands = CASES[name]
    assert_close(run(dialect, function, operands, 1)[0], function(*operands))


@pytest.mark.parametrize("dialect", BY_DIALECT)
@pytest.mark.parametrize(
    ("length", "kv_len"),
    [(LENGTH, LENGTH), (1, 13), (4, 15), (2, CAPACITY)],
    ids=["prefill", "decode", "chunk", "wide"],
)
def test_cache_attention(length: int, kv_len: int, dialect: str) -> None:
    def attend(*operands: Tensor) -> Any:
        return OPS.cache_attention(*operands, HEADS, KV_HEADS)

    query, key, value = draw(1, length, 48), draw(1, length, 16), draw(1, length, 16)
    caches = [draw(1, KV_HEADS, CAPACITY, HEAD_DIM) for _ in range(2)]
    operands = [query, key, value, *caches, torch.tensor([kv_len])]
    out, present_key, present_value = run(dialect, attend, operands, 3)
    expected = attend(*operands)
    assert_close(out, expected[0])
    for ours, reference in ((present_key, expected[1]), (present_value, expected[2])):
        assert_close(ours[:, :, :kv_len], reference[:, :, :kv_len])  # what lies behind is nobody's


@pytest.mark.slow
def test_cache_attention_of_rows_of_unequal_lengths() -> None:
    """A token of each of four rows; the longest is not the first."""

    def attend(*operands: Tensor) -> Any:
        return OPS.cache_attention(*operands, HEADS, KV_HEADS)

    lengths = [3, CAPACITY, 1, 12]
    count = len(lengths)
    caches = [draw(count, KV_HEADS, CAPACITY, HEAD_DIM) for _ in range(2)]
    operands = [draw(count, 1, 48), draw(count, 1, 16), draw(count, 1, 16), *caches, torch.tensor(lengths)]
    out, *presents = run("gqa", attend, operands, 3)
    expected = attend(*operands)
    assert_close(out, expected[0])
    for ours, reference in zip(presents, expected[1:], strict=True):
        for row, length in enumerate(lengths):
            assert_close(ours[row, :, :length], reference[row, :, :length])
    for row in range(count):  # a row is what it is alone
        alone = run("gqa", attend, [operand[row : row + 1] for operand in operands], 3)
        np.testing.assert_array_equal(alone[0][0], out[row])


@pytest.mark.slow
@pytest.mark.parametrize("dialect", BY_DIALECT)
def test_a_segment_is_free_in_its_rows(dialect: Any) -> None:
    plan = BuildPlan(Checkpoint(TRAINED), BuildOptions(dialect=dialect))
    graph = trace_graph(plan.graphs[len(plan.segments) - 1], plan.dialect).graph
    first = {value.name: value.shape[0] for value in (*graph.inputs, *graph.outputs) if value.shape is not None}
    rows = {name for name, size in first.items() if str(size) == "batch"}
    caches = {name for name in first if name is not None and name.startswith(("past_", "present_"))}
    assert rows == {"hidden", "cos", "sin", "logits", *caches}
    assert str(first["kv_len"]) == "lengths"


@pytest.mark.slow
@pytest.mark.parametrize("one_length", [True, False])
def test_layers_of_one_length_read_one_value(one_length: bool) -> None:
    """So whoever runs the graph works out once what GroupQueryAttention wants; and each its own where they differ."""
    config = BuildPlan(Checkpoint(TRAINED), BuildOptions()).config
    (plan,) = whole_decoder(config.num_layers, one_length=one_length)
    graph = trace(segment_module(config, plan), DIALECTS["gqa"]).model.graph
    lengths = [node.inputs[0] for node in graph if node.op_type == "ReduceMax"]
    assert len(lengths) == config.num_layers
    assert len({value.name for value in lengths if value is not None}) == (1 if one_length else config.num_layers)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", BY_DIALECT)
def test_a_padded_prefill_then_decode_equals_an_exact_one(dialect: str) -> None:
    """Padding at the right end is never seen, and the next token overwrites its slot."""

    def attend(*operands: Tensor) -> Any:
        return OPS.cache_attention(*operands, HEADS, KV_HEADS)

    valid, bucket = 7, LENGTH
    rows = [draw(1, valid + 1, width) for width in (48, 16, 16)]
    exact = [row[:, :valid] for row in rows]
    padded = [nn.functional.pad(row, (0, 0, 0, bucket - valid), value=3.0) for row in exact]
    empty = [torch.zeros(1, KV_HEADS, CAPACITY, HEAD_DIM)] * 2
    out, *caches = run(dialect, attend, [*padded, *empty, torch.tensor([bucket])], 3)
    assert_close(out[:, :valid], attend(*exact, *empty, torch.tensor([valid]))[0])
    step = [row[:, valid:] for row in rows]
    held = [torch.from_numpy(cache) for cache in caches]
    out, *_ = run(dialect, attend, [*step, *held, torch.tensor([valid + 1])], 3)
    assert_close(out, attend(*rows, *empty, torch.tensor([valid + 1]))[0][:, valid:])


@pytest.mark.slow
def test_the_fixed_graph_keeps_what_the_policy_keeps(checkpoint: Path) -> None:
    """The in-graph choice against its numpy twin, which sees segments; torch.compile takes it without a graph break."""
    options = BuildOptions(
        reduction="fixed", cost=0.5, merge_shares=(0.3, 0.2), prune_layer=1, max_input_len=128, max_text_len=32
    )
    plan = BuildPlan(Checkpoint(checkpoint), options)
    assert plan.fixed is not None
    assert plan.reduction.schedule is not None
    config = plan.config
    labels = np.concatenate([np.full(5, -1), np.tile(np.arange(8), 9), np.full(6, -1)])
    fixed = eager_loaders(plan)[plan.segment_records[0].prefill]()
    size, text = 128, len(labels)
    hidden, table = draw(1, size, config.hidden_size), draw(1, size, config.head_dim // 2)
    twin = FixedReduction(plan.reduction.schedule, labels)
    origin = segment_by_segment(plan, hidden[:, :text], table[:, :text], twin)
    drops = [record.tokens_before - record.tokens_after for record in twin.history if record.kind != "none"]
    padded = np.pad(labels, (0, size - text), constant_values=-1)
    order = np.argsort(np.where(padded < 0, 10**6, padded), kind="stable")
    capacity = [(torch.zeros(1, config.num_kv_heads, size, config.head_dim),) * 2] * config.num_layers
    hidden[:, text:] = 7.0
    operands = (
        hidden, table.cos(), table.sin(), torch.tensor(plan.fixed.lengths), torch.tensor([text - 1]),
        torch.from_numpy(padded), torch.from_numpy(order), torch.tensor(drops), capacity,
    )  # fmt: skip
    with torch.inference_mode():
        logits, found, *_ = fixed(*operands)
        whole_graph = torch.compile(fixed, fullgraph=True, backend="aot_eager")
        compiled_logits, compiled_found, *_ = whole_graph(*operands)
    np.testing.assert_array_equal(found[: len(origin)], origin)
    np.testing.assert_array_equal(compiled_found, found)
    assert_close(compiled_logits.numpy(), logits)


def segment_by_segment(plan: BuildPlan, hidden: Tensor, table: Tensor, twin: FixedReduction) -> np.ndarray:
    """Kept places after all reductions, from the cut decoder and the numpy policy."""
    from framefusion.export.checkpoints.tensors.weights import load_parameters
    from framefusion.reduction import tracks
    from framefusion.reduction.plan import apply_plan

    config, rows, origin = plan.config, hidden[0].numpy(), np.arange(hidden.shape[1])
    step = twin.step(tracks.track_similarity(rows, twin.labels), None)
    rows, table, origin = apply_plan(rows, step), table[:, step.kept], origin[step.kept]
    for segment in cut_after(config.num_layers, range(config.num_layers - 1))[:-1]:
        module = load_parameters(segment_module(config, segment), plan.checkpoint, plan.sources(segment), torch.float32)
        length = len(rows)
        cache = [(torch.zeros(1, config.num_kv_heads, length, config.head_dim),) * 2]
        previous = torch.from_numpy(tracks.previous_in_track(twin.labels))
        with torch.inference_mode():
            out, similarity, importance, *_ = module(
                torch.from_numpy(rows)[None], table.cos(), table.sin(), torch.tensor([length]), previous,
                torch.tensor([length - 1]), cache,
            )  # fmt: skip
        step = twin.step(similarity.numpy(), importance.numpy())
        rows, table, origin = apply_plan(out[0].numpy(), step), table[:, step.kept], origin[step.kept]
    assert twin.finished
    return origin


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_fixed_graph_stays_within_the_limits_of_engines(dialect: str) -> None:
    """No TopK beyond 3840, no scatter that reduces, no shape that depends on values: 64 frames of 210 tokens."""
    options = BuildOptions(
        reduction="fixed", cost=0.5, merge_shares=(0.3,), prune_layer=1, max_input_len=13_440 + 64, max_text_len=64,
        max_frames=128, dialect=dialect, num_decoder_layer=3,
    )  # fmt: skip
    plan = BuildPlan(Checkpoint(TRAINED), options)
    model = trace_graph(plan.graph(plan.segment_records[0].prefill), plan.dialect)
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert {node.op_type for node in nodes} & FORBIDDEN == set()
    scatters = [node for node in nodes if node.op_type.startswith("Scatter")]
    assert scatters
    assert all(node.attributes.get_string("reduction", "none") == "none" for node in scatters)
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        assert value.shape is not None
        free = {dim for dim in value.shape if not isinstance(dim, int)}
        assert bool(free) == name.startswith(("past", "present")), name


def test_schedules_of_equal_structure_share_a_graph() -> None:
    assert len({segment.structure for segment in cut_after(28, range(8))}) == 3
    (whole,) = whole_decoder(28)
    assert whole.attention_layers == tuple(range(28))
    assert schedule_for_cost(0.5, (0.3,), 1, 28).prune_share > 0


@pytest.mark.parametrize("name", ["merge_by_rank", "prune_by_rank", "cache_attention", "similarity", "importance"])
def test_ops_are_opaque_with_static_shapes(name: str) -> None:
    """torch.library's own checks: schema, fake kernel against real kernel."""
    labels = torch.tensor([-1, 0, 1, 0, 1, 0, 1, -1])
    order = torch.argsort(torch.where(labels < 0, 99, labels), stable=True)
    state = (draw(8, 6), draw(8, 2), draw(8, 2), labels, order, torch.arange(8))
    cases: dict[str, tuple[Any, ...]] = {
        "merge_by_rank": (*state, draw(8), torch.tensor([2]), 6, 4),
        "prune_by_rank": (*state, draw(8), torch.tensor([2]), 6),
        "cache_attention": (
            draw(1, 3, 48), draw(1, 3, 16), draw(1, 3, 16), *[draw(1, 2, 9, 8)] * 2, torch.tensor([3]), 6, 2
        ),
        "similarity": (QUERY, PREVIOUS),
        "importance": (QUERY, KEY, torch.tensor([10]), 4, HEADS, KV_HEADS),
    }  # fmt: skip
    import framefusion.ops.static_reduction  # noqa: F401

    torch.library.opcheck(getattr(OPS, name).default, cases[name], test_utils=("test_schema", "test_faketensor"))
