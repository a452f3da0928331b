"""KV caches in int8: what can have them, and the scales of their channels, which a build measures (eager/kv_scales.py).

Scales are parameters of the graphs, beside the weights; before they were measured they have a shape and no value. Knows
no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from framefusion.errors import BudgetError
from framefusion.export.checkpoints.tensors.weights import AnySource, Computed
from framefusion.export.graphs.decoder import Block, DecoderConfig
from framefusion.export.graphs.graph_plan import GraphPlan
from framefusion.export.graphs.tracing.dialects import Dialect
from framefusion.export.options import BuildOptions
from framefusion.runtime.format.manifest import KvCacheRecord

KEY = "key_scale"
VALUE = "value_scale"
PARTS = (KEY, VALUE)
"""Parameters of an attention block."""
_FLAG = "--kv-cache-dtype int8"


def check_kv_cache(options: BuildOptions, dialect: Dialect) -> None:
    """Refuse what cannot run caches in int8.

    Raises:
        BudgetError: naming the way out.
    """
    if options.kv_cache_dtype is None:
        return
    if not dialect.quantized_caches:
        raise BudgetError(
            f"{_FLAG}: graphs of the dialect {dialect.name} say attention in standard operators, whose caches are "
            "floats: build with --dialect gqa, or without it"
        )
    if options.backend is not None:
        raise BudgetError(f"{_FLAG}: {options.backend} engines have caches of floats: leave --backend out, or this")
    if options.reduction == "fixed":
        raise BudgetError(
            f"{_FLAG}: the prefill of the fixed mode writes caches of floats: build with --reduction adaptive, or "
            "without it"
        )
    if options.dtype == "bfloat16":
        raise BudgetError(
            f"{_FLAG}: only ONNX Runtime's CPU kernels run such caches, and they do not compute bfloat16: "
            "build with --dtype float32 or float16"
        )


class KvScales:
    """The scales of all layers' caches.

    Args:
        config: of the decoder.
        dtype: of the bundle, in which they are stored.

    Attributes:
        record: the manifest's part on them; of a plan that measured nothing, as far as it is known.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        self._shape = (1, config.num_kv_heads, 1, config.head_dim)
        self._dtype = dtype
        self._scales: dict[tuple[int, str], Tensor] = {}
        self.record = KvCacheRecord("int8", tokens=0, clipped=0.0)

    def put(self, layer: int, part: str, scales: Tensor) -> None:
        """Set the scales of a layer, [1, Hkv, 1, hd] in any floating type; no less than the bundle's type can say."""
        least = torch.finfo(self._dtype).tiny
        self._scales[layer, part] = scales.to(self._dtype).clamp(min=least).view(self._shape)

    def measured(self, tokens: int, clipped: float) -> None:
        """Say what the scales were measured on, and the share of further numbers beyond them."""
        self.record = replace(self.record, tokens=tokens, clipped=clipped)

    def scale(self, layer: int, part: str) -> Tensor:
        """The scales of a layer, [1, Hkv, 1, hd] in the bundle's type; on the meta device before they were measured."""
        found = self._scales.get((layer, part))
        return torch.empty(self._shape, device="meta") if found is None else found

    def sources(self, blocks: Sequence[Block]) -> Iterator[tuple[str, AnySource]]:
        """Parameter of a segment with these blocks -> where its scales come from."""
        for index, block in enumerate(blocks):
            if block.kind == "attention":
                for part in PARTS:
                    yield f"blocks.{index}.{part}", Computed((), partial(self.scale, block.layer, part))

    def read(self, folder: Path, graph: GraphPlan, blocks: Sequence[Block]) -> None:
        """Take over what a bundle holds.

        Args:
            folder: the bundle.
            graph: of a segment.
            blocks: of that segment.
        """
        initializers = ir.load(folder / graph.name).graph.initializers
        for index, block in enumerate(blocks):
            for part in PARTS if block.kind == "attention" else ():
                place = initializers[f"blocks.{index}.{part}"].const_value
                assert isinstance(place, ir.ExternalTensor), part
                file = folder / graph.folder / str(place.location)
                content = np.fromfile(file, np.uint8, int(place.length or 0), offset=int(place.offset or 0))
                self._scales[block.layer, part] = torch.from_numpy(content).view(self._dtype).view(self._shape)
