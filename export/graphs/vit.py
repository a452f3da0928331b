"""The plain vision transformer of SigLIP, CLIP, InternViT and NaViT: patch embedding, positions, pre-norm blocks.

Pictures of one size are a batch; every patch sees every patch of its picture. What comes after the blocks (pooling,
pixel shuffle, projector, resampler) belongs to a family's tower. Knows no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import framefusion.ops.kernels  # noqa: F401  (registers the ops)
from framefusion.export.graphs.layers import LayerNorm, Linear, RMSNorm, weight

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
QUICK_GELU = 1.702
"""alpha of x * sigmoid(alpha * x) in CLIP's approximation of GELU."""


@dataclass(frozen=True)
class VitConfig:
    """Geometry of an encoder, read from the checkpoint."""

    depth: int  # blocks that are run; a checkpoint may hold one more
    width: int
    num_heads: int
    mlp_width: int
    patch_width: int  # channels * patch * patch
    num_positions: int  # rows of the position table, the class token's included
    norm_eps: float = 1e-6
    activation: Activation = "gelu_tanh"
    norm: Literal["layer", "rms"] = "layer"
    class_token: bool = False
    pre_norm: bool = False  # LayerNorm between embedding and blocks (CLIP)
    post_norm: bool = False  # norm after the last block
    patch_bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over the full width of q and k (InternViT-6B)
    qk_norm_eps: float = 1e-6
    layer_scale: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads


def make_norm(config: VitConfig) -> LayerNorm | RMSNorm:
    """The norm before attention and MLP of a block, and behind the last one."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.width, config.norm_eps)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x * sigmoid(1.702 x), or GELU, exact or by tanh: [...] -> the same shape."""
    if activation == "quick_gelu":
        return torch.ops.framefusion.swish(x, QUICK_GELU)  # type: ignore[no-any-return]
    return nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class VitBlock(nn.Module):
    """Pre-norm attention within a picture, then the MLP; each branch may have a learned scale."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.activation = config.activation
        self.norm1 = make_norm(config)
        self.norm2 = make_norm(config)
        self.q = Linear(width, width, config.qkv_bias)
        self.k = Linear(width, width, config.qkv_bias)
        self.v = Linear(width, width, config.qkv_bias)
        self.q_norm = RMSNorm(width, config.qk_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.qk_norm_eps) if config.qk_norm else None
        self.proj = Linear(width, width, bias=True)
        self.fc1 = Linear(width, config.mlp_width, bias=True)
        self.fc2 = Linear(config.mlp_width, width, bias=True)
        self.scale1 = weight(width) if config.layer_scale else None
        self.scale2 = weight(width) if config.layer_scale else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, P, E] -> the same shape."""
        normed = self.norm1(hidden)
        query = self.q(normed)
        key = self.k(normed)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query)
            key = self.k_norm(key)
        out = self.proj(torch.ops.framefusion.full_attention(query, key, self.v(normed), self.num_heads))
        hidden = hidden + (out if self.scale1 is None else out * self.scale1)
        out = self.fc2(activate(self.fc1(self.norm2(hidden)), self.activation))
        return hidden + (out if self.scale2 is None else out * self.scale2)  # type: ignore[no-any-return]


class VitEncoder(nn.Module):
    """Patches [N, P, W] -> hidden states [N, P, E], the class token's in front where there is one."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_width, config.width, config.patch_bias)
        self.positions = weight(config.num_positions, config.width)
        self.class_token = weight(config.width) if config.class_token else None
        self.pre_norm = LayerNorm(config.width, config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(VitBlock(config) for _ in range(config.depth))
        self.post_norm = make_norm(config) if config.post_norm else None

    def forward(self, patches: Tensor, places: Tensor | None = None) -> Tensor:
        """Hidden states of N pictures of one size.

        Args:
            patches: [N, P, W].
            places: [P] rows of the position table, where pictures differ in size; None takes all in order.
        """
        hidden = self.patch_embed(patches)
        if self.class_token is not None:
            first = self.class_token.expand(hidden.shape[0], 1, -1)
            hidden = torch.cat((first, hidden), 1)
        hidden = hidden + (self.positions if places is None else self.positions.index_select(0, places))
        if self.pre_norm is not None:
            hidden = self.pre_norm(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden if self.post_norm is None else self.post_norm(hidden)  # type: ignore[no-any-return]
