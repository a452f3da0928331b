"""MiniCPM-V 2.6's vision tower: its geometry, where its weights are in a checkpoint, and the buckets of positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from framefusion.errors import CheckpointError
from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.checkpoints.tensors.weights import AnySource, Computed, Source
from framefusion.export.families.minicpmv.row import check_version, preprocessing
from framefusion.export.families.minicpmv.tower import RESAMPLER_EPS, MiniCpmVTower, ResamplerConfig
from framefusion.export.families.reading.configs import given, required, square
from framefusion.export.families.towers import POOLING_HEAD, TowerPlan
from framefusion.export.families.vit import activation_of, linear_sources, norm_sources, vit_config, vit_sources
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.families.minicpmv import ResamplerSettings, longest_side

VISION = "vpm."
RESAMPLER = "resampler."
HEAD_WIDTH = 128  # of the resampler: the released code makes hidden_size / 128 heads


def tower(checkpoint: Checkpoint) -> TowerPlan:
    """The tower on the meta device, the sources of its parameters, and what the runtime computes for it."""
    check_version(checkpoint)
    encoder = encoder_config(checkpoint)
    resampler = resampler_config(checkpoint)
    pixels = preprocessing(checkpoint)
    side = math.isqrt(encoder.num_positions)
    with torch.device("meta"):
        module = MiniCpmVTower(encoder, resampler)
    return TowerPlan(
        module=module,
        sources=sources(encoder, resampler),
        settings=ResamplerSettings(
            rows=resampler.queries,
            width=resampler.width,
            side=side,
            off_floor=off_floor(side, longest_side(pixels)),
        ),
        patch_width=encoder.patch_width,
        head_dim=encoder.head_dim,
        embed_dim=encoder.width,
        mlp_width=encoder.mlp_width,
        out_width=resampler.width,
        patches_per_token=(pixels.scale_resolution / pixels.patch_size) ** 2 / resampler.queries,
        unused={
            f"{VISION}head.*": POOLING_HEAD,
            f"{RESAMPLER}pos_embed": "the table of sines, which the released code computes anew",
        },
    )


def encoder_config(checkpoint: Checkpoint) -> VitConfig:
    """Geometry from config.json; widths and the number of blocks from the tensors themselves.

    Raises:
        CheckpointError: config.json and the tensors do not agree.
    """
    vision = required(checkpoint.config, "vision_config", checkpoint)
    positions = checkpoint.shape(f"{VISION}embeddings.position_embedding.weight")[0]
    size = square(vision, "patch_size", checkpoint)
    side = math.isqrt(positions)
    if side**2 != positions or square(vision, "image_size", checkpoint) // size != side:
        raise CheckpointError(
            f"vision_config.image_size {vision['image_size']} in patches of {size} does not make the "
            f"{positions} rows of {VISION}embeddings.position_embedding.weight: config.json is another one's"
        )
    return vit_config(
        checkpoint,
        VISION,
        depth=_depth(checkpoint, vision),
        heads=int(required(vision, "num_attention_heads", checkpoint)),
        norm_eps=float(given(vision, "layer_norm_eps", 1e-6)),
        activation=activation_of(vision, "gelu_pytorch_tanh"),
        post_norm=True,
    )


def _depth(checkpoint: Checkpoint, vision: Mapping[str, Any]) -> int:
    """Blocks that are stored: a checkpoint whose last one is unused was saved without it.

    Raises:
        CheckpointError: drop_vision_last_layer says the opposite, or layers are missing.
    """
    declared = int(required(vision, "num_hidden_layers", checkpoint))
    stored = next(i for i in itertools.count() if f"{VISION}encoder.layers.{i}.layer_norm1.weight" not in checkpoint)
    dropped = checkpoint.config.get("drop_vision_last_layer")
    if stored not in (declared, declared - 1) or stored == 0:
        raise CheckpointError(
            f"{checkpoint.folder} has {stored} layers at {VISION}encoder.layers, "
            f"vision_config.num_hidden_layers is {declared}: the checkpoint is incomplete"
        )
    if dropped is not None and bool(dropped) != (stored < declared):
        raise CheckpointError(
            f"drop_vision_last_layer is {dropped} and {VISION}encoder.layers holds {stored} of {declared} layers: "
            "config.json and the weights do not belong together"
        )
    return stored


def resampler_config(checkpoint: Checkpoint) -> ResamplerConfig:
    """Queries and width from the tensors, compared with config.json.

    Raises:
        CheckpointError: config.json and the tensors do not agree, or a head does not divide the width.
    """
    queries, width = checkpoint.shape(f"{RESAMPLER}query")
    declared = int(required(checkpoint.config, "query_num", checkpoint))
    if declared != queries:
        raise CheckpointError(
            f"query_num is {declared}, {RESAMPLER}query has {queries} rows: config.json is another one's"
        )
    if width % HEAD_WIDTH:
        raise CheckpointError(f"{RESAMPLER}query is {width} wide, which is no multiple of {HEAD_WIDTH}, one head")
    return ResamplerConfig(queries, width, width // HEAD_WIDTH)


def sources(encoder: VitConfig, resampler: ResamplerConfig) -> dict[str, AnySource]:
    """Parameter of the tower -> place in the checkpoint; q, k and v are stacked in `in_proj`, in this order."""
    found: dict[str, AnySource] = dict(vit_sources("encoder.", VISION, encoder))
    packed = (f"{RESAMPLER}attn.in_proj_weight", f"{RESAMPLER}attn.in_proj_bias")
    norm = (f"{RESAMPLER}ln_q.weight", f"{RESAMPLER}ln_q.bias")
    found["resampler.query"] = Computed((f"{RESAMPLER}query", *norm, *packed), projected_query)
    found["resampler.kv_proj.weight"] = Source(f"{RESAMPLER}kv_proj.weight", transpose=True)
    for position, part in enumerate("kv", start=1):
        rows = (position * resampler.width, (position + 1) * resampler.width)
        found[f"resampler.{part}.weight"] = Source(packed[0], rows, transpose=True)
        found[f"resampler.{part}.bias"] = Source(packed[1], rows)
    found |= linear_sources("resampler.attn_proj", f"{RESAMPLER}attn.out_proj")
    for name in ("ln_kv", "ln_post"):
        found |= norm_sources(f"resampler.{name}", RESAMPLER + name)
    found["resampler.proj.weight"] = Source(f"{RESAMPLER}proj")  # used as x @ proj, so it is stored as graphs want it
    return found


def projected_query(query: Tensor, norm: Tensor, shift: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """The attention's queries [Q, D]: ln_q and the first third of in_proj, in fp32, since no picture changes them."""
    query, norm, shift, packed, bias = (tensor.float() for tensor in (query, norm, shift, packed, bias))
    width = query.shape[-1]
    normed = nn.functional.layer_norm(query, (width,), norm, shift, RESAMPLER_EPS)
    return nn.functional.linear(normed, packed[:width], bias[:width])


def off_floor(side: int, longest: int) -> tuple[tuple[int, int, int], ...]:
    """Where torch's fp32 buckets of positions differ from whole numbers: [patches, patch, bucket].

    Patch i of n along an axis stands in bucket floor(i * side / n) of the position table, unless rounding puts it on
    the other side of a boundary, as the released code does for n = 25, 49, 50, 55, 58, 77, ... The rounding is torch's
    own (numpy's differs), so what it does is written into the bundle.
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    differing: list[tuple[int, int, int]] = []
    for count in range(1, longest + 1):
        step = float(1 / torch.tensor(count, dtype=torch.int32))  # fp32, as the released code has it
        buckets = torch.bucketize(torch.arange(0, 1 - 1e-6, step), boundaries, right=True)
        floor = torch.arange(count) * side // count
        differing += [(count, i, int(buckets[i])) for i in torch.nonzero(buckets != floor).flatten().tolist()]
    return tuple(differing)
