"""Each op of the decoder graphs once, in small graphs: what `ff-run doctor` proves before there is a model.

The graphs lie in the runtime, which has nothing that could write them: `python -m tools.block_graphs` does. They are
traced and said in a dialect by the code that makes a bundle's segments. One has the ops without weights, one for each
type of codes the products of such weights, which lie in its file. Knows no expected result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from framefusion.export.graphs.graph_plan import EXAMPLE_CAPACITY, EXAMPLE_LENGTH, FREE, GraphModule, Signature, meta
from framefusion.export.graphs.layers import QuantizedLinear
from framefusion.export.graphs.tracing.dialects import DIALECTS, Dialect
from framefusion.export.graphs.tracing.trace import trace
from framefusion.export.quantization.blocks import BlockFormat, BlockQuantized
from framefusion.ops import kernels
from framefusion.runtime.proof.blocks import cases, codes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Blocks(GraphModule):
    """Norm, rotary, activation, attention over a cache, attention of a tower, and both scores, side by side."""

    def forward(
        self, hidden: Tensor, norm_weight: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor,
        kv_len: Tensor, previous: Tensor, last: Tensor, past_key: Tensor, past_value: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As `cases.Case` names them -> as `cases.OUTPUTS` does."""
        heads = cases.HEADS
        groups = cases.KV_HEADS
        attended, keys, values = kernels.cache_attention(query, key, value, past_key, past_value, kv_len, heads, groups)
        return (
            kernels.rms_norm(hidden, norm_weight, cases.EPS),
            kernels.rotary(query, cos, sin, heads),
            kernels.swish(hidden, cases.ALPHA),
            attended,
            kernels.full_attention(query, query, query, heads),
            kernels.similarity(hidden, previous),
            kernels.importance(query, key, last, cases.ROWS, heads, groups),
            keys,
            values,
        )

    def signature(self) -> Signature:
        """Any number of tokens and of slots."""
        tokens = EXAMPLE_LENGTH
        rows = {"hidden": cases.WIDTH, "query": cases.QUERY_WIDTH, "key": cases.KEY_WIDTH, "value": cases.KEY_WIDTH}
        rows |= {"cos": cases.HEAD_DIM // 2, "sin": cases.HEAD_DIM // 2}
        cache = meta(1, cases.KV_HEADS, EXAMPLE_CAPACITY, cases.HEAD_DIM)
        arguments = {name: meta(1, tokens, width) for name, width in rows.items()}
        arguments |= {"norm_weight": meta(cases.WIDTH), "kv_len": meta(1, dtype=torch.int64)}
        arguments |= {"previous": meta(tokens, dtype=torch.int64), "last": meta(1, dtype=torch.int64)}
        arguments |= {"past_key_0": cache, "past_value_0": cache.clone()}
        free = {name: {1: FREE} for name in rows} | {"previous": {0: FREE}}
        free |= {"past_key_0": {2: FREE}, "past_value_0": {2: FREE}}
        axes = {name: {1: "tokens"} for name in (*rows, *cases.ROW_OUTPUTS)}
        axes |= {name: {0: "tokens"} for name in ("previous", "similarity", "importance")}
        axes |= {f"{when}_{part}_0": {2: "capacity_0"} for when in ("past", "present") for part in ("key", "value")}
        return Signature(
            tuple(arguments[name] for name in cases.INPUTS),
            tuple(free.get(name) for name in cases.INPUTS),
            cases.INPUTS,
            cases.OUTPUTS,
            axes,
        )


class CodeProducts(GraphModule):
    """Linear maps of one input, a format each.

    Args:
        dialect: that they are said in.
        weights: type of the codes, "int8" or "int4".
    """

    def __init__(self, dialect: Dialect, weights: str) -> None:
        super().__init__()
        self._signed = dialect.signed_codes
        self._forms = codes.formats_of(dialect.name, weights)
        for form in self._forms:
            stored = BlockFormat(form.bits, form.size, not form.has_zeros, self._signed)
            self.add_module(form.output, QuantizedLinear(codes.WIDTH, codes.OUTPUTS, bias=False, form=stored))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """[1, S, WIDTH] -> [1, S, OUTPUTS] each, in the order of the formats."""
        return tuple(self.get_submodule(form.output)(hidden) for form in self._forms)

    def signature(self) -> Signature:
        """Any number of tokens."""
        outputs = tuple(form.output for form in self._forms)
        axes = {name: {1: "tokens"} for name in ("hidden", *outputs)}
        return Signature((meta(1, EXAMPLE_LENGTH, codes.WIDTH),), ({1: FREE},), ("hidden",), outputs, axes)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, packed as a bundle's are."""
        for form in self._forms:
            zeros = torch.from_numpy(codes.zero_points(form)) if form.has_zeros else None
            numbers = torch.from_numpy(codes.codes(form))
            matrix = BlockQuantized(numbers, torch.from_numpy(codes.scales(form)), zeros, form.bits, form.size)
            for part, values in matrix.pack(signed=self._signed)._asdict().items():
                if values is not None:
                    yield f"{form.output}.{part}", values


def code_graph(dialect: Dialect, dtype: torch.dtype, weights: str) -> ir.Model:
    """The products in a dialect and a type, with their weights."""
    module = CodeProducts(dialect, weights)
    model = trace(module.to("meta"), dialect, dtype).model
    for name, values in module.stored():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert value.shape is not None
        typed = values.to(dtype) if values.is_floating_point() else values
        content = typed.contiguous().view(torch.uint8).numpy().tobytes()
        proto = onnx.TensorProto(name=name, data_type=int(value.dtype), dims=value.shape.numpy(), raw_data=content)
        value.const_value = ir.serde.deserialize_tensor(proto)
    return model


def block_graphs(dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, ir.Model]]:
    """The graphs of each dialect in each type, and the names of their files."""
    for dialect, dtype in product(DIALECTS.values(), dtypes):
        name = str(dtype).removeprefix("torch.")
        yield cases.graph_name(dialect.name, name), trace(Blocks().to("meta"), dialect, dtype).model
        for weights in codes.WEIGHTS:
            yield codes.codes_name(dialect.name, name, weights), code_graph(dialect, dtype, weights)


def write_block_graphs(folder: Path, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """Write those of some types."""
    for name, model in block_graphs(dtypes):
        ir.save(model, folder / name)
