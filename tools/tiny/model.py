"""The tiny Qwen2-VL: its configuration, its pre-processing, its positions, and a forward made for fast training.

The training forward (`vision_features`, `answer_hidden`) uses the modules of transformers' model but not their
`forward`: vision attention is one batched call instead of one call a temporal grid, and many questions share one
pass over the video. The saved model is the plain transformers one; `tools.tiny.evaluate` runs that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tools.tiny.clips import SIDE, Frames
from tools.tiny.prompt import token_id

PATCH = 14
MERGE = 2
TEMPORAL = 2
CELLS = SIDE // (PATCH * MERGE)  # merged tokens along a side
GRID_TOKENS = CELLS * CELLS  # LLM tokens of one temporal grid
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    end = token_id(tokenizer, "<|im_end|>")
    pad = token_id(tokenizer, "<|endoftext|>")
    return Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 12,  # so that a cost of 0.1 can be reached: layer 0 sees all tokens
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": pad,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "num_heads": 3,
            "mlp_ratio": 4,
            "hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """A fresh model. Linear layers start at unit gain: transformers' fixed 0.02 is too small for a width of 128."""
    torch.manual_seed(seed)
    model: Any = Qwen2VLForConditionalGeneration(tiny_config(tokenizer))
    depth = model.config.text_config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            gain = (2 * depth) ** -0.5 if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")) else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.copy_(_first_filters())
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
    return model


def _first_filters() -> Tensor:
    """Start the patch embedding as 96 smooth filters [96, 3, 2, 14, 14] instead of noise.

    Sum and difference of the two frames x three colour axes x the 16 lowest cosine waves. Random filters answer to
    pixel noise as much as to shapes, and training stays for long where only colour is recognised.
    """
    waves = torch.cos(math.pi * torch.arange(4)[:, None] * (torch.arange(PATCH) + 0.5) / PATCH)
    waves = F.normalize(waves, dim=1)
    plane = torch.einsum("ay,bx->abyx", waves, waves).flatten(0, 1)
    colors = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]]), dim=1)
    colors *= torch.tensor([[0.6], [1.2], [1.2]])
    times = torch.tensor([[0.5, 0.5], [1.0, -1.0]])
    filters = torch.einsum("tf,kc,pyx->tkpcfyx", times, colors, plane.view(16, PATCH, PATCH))
    return filters.flatten(0, 2) * 0.15


# --- Input ----------------------------------------------------------------------------------------------------------


def patchify(frames: Frames) -> NDArray[np.float32]:
    """Normalise and cut [T, 112, 112, 3] frames into Qwen2-VL's patches [T/2 * 64, 1176]."""
    pixels = (frames.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    pixels = pixels.transpose(0, 3, 1, 2)
    t = len(frames) // TEMPORAL
    pixels = pixels.reshape(t, TEMPORAL, 3, CELLS, MERGE, PATCH, CELLS, MERGE, PATCH)
    return np.ascontiguousarray(pixels.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * 4 * GRID_TOKENS, -1))


def patch_batch(frames: Tensor) -> Tensor:
    """The same for a batch of uint8 frames: [..., 2, 112, 112, 3] -> [N, 64, 1176], N temporal grids."""
    x = frames.reshape(-1, TEMPORAL, CELLS, MERGE, PATCH, CELLS, MERGE, PATCH, 3)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).contiguous().float().div_(255)
    shape = (3, 1, 1, 1)
    x = x.sub_(torch.tensor(MEAN).view(shape)).div_(torch.tensor(STD).view(shape))
    return x.reshape(len(x), 4 * GRID_TOKENS, -1)


def positions(before: int, grids: int, after: int) -> Tensor:
    """M-RoPE positions [3, 1, S] of text, video, text by the rule the Qwen2-VL checkpoints were trained with.

    Text after the video goes on from the largest video position plus one; transformers 5 ignores the temporal axis
    there, so its own positions are not used.
    """
    head = torch.arange(before).expand(3, -1)
    t, h, w = torch.meshgrid(torch.arange(grids), torch.arange(CELLS), torch.arange(CELLS), indexing="ij")
    video = before + torch.stack([t.flatten(), h.flatten(), w.flatten()])
    tail = before + max(grids, CELLS) + torch.arange(after).expand(3, -1)
    return torch.cat([head, video, tail], dim=1)[:, None]


# --- The training forward -------------------------------------------------------------------------------------------


def vision_features(model: Any, patches: Tensor) -> Tensor:
    """[N, 64, 1176] -> [N, 16, hidden]."""
    visual = model.model.visual
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
    cos, sin = _vision_rope(visual)
    for block in visual.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = _rotate(qkv[0], cos, sin)
        k = _rotate(qkv[1], cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, qkv[2])
        x = x + attn.proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    out: Tensor = visual.merger.mlp(visual.merger.ln_q(x).view(len(x), GRID_TOKENS, -1))
    return out


def _vision_rope(visual: Any) -> tuple[Tensor, Tensor]:
    side = torch.arange(2 * CELLS)
    blocks = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)
    blocks = blocks.view(CELLS, MERGE, CELLS, MERGE, 2).permute(0, 2, 1, 3, 4).reshape(-1, 2)
    cos, sin = visual.rotary_pos_emb(blocks, blocks)
    return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Layout:
    """Rotary tables and mask of a sequence that holds one video and `questions` branches of `length` tokens each."""

    def __init__(self, model: Any, before: int, grids: int, questions: int, length: int) -> None:
        where = positions(before, grids, length)
        self.prefix = before + grids * GRID_TOKENS
        index = torch.cat([torch.arange(self.prefix), self.prefix + torch.arange(length).repeat(questions)])
        cos, sin = model.model.language_model.rotary_emb(torch.zeros(1), where[:, :, index])
        self.cos = cos[:, None]
        self.sin = sin[:, None]  # [1, 1, S, head_dim]
        # Each branch sees the prefix and the earlier part of itself, so it is exactly a prompt of its own.
        branches = torch.kron(torch.eye(questions), torch.ones(length, length).tril()).bool()
        self.mask = torch.cat([torch.ones(len(branches), self.prefix, dtype=torch.bool), branches], dim=1)


def answer_hidden(model: Any, x: Tensor, layout: Layout) -> Tensor:
    """Run the decoder over embeddings [B, S, H]; final hidden states of the branches [B, S - prefix, H]."""
    text = model.model.language_model
    cut = layout.prefix
    for layer in text.layers:
        last = layer is text.layers[-1]
        attn = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        if last:  # nothing reads the prefix's output of the last layer
            x = x[:, cut:]
        q = _heads(attn.q_proj(h[:, cut:] if last else h), attn.head_dim)
        k = _heads(attn.k_proj(h), attn.head_dim)
        v = _heads(attn.v_proj(h), attn.head_dim)
        k = _rotate(k, layout.cos, layout.sin).repeat_interleave(attn.num_key_value_groups, 1)
        v = v.repeat_interleave(attn.num_key_value_groups, 1)
        tail = slice(cut, None) if last else slice(None)
        q = _rotate(q, layout.cos[:, :, tail], layout.sin[:, :, tail])
        mixed = F.scaled_dot_product_attention(q if last else q[:, :, cut:], k, v, attn_mask=layout.mask)
        if not last:
            front = F.scaled_dot_product_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], is_causal=True)
            mixed = torch.cat([front, mixed], dim=2)
        x = x + attn.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(_norm(layer.post_attention_layernorm, x))
    return _norm(text.norm, x)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]"""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
