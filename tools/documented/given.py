"""What the pages take as given in their Python: a live model of transformers, and what its processor makes of a film.

The tiny checkpoint of tests/models, and clip.mp4 of the folder that the page is run in. Its pixels and token ids are
this package's, since transformers' processors want torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLForConditionalGeneration

from framefusion import Pipeline, Turn, Visual
from framefusion.runtime.request import Stopwatch

CHECKPOINT = Path(__file__).parents[2] / "tests" / "models" / "tiny_qwen2_vl"


def processed(bundle: Path, film: Path) -> dict[str, Any]:
    """The tensors of a question about a film: ids [1, S], patches [P, W] and grid [1, 3]."""
    with Pipeline(str(bundle)) as pipeline:
        turns = [Turn("user", (Visual.VIDEO, "What happens?"))]
        visuals = pipeline.read_visuals(turns, [film], pipeline.manifest.sampling, Stopwatch())
        prompt = pipeline.prompt(turns, visuals)
    (tiles,) = visuals[0].tiles
    ids = torch.from_numpy(prompt.token_ids)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.where(torch.from_numpy(prompt.labels >= 0), 2, 0)[None].int(),
        "pixel_values_videos": torch.from_numpy(tiles.values).flatten(0, 1),
        "video_grid_thw": torch.tensor([list(tiles.grid)]),
    }


model: Any = Qwen2VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
model.eval()
inputs = processed(Path("bundle"), Path("clip.mp4"))
