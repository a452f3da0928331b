"""Engines of torch's inductor: the graphs in plain torch, their compilation, and whole bundles that run on them.

A bundle in fp32 is compared with ONNX Runtime to 1e-4 of the largest magnitude, the limit of check.py: both sum in fp32
in an order of their own. One in bfloat16 is compared with eager torch in fp32 to the limit that check.py argues.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from framefusion.errors import BackendError, BundleError
from framefusion.export.check.check import Comparison, relative_error, tolerance_of
from framefusion.export.check.observation import DECODED, draw_clip, observe, run
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.eager.pipeline import eager_loaders
from framefusion.export.engines.cache import key_of
from framefusion.export.engines.inductor import build as inductor
from framefusion.export.engines.inductor.attention import FORMS, cache_attention
from framefusion.export.engines.inductor.choice import LENGTHS, PREFERRED, Geometry, choose, measured
from framefusion.export.engines.inductor.graph import PLAIN, export, flattened, kinds_of
from framefusion.export.engines.inductor.join import join_products
from framefusion.export.engines.jobs import components_of
from framefusion.export.options import BuildOptions, EngineOptions
from framefusion.export.plan.build_plan import BuildPlan, replan
from framefusion.ops.kernels import KERNELS
from framefusion.runtime.backends.fit import examine
from framefusion.runtime.backends.inductor.backend import InductorBackend
from framefusion.runtime.backends.inductor.device import TorchDevice
from framefusion.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from framefusion.runtime.bundle import Bundle
from framefusion.runtime.pipeline import Pipeline, Request
from framefusion.runtime.text.prompt import Turn, Visual
from tests.export.test_build import MODES

OPS = torch.ops.framefusion
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
TURNS = [Turn("user", (Visual.VIDEO, "What happens?"))]


# --- Plain torch ------------------------------------------------------------------------------------------------------


def test_every_op_has_a_plain_form() -> None:
    ours = {getattr(OPS, name).default for name in dir(OPS) if hasattr(getattr(OPS, name), "default")}
    assert set(PLAIN) >= ours >= set(KERNELS)
    assert set(PREFERRED) == set(FORMS)  # attention over a cache has several


@pytest.mark.parametrize(("length", "taken", "slots"), [(9, 9, 17), (1, 12, 17), (5, 17, 17), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.device != "cuda"])
def test_each_form_of_attention_is_attention_over_the_slots_taken(
    form: str, length: int, taken: int, slots: int
) -> None:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(length + taken))
    query, key, value = (draw(1, length, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    past = [draw(1, KV_HEADS, taken if FORMS[form].is_cut else slots, HEAD_DIM) for _ in range(2)]
    operands: Any = (query, key, value, *past, torch.tensor([taken]), HEADS, KV_HEADS)
    for ours, theirs in zip(cache_attention(form)(*operands), OPS.cache_attention(*operands), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32, sums in another order


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.device == "cuda"])
def test_what_is_for_a_gpu_gives_shapes_and_types_of_attention(form: str) -> None:
    """No GPU is here: torch's own rules of shapes are asked, and `choose` compares the numbers where one is."""
    rows = [torch.empty(1, 5, heads * HEAD_DIM, dtype=torch.float16, device="meta") for heads in (HEADS, 2, 2)]
    past = [torch.empty(1, 9, 2, HEAD_DIM, dtype=torch.float16, device="meta").transpose(1, 2) for _ in range(2)]
    found = cache_attention(form)(*rows, *past, torch.empty(1, dtype=torch.int64, device="meta"), HEADS, KV_HEADS)
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(t.shape, t.dtype) for t in (rows[0], *past)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_right_form_is_chosen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LENGTHS, "cpu", (64, 8))
    measured.cache_clear()
    geometry = Geometry(HEADS, KV_HEADS, HEAD_DIM, dtype, "cpu")
    trials = measured(geometry)
    assert set(trials) == {"split", "masked"}
    assert all(trial.problem is None and trial.prefill_s > 0 and trial.decode_s > 0 for trial in trials.values())
    assert choose(geometry) in trials

    def wrong(*operands: Any) -> Tensor:
        return FORMS["masked"].attend(*operands) * 1.2

    def unknown(*operands: Any) -> Tensor:
        raise NotImplementedError("no such kernel\nat all")

    def renamed(*operands: Any) -> Tensor:
        found: Tensor = torch.ops.aten._attention_of_another_release(*operands)
        return found

    def other_arguments(*operands: Any) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands[:3], window=3)
        return found

    for attend, problem in (
        (wrong, "64 tokens over 64 have an error of"),
        (renamed, "it does not run ('_OpNamespace' 'aten' object has no attribute"),
        (other_arguments, "it does not run ("),
        (unknown, "it does not run (no such"),
    ):
        monkeypatch.setitem(FORMS, "split", FORMS["split"]._replace(attend=attend))
        measured.cache_clear()
        assert problem in str(measured(geometry)["split"].problem)
        assert choose(geometry) == "masked"
    monkeypatch.setitem(FORMS, "masked", FORMS["split"])
    measured.cache_clear()
    with pytest.raises(BackendError, match=r"no form of attention is right on cpu .*no such kernel"):
        choose(geometry)
    measured.cache_clear()


