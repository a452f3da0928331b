"""Writes a Qwen2-VL checkpoint of a published model's true shape, with random weights, in bf16 shards with an index.

    python -m tools.bench.big_checkpoint FOLDER --shape 7b              # 16.6 GB
    python -m tools.bench.big_checkpoint FOLDER --shape 72b --headers   # all headers, holes for data: a few MB

Names, shards and configuration are as the hub has them, the tokenizer is the tiny model's. A shard is written in pieces
of some megabytes: no tensor is ever whole in memory. With the same shape the bytes are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from tools.bench.setting import PIXELS, SEED, SHAPES, TOKENIZER, Shape, special_ids

SHARD = 5_000_000_000  # bytes at most, as save_pretrained cuts
PIECE = 1 << 22  # numbers drawn at a time
PATCH = (3, 2, 14, 14)  # channels, frames, rows, columns
Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class BigShape:
    """An LLM and its vision tower."""

    llm: Shape
    depth: int = 32
    embed_dim: int = 1280
    heads: int = 16


BIG_SHAPES = {
    "7b": BigShape(SHAPES["qwen2-7b"]),
    "72b": BigShape(Shape(8192, 29568, 80, 64, 8, 152064, False)),
    "tiny": BigShape(Shape(64, 160, 4, 4, 2, 448, False), 2, 64, 4),
}


def write_big_checkpoint(shape: BigShape, folder: Path, *, headers_only: bool = False) -> Path:
    """Write the checkpoint, or only what can be known of it without reading a weight.

    Args:
        shape: what to write.
        folder: to be made.
        headers_only: leave holes where the weights would be; they read as zeros and take no room on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(shards_of(tensors_of(shape)))
    weight_map: dict[str, str] = {}
    total = 2 * sum(math.prod(sizes) for shard in shards for sizes in shard.values())
    with click.progressbar(length=total, label=str(folder), file=sys.stderr) as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            with (folder / name).open("wb") as file:
                file.write(header_of(shard))
                if headers_only:
                    file.truncate(file.tell() + 2 * sum(map(math.prod, shard.values())))
                    continue
                for tensor, sizes in shard.items():
                    for piece in numbers_of(tensor, sizes):
                        bar.update(file.write(piece))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    contents = {"model.safetensors.index.json": index, "config.json": config_of(shape)} | settings()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return folder


def tensors_of(shape: BigShape) -> Tensors:
    """Names and shapes of all tensors, in the order of the shards."""
    llm = shape.llm
    width = shape.embed_dim
    hidden = llm.hidden_size
    inner = llm.intermediate_size
    kv = hidden // llm.num_heads * llm.num_kv_heads
    tensors: Tensors = {"visual.patch_embed.proj.weight": (width, *PATCH)}
    for index in range(shape.depth):
        block = f"visual.blocks.{index}."
        tensors |= {f"{block}{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        for name, sizes in (("attn.qkv", (3 * width, width)), ("attn.proj", (width, width))):
            tensors |= _linear(block + name, *sizes)
        tensors |= _linear(f"{block}mlp.fc1", 4 * width, width) | _linear(f"{block}mlp.fc2", width, 4 * width)
    tensors |= {f"visual.merger.ln_q.{part}": (width,) for part in ("weight", "bias")}
    tensors |= _linear("visual.merger.mlp.0", 4 * width, 4 * width) | _linear("visual.merger.mlp.2", hidden, 4 * width)
    tensors["model.embed_tokens.weight"] = (llm.vocab_size, hidden)
    for index in range(llm.num_layers):
        layer = f"model.layers.{index}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            tensors |= _linear(f"{layer}self_attn.{name}_proj", rows, hidden)
        tensors[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        tensors |= {f"{layer}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        tensors[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        tensors |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (llm.vocab_size, hidden)}


def _linear(name: str, rows: int, columns: int) -> Tensors:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def shards_of(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors in runs of at most SHARD bytes."""
    shard: Tensors = {}
    for name, sizes in tensors.items():
        if shard and 2 * sum(map(math.prod, (*shard.values(), sizes))) > SHARD:
            yield shard
            shard = {}
        shard[name] = sizes
    yield shard


def header_of(shard: Tensors) -> bytes:
    """Length and header of a safetensors file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in shard.items():
        begin = end
        end = end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def numbers_of(name: str, sizes: tuple[int, ...]) -> Iterator[memoryview]:
    """Random bf16 numbers: weights of mean 0 whose sums over their inputs have a variance of about 1; norms are 1.

    Random bits give sign and mantissa, the exponent is set: no other way to draw is faster than a disk.
    """
    count = math.prod(sizes)
    is_norm = "norm" in name or ".ln_q." in name
    inputs = math.prod(sizes[1:]) if len(sizes) > 1 else 1e4
    exponent = 127 + math.floor(math.log2(inputs**-0.5 / math.sqrt(7 / 3)))  # the root mean square of 1 .. 2
    random = np.random.Generator(np.random.SFC64([SEED, *name.encode()]))
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        if is_norm and name.endswith("weight"):
            bits = np.full(size, 127 << 7, np.uint16)
        else:
            bits = random.integers(0, 1 << 64, -(-size // 4), np.uint64).view(np.uint16)[:size]
            bits = bits & np.uint16(0x807F) | np.uint16(exponent << 7)
        yield bits.data.cast("B")


def config_of(shape: BigShape) -> dict[str, Any]:
    """config.json as the hub has it: the LLM's part at the top level."""
    llm = shape.llm
    ids = special_ids()
    half = llm.hidden_size // llm.num_heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "bfloat16",
        "hidden_size": llm.hidden_size, "intermediate_size": llm.intermediate_size, "hidden_act": "silu",
        "num_hidden_layers": llm.num_layers, "num_attention_heads": llm.num_heads,
        "num_key_value_heads": llm.num_kv_heads, "vocab_size": llm.vocab_size, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": section},
        "tie_word_embeddings": llm.tied, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {
            "depth": shape.depth, "embed_dim": shape.embed_dim, "mlp_ratio": 4, "num_heads": shape.heads,
            "in_chans": 3, "hidden_size": llm.hidden_size, "patch_size": PATCH[2], "temporal_patch_size": PATCH[1],
            "spatial_merge_size": 2, "spatial_patch_size": PATCH[2],
        },
    }  # fmt: skip


def settings() -> dict[str, Any]:
    """The small files beside the weights."""
    generation = {"eos_token_id": special_ids()["<|im_end|>"], "do_sample": False}
    return {"preprocessor_config.json": PIXELS, "generation_config.json": generation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=BIG_SHAPES, default="7b")
    parser.add_argument("--headers", action="store_true", help="leave holes where the weights would be")
    arguments = parser.parse_args()
    write_big_checkpoint(BIG_SHAPES[arguments.shape], arguments.folder, headers_only=arguments.headers)


if __name__ == "__main__":
    main()
