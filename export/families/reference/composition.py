"""Models of which transformers has no class, put together of classes that it has: what bundles are compared with.

Loads weights of a checkpoint into fp32 modules. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.export.checkpoints.checkpoint import Checkpoint
from framefusion.export.families.reference.transformers_call import TransformersCall
from framefusion.export.families.vit import ACTIVATIONS
from framefusion.export.graphs.vit import VitConfig
from framefusion.runtime.media.visual_input import Tiles, VisualInput
from framefusion.runtime.text.prompt import FIRST_EXTRA


def siglip(call: TransformersCall, prefix: str, vit: VitConfig, image_size: int, patch_size: int) -> nn.Module:
    """SiglipVisionModel with the layers that a tower runs: what they give is its last hidden state."""
    import transformers

    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    config = transformers.SiglipVisionConfig(
        hidden_size=vit.width, intermediate_size=vit.mlp_width, num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads, image_size=image_size, patch_size=patch_size,
        layer_norm_eps=vit.norm_eps, hidden_act=names[vit.activation], vision_use_head=False,
    )  # fmt: skip
    with torch.device("meta"):
        names_of_class = transformers.SiglipVisionModel(config)
    inner = "" if hasattr(names_of_class, "embeddings") else "vision_model."  # it came and went between releases
    tower: nn.Module = call.module("SiglipVisionModel", config=config, prefix=prefix, inner=inner)
    return tower


def qwen2(call: TransformersCall, config: Mapping[str, Any], prefix: str = "") -> nn.Module:
    """Qwen2ForCausalLM with the weights below `prefix`, in fp32."""
    return causal(call, "Qwen2ForCausalLM", {**config, "model_type": "qwen2"}, prefix)


def causal(call: TransformersCall, name: str, config: Mapping[str, Any], prefix: str, **how: Any) -> nn.Module:
    """A causal LM of transformers by its class's name, for the configuration of an LLM within another format."""
    import transformers

    fields = {**config, "architectures": [name]}
    read = getattr(transformers, name).config_class.from_dict(fields)
    model: nn.Module = call.model(name, config=read, prefix=prefix, **how)
    return model


def two_layers(checkpoint: Checkpoint, prefix: str) -> nn.Module:
    """A projector of two linear maps with GELU between them, `0` and `2` below the prefix."""
    inner, width = checkpoint.shape(f"{prefix}0.weight")
    projector = nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, checkpoint.shape(f"{prefix}2.weight")[0])
    )
    fill(projector, checkpoint, prefix)
    return projector


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, inner: str = "") -> None:
    """Give a module its tensors; what the checkpoint leaves out is tied to another, or not run."""
    found = {name: prefix + name.removeprefix(inner) for name in module.state_dict()}
    module.load_state_dict(
        {name: checkpoint.tensor(key) for name, key in found.items() if key in checkpoint}, strict=False
    )


def pixels(tiles: Tiles, size: int, patch: int) -> Tensor:
    """Pictures [N, 3, size, size] again; what no patch covers is 0, no convolution sees it."""
    count, rows, columns = tiles.grid
    pictures = torch.zeros(count, 3, size, size)
    values = torch.from_numpy(tiles.values).reshape(count, rows, columns, 3, patch, patch)
    pictures[:, :, : rows * patch, : columns * patch] = values.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return pictures


def last_logits(
    model: Any, call: TransformersCall, rows: Callable[[Tiles], Tensor], learned: Tensor | None = None
) -> NDArray[Any]:
    """Logits [keep, V] of the last tokens.

    Args:
        model: a causal LM of transformers.
        call: ids, the places of rows, and what the prompt shows.
        rows: of the tower and projector for pictures of one size.
        learned: the row [D] of the first learned token that no tokenizer knows.
    """
    ids = torch.from_numpy(call.prompt.token_ids)
    embedded = model.get_input_embeddings()(ids.clamp(0))
    if learned is not None:
        embedded[ids == FIRST_EXTRA] = learned
    shown = [_shown(visual, rows).to(embedded.dtype) for visual in call.visuals]
    embedded[torch.from_numpy(call.prompt.row_places)] = torch.cat([embedded[:0], *shown])
    logits: NDArray[Any] = model(inputs_embeds=embedded[None], logits_to_keep=call.keep).logits[0].numpy()
    return logits


def _shown(visual: VisualInput, rows: Callable[[Tiles], Tensor]) -> Tensor:
    features = torch.cat([rows(tiles) for tiles in visual.tiles])
    if visual.rows is None:
        return features[: visual.num_rows]  # transformers' features of a LLaVA video end with the newline
    return torch.from_numpy(visual.rows.apply(features.numpy()))