def test_a_form_that_leaves_out_a_key_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand keys each has a share that the rounding of bfloat16 hides, of eight none has."""
    right = FORMS["split"].attend

    def without_first(
        query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, kv_len: Tensor
    ) -> Tensor:
        return right(query, key, value, keys[:, :, 1:], values[:, :, 1:], kv_len)

    monkeypatch.setitem(FORMS, "split", FORMS["split"]._replace(attend=without_first))
    measured.cache_clear()
    trials = measured(Geometry(HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, "cpu"), (1024, 64))
    measured.cache_clear()
    assert "3 tokens over 8 have an error of" in str(trials["split"].problem)
    assert trials["masked"].problem is None


@pytest.fixture
def plan(checkpoint: Path) -> BuildPlan:
    return BuildPlan(Checkpoint(checkpoint), BuildOptions(cost=0.4, depth=1, max_input_len=512))


@pytest.mark.slow
def test_a_graph_is_plain_torch_that_writes_to_its_caches_and_nothing_else(plan: BuildPlan) -> None:
    module = plan.graph("segments/layer01/graph.onnx").module().to_empty(device="cpu")
    with torch.no_grad():
        program = export(module, torch.float32, "cpu", "split")
    others = {name for name in kinds_of(program) if not name.startswith("aten.")}
    assert others <= {"python.getitem", "python.sub", "python.mul", "python.sym_max"}  # of sizes
    written = program.graph_signature.user_inputs_to_mutate.values()
    caches = [i for i, name in enumerate(module.signature().inputs) if name.startswith("past_")]
    assert sorted(written) == [program.graph_signature.user_inputs[i] for i in caches]
    assert program.graph_signature.buffers == ()  # constants would be weights that lie in the engine


def test_segments_of_one_structure_are_one_graph(checkpoint: Path) -> None:
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(cost=0.6, depth=2, max_input_len=512))
    modules = [plan.graph(f"segments/layer{layer:02d}/graph.onnx").module() for layer in (1, 2)]
    first, second = (flattened(module.signature()) for module in modules)
    assert first.inputs == second.inputs
    assert [argument.shape for argument in first.arguments] == [argument.shape for argument in second.arguments]
    assert str(modules[0]) == str(modules[1])


def test_joined_products_are_those_side_by_side(plan: BuildPlan) -> None:
    module: Any = plan.graph("segments/layer01/graph.onnx").module().to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    rows = torch.randn(1, 5, plan.config.hidden_size)
    half = torch.ones(1, 5, plan.config.head_dim // 2)
    expected = [block.project(rows, half, half) if hasattr(block, "q") else block(rows) for block in module.blocks]
    values = dict(module.named_parameters())
    joined = join_products(module)
    assert {name.split(".", 2)[2] for name in joined} == {"qkv.weight", "qkv.bias", "gate_up.weight"}
    assert not {part for parts in joined.values() for part in parts} & dict(module.named_parameters()).keys()
    for name, parts in joined.items():
        module.get_parameter(name).data = torch.cat([values[part] for part in parts], -1)
    found = [block.project(rows, half, half) if hasattr(block, "o") else block(rows) for block in module.blocks]
    torch.testing.assert_close(found, expected)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_its_name_is_told(
    bundle: Path, plan: BuildPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"inductor needs a C\+\+ compiler and (g|clang)\+\+ is not there.*set CXX"):
        inductor.specs(bundle, Bundle(bundle).manifest, plan)
    monkeypatch.setenv("CXX", "nowhere++")
    with pytest.raises(BackendError, match=r"nowhere\+\+ is not there"):
        inductor.specs(bundle, Bundle(bundle).manifest, plan)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_compiled_for(bundle: Path, plan: BuildPlan) -> None:
    with pytest.raises(BackendError, match=r"torch .* finds none: compile there, or with --device cpu"):
        inductor.specs(bundle, Bundle(bundle).manifest, plan, "cuda")
    with pytest.raises(BackendError, match=r"device 'tpu' is unknown .* cpu, cuda"):
        inductor.specs(bundle, Bundle(bundle).manifest, plan, "tpu")


def test_autotuning_is_of_the_record_and_of_the_key(
    bundle: Path, plan: BuildPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off without the flag; with it the compiler is told, and no engine of the one is taken for one of the other."""
    manifest = Bundle(bundle).manifest
    monkeypatch.setattr(inductor, "choose", lambda _: "split")
    name = "segments/rest/graph.onnx"
    (plain, tuned) = (inductor.specs(bundle, manifest, plan, "cpu", max_autotune=tune)[name] for tune in (False, True))
    assert "max_autotune" not in plain.options
    assert tuned.options == {**plain.options, "max_autotune": inductor.TUNED_TOKENS}
    assert key_of(components_of(manifest, name, plain)) != key_of(components_of(manifest, name, tuned))
    told: list[Any] = []

    def keep(_: Any, arguments: Any, **__: Any) -> Any:
        told.append(arguments)
        return SimpleNamespace(run_decompositions=lambda _: None)

    monkeypatch.setattr(torch.export, "export", keep)
    for tokens in (9, inductor.TUNED_TOKENS):  # what kernels are timed for
        export(plain.module(), torch.float32, "meta", "split", tokens)
    (short, long) = ([tuple(argument.shape) for argument in arguments] for arguments in told)
    assert short[0][1] == 9
    assert long[0][1] == inductor.TUNED_TOKENS
    assert [(a, b) for a, b in zip(short, long, strict=True) if len(a) == 4 and b[2] - a[2] != 1015] == []
    told.clear()
    program: Any = SimpleNamespace(module=lambda **_: None, example_inputs=((), {}))

    def record(*_: Any, options: Any) -> list[str]:
        told.append(options)
        return []

    monkeypatch.setattr(torch._inductor, "aot_compile", record)
    for spec in (plain, tuned):
        inductor._compile(program, {}, max_autotune="max_autotune" in spec.options)
    assert [options["max_autotune"] for options in told] == [False, True]


