"""Models of which transformers has no class, put together of classes that it has: what bundles are compared with.

Loads weights of a checkpoint into fp32 modules. Knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from framefusion.export.checkpoint import Checkpoint
from framefusion.export.families.vit import ACTIVATIONS
from framefusion.export.graph.vit import VitConfig
from framefusion.runtime.prompt import FIRST_EXTRA, Prompt
from framefusion.runtime.visual_input import Tiles, VisualInput


def siglip(checkpoint: Checkpoint, prefix: str, vit: VitConfig, image_size: int, patch_size: int) -> nn.Module:
    """SiglipVisionModel with the layers that a tower runs: what they give is its last hidden state."""
    import transformers

    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    config = transformers.SiglipVisionConfig(
        hidden_size=vit.width, intermediate_size=vit.mlp_width, num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads, image_size=image_size, patch_size=patch_size,
        layer_norm_eps=vit.norm_eps, hidden_act=names[vit.activation], vision_use_head=False,
    )  # fmt: skip
    tower: nn.Module = transformers.SiglipVisionModel(config)
    inner = "" if hasattr(tower, "embeddings") else "vision_model."  # the outer module came and went between releases
    fill(tower, checkpoint, prefix, inner)
    return tower.eval()


def qwen2(checkpoint: Checkpoint, config: Mapping[str, Any], prefix: str = "") -> nn.Module:
    """Qwen2ForCausalLM."""
    import transformers

    told = {**config, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    model: nn.Module = transformers.Qwen2ForCausalLM(transformers.Qwen2Config.from_dict(told))
    fill(model, checkpoint, prefix)
    return model.eval()


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
    model: Any,
    prompt: Prompt,
    visuals: Sequence[VisualInput],
    rows: Callable[[Tiles], Tensor],
    learned: Tensor | None = None,
) -> NDArray[Any]:
    """Logits [V] of a prompt's last token.

    Args:
        model: a causal LM of transformers.
        prompt: ids and the places of rows.
        visuals: what the prompt shows.
        rows: of the tower and projector for pictures of one size.
        learned: the row [D] of the first learned token that no tokenizer knows.
    """
    ids = torch.from_numpy(prompt.token_ids)
    embedded = model.get_input_embeddings()(ids.clamp(0))
    if learned is not None:
        embedded[ids == FIRST_EXTRA] = learned
    shown = [_shown(visual, rows).to(embedded.dtype) for visual in visuals]
    embedded[torch.from_numpy(prompt.row_places)] = torch.cat([embedded[:0], *shown])
    logits: NDArray[Any] = model(inputs_embeds=embedded[None], logits_to_keep=1).logits[0, -1].numpy()
    return logits


def _shown(visual: VisualInput, rows: Callable[[Tiles], Tensor]) -> Tensor:
    features = torch.cat([rows(tiles) for tiles in visual.tiles])
    if visual.rows is None:
        return features[: visual.num_rows]  # transformers' features of a LLaVA video end with the newline
    return torch.from_numpy(visual.rows.apply(features.numpy()))