def test_autotuning_is_refused_where_its_kernels_repack_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU at once; elsewhere by what the package wants to be given, since an engine with more would not open."""
    builder = inductor.InductorBuilder("inductor")
    builder.check(EngineOptions("inductor", device="cuda", max_autotune=True))
    with pytest.raises(BackendError, match=r"--max-autotune is for GPUs"):
        builder.check(EngineOptions("inductor", max_autotune=True))
    package = SimpleNamespace(get_constant_fqns=lambda: ["module.a", "constant30"])
    monkeypatch.setattr(inductor, "load_package", lambda *_: package)
    places = {"tensors": {"module.a": [0, [1]], "constant30": [4, [1]]}}
    inductor._require_own_weights(tmp_path, places, "cuda")
    del places["tensors"]["constant30"]
    with pytest.raises(BackendError, match=r"repack weights \(constant30\), which no engine holds"):
        inductor._require_own_weights(tmp_path, places, "cuda")


class ThreeDimensionalMask(torch.nn.Module):
    """Attention that no fused kernel of a CPU takes."""

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, attn_mask=mask)


@pytest.mark.slow
def test_attention_that_would_take_the_math_path_is_not_compiled() -> None:
    rows = torch.zeros(1, 2, 8, 16)
    program = torch.export.export(ThreeDimensionalMask(), (rows, torch.zeros(2, 8, 8)))
    with pytest.raises(BackendError, match="has no fused attention for a graph of this bundle here"):
        inductor._compile(program, {})


def test_weights_of_another_model_are_refused(bundle: Path, plan: BuildPlan) -> None:
    graph = plan.graph("segments/layer00/graph.onnx")
    with pytest.raises(BundleError, match=r"layer01/graph.onnx has no blocks.0.*: give the checkpoint"):
        inductor.give_weights(graph.module(), bundle / graph.name.replace("layer00", "layer01"), torch.float32)


def test_a_bundle_without_such_engines_says_how_to_make_them(bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"holds no inductor engine: ff-export compile .* --backend inductor"):
        InductorBackend(Bundle(bundle))


# --- Engines ----------------------------------------------------------------------------------------------------------


def pipelines(bundle: Bundle) -> tuple[Pipeline, Pipeline]:
    backend = OnnxRuntimeBackend(bundle.folder, threads=1)
    return Pipeline(bundle, backend), Pipeline(bundle, InductorBackend(bundle, threads=1))


def assert_same(bundle: Bundle, *requests: Request) -> None:
    theirs, ours = pipelines(bundle)
    prompt, rows = theirs.read(TURNS, [draw_clip()])
    assert relative_error(np.asarray(ours.read(TURNS, [draw_clip()])[1].hidden), np.asarray(rows.hidden)) < 1e-4
    for request in requests:
        expected = run(theirs, prompt, rows, request)
        found = run(ours, prompt, rows, request, tokens=expected.tokens)
        for ours_kept, theirs_kept in zip(found.kept, expected.kept, strict=True):
            np.testing.assert_array_equal(ours_kept, theirs_kept)
        for logits, wanted in zip([found.logits, *found.decoded], [expected.logits, *expected.decoded], strict=True):
            assert relative_error(logits, wanted) < 1e-4
        answers = [pipeline.answer(prompt, rows, request) for pipeline in (theirs, ours)]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].kv_lengths == answers[1].kv_lengths


@pytest.mark.slow
def test_an_adaptive_bundle_runs_on_its_engines_as_in_onnxruntime(
    compiled: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = compiled(steps=True, cost=0.6, depth=2, max_input_len=512)
    files = {engine.graph: bundle.manifest.files[engine.file] for engine in bundle.manifest.engines}
    assert files["segments/layer01/graph.onnx"].sha256 == files["segments/layer02/graph.onnx"].sha256
    assert all(fit.fits for fit in examine(bundle.folder, bundle.manifest, hashes=True))
    assert_same(bundle, Request(DECODED), Request(DECODED, cost=1.0), Request(DECODED, reducer="random", seed=1))

    backend = InductorBackend(bundle, threads=1)
    pipeline, whole = Pipeline(bundle, backend), OnnxRuntimeBackend(bundle.folder, threads=1)
    prompt, rows = pipeline.read(TURNS, [draw_clip()])
    expected = run(Pipeline(bundle, whole), prompt, rows, Request(DECODED, cost=1.0))
    monkeypatch.setattr(backend, "chunk", 24)
    found = run(pipeline, prompt, rows, Request(DECODED, cost=1.0), tokens=expected.tokens)
    assert relative_error(found.logits, expected.logits) < 1e-4
    assert relative_error(found.decoded[-1], expected.decoded[-1]) < 1e-4

    # torch's device, on the CPU: lengths in tensors, tokens chosen by torch, rows from the host or from a table there
    for spare in (0, 1 << 30):
        monkeypatch.setattr(TorchDevice, "spare_memory", lambda _, spare=spare: spare)
        torch_backend = InductorBackend(bundle, threads=1)
        torch_backend.device = TorchDevice("cpu", np.float32)
        on_torch, request = Pipeline(bundle, torch_backend), Request(DECODED)
        assert on_torch.generate(TURNS, [draw_clip()], request).token_ids == (
            Pipeline(bundle, whole).generate(TURNS, [draw_clip()], request).token_ids
        )

    # what stands between two products is one kernel each
    path = bundle.folder / next(e.file for e in bundle.manifest.engines if "layer01" in e.graph)
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith(".wrapper.cpp")]
        code = {name.split("/")[-2]: package.read(name).decode() for name in names}
    shared = ("add", "mean", "rsqrt"), ("sigmoid", "mul")
    own = {"model": (("index_copy", "mul", "sub"), ("sigmoid", "where")), "step": (("index_put", "where"),)}
    assert code.keys() == own.keys()
    for model, source in code.items():
        kernels = set(re.findall(r"cpp_fused_(\w+)_\d+\b", source))
        for fused in (*shared, *own[model]):
            assert any(all(part in kernel for part in fused) for kernel in kernels), (model, fused, kernels)
    assert "linear_pointwise" in code["step"]
    assert not re.search(r"aoti_torch_(clone|copy_)|_mm_out", code["step"])  # no cache and no weight is copied

    engine = bundle.manifest.engines[0]
    assert {(e.options.get("attention"), e.options.get("caches")) for e in bundle.manifest.engines} == {
        ("split", "cut"),
        (None, None),  # the tower's
    }
    other = dataclasses.replace(engine, options={**engine.options, "cpu_features": ["avx1024"]})
    (fit,) = examine(bundle.folder, dataclasses.replace(bundle.manifest, engines=(other,)))
    assert "avx1024" in str(fit.problem)
    segment = backend.engine("segments/layer01/graph.onnx")
    wrong = {value.name: np.zeros((1, 3, 5), np.float32) for value in segment.inputs}
    with pytest.raises(BackendError, match=r"hidden is float32 \(1, 3, 5\), .* takes float32 \(1, -1, 32\)"):
        backend.bind("segments/layer01/graph.onnx", wrong, {}, None)


@pytest.mark.slow
def test_a_fixed_bundle_runs_on_its_engines_as_in_onnxruntime(
    compiled: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products joined, as for a GPU: its prefill and decode graphs share one file of weights."""
    monkeypatch.setattr(inductor, "JOINED", ("cpu",))
    bundle = compiled(steps=True, reduction="fixed", **MODES["fixed"])
    assert {engine.options.get("products") for engine in bundle.manifest.engines} == {"joined", None}
    assert_same(bundle, Request(DECODED))


@pytest.mark.slow
def test_a_bundle_in_bfloat16_runs_on_the_cpu(compiled: Callable[..., Bundle], checkpoint: Path) -> None:
    bundle = compiled(cost=0.5, depth=1, max_input_len=512, dtype="bfloat16")
    assert_near_eager(bundle, checkpoint, InductorBackend(bundle, threads=1), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bundle_runs_on_a_gpu(compiled: Callable[..., Bundle], checkpoint: Path, dtype: torch.dtype) -> None:
    name: Any = str(dtype).removeprefix("torch.")
    bundle = compiled("cuda", cost=0.5, depth=1, max_input_len=512, dtype=name)
    assert_near_eager(bundle, checkpoint, InductorBackend(bundle, "cuda"), dtype)


def assert_near_eager(bundle: Bundle, checkpoint: Path, backend: InductorBackend, dtype: torch.dtype) -> None:
    plan = replan(bundle.folder, bundle.manifest, Checkpoint(checkpoint))
    errors = Comparison(Pipeline(bundle, backend), observe(bundle, plan)).errors()
    limit = tolerance_of(dtype, bundle.manifest.model.num_layers)
    assert {"vision features", "dense logits", "dense decoded logits", "reduced decoded logits"} <= errors.keys()
    assert all(error <= limit for error in errors.values()), errors
    assert errors["dense logits"] > 1e-5  # it is this type that runs


# --- torch.compile ----------------------------------------------------------------------------------------------------


def fixed_prefill(checkpoint: Path) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The fixed-ratio model in fp32 with weights, and its arguments."""
    plan = BuildPlan(Checkpoint(checkpoint), BuildOptions(reduction="fixed", **MODES["fixed"]))
    module, record = eager_loaders(plan)["segments/decoder/graph.onnx"](), plan.fixed
    assert record is not None
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    size, config = record.max_text + record.max_visual, plan.config
    label = torch.arange(size) % 16
    label[-record.max_text :] = -1
    order = torch.cat([torch.nonzero(label == place).flatten() for place in [*range(16), -1]])
    past = [tuple(torch.zeros(1, config.num_kv_heads, size, config.head_dim) for _ in range(2)) for _ in record.lengths]
    half = config.head_dim // 2
    rows: list[Tensor] = [draw(1, size, config.hidden_size), draw(1, size, half), draw(1, size, half)]
    vectors = [torch.tensor(record.lengths), torch.tensor([size - 1]), label, order, torch.tensor(record.drops)]
    return module, (*rows, *vectors, past)


@pytest.mark.slow
def test_the_fixed_ratio_model_has_no_graph_break(checkpoint: Path) -> None:
    module, arguments = fixed_prefill(checkpoint)
    explained = torch._dynamo.explain(module)(*arguments)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1
    ours = {str(op.target) for op in explained.graphs[0].graph.nodes if "framefusion" in str(op.target)}
    assert {"framefusion.merge_by_rank", "framefusion.prune_by_rank", "framefusion.cache_attention"} <= {
        name.removesuffix(".default") for name in ours
    }


@pytest.mark.slow
def test_the_fixed_ratio_model_compiled_whole_equals_eager(checkpoint: Path) -> None:
    module, arguments = fixed_prefill(checkpoint)
    with torch.inference_mode():
        expected = module(*arguments)
        found = torch.compile(module, fullgraph=True)(*arguments)
    assert torch.equal(found[1], expected[1])  # the tokens that are left
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours.numpy(), theirs.numpy()) < 1e-4


@pytest.mark.slow
def test_a_session_goes_on_behind_its_caches(compiled: Callable[..., Bundle]) -> None:
    theirs, ours = pipelines(compiled(cost=0.4, depth=1, max_input_len=512))
    session = ours.session()
    request = Request(4, cost=1.0, generation=dataclasses.replace(ours.manifest.generation, eos_token_ids=()))
    for turn, files in ((TURNS[0], [draw_clip()]), (Turn("user", "And then?"), []), (TURNS[0], [draw_clip()])):
        turns, shown = [*session.turns, turn], [*session.files, *files]
        assert session.ask([turn], files, request).token_ids == theirs.generate(turns, shown, request).token_ids
    assert [record.restart for record in session.records] == [None] * 3
    assert all(record.reused_tokens > 0 for record in session.records[1:])
