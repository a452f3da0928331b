"""What the LLaVA families' cases share: pictures of transformers' image processors, and which rows are learned ones.

Pictures of frames are Pillow's resize and one line of arithmetic, because transformers' video processors need
torchvision.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from framefusion.runtime.media.video.frames import Video
from tests.families import llava_checkpoints as tiny
from tests.families.case import Array, FamilyCase, Media

NEWLINE = 7.0  # marks the learned rows where transformers' code lays out ones


class LlavaCase(FamilyCase):
    """What the three families share: pictures, and which of their rows are learned ones."""

    kind: ClassVar[str]
    """Of the tower: siglip or clip."""
    each: ClassVar[bool] = False
    """Whether every image is cut into tiles, or only one that is alone."""

    @property
    def side(self) -> int:
        """Pixels along a picture."""
        return int(tiny.vision_config(self.kind)["image_size"])

    @property
    def patches(self) -> int:
        """Patches along a picture."""
        return self.side // tiny.PATCH

    @abstractmethod
    def image_processor(self) -> Any:
        """transformers' own."""

    @abstractmethod
    def frame(self, frame: Array) -> Array:
        """RGB [side, side, 3] of a frame of any size."""

    @abstractmethod
    def normalised(self, pixels: Array) -> Tensor:
        """[N, 3, H, W] of RGB [N, H, W, 3]."""

    @abstractmethod
    def pooled(self, folder: Path) -> int:
        """Rows along a frame, once its patches are pooled."""

    @abstractmethod
    def newlines(self, folder: Path) -> str:
        """Where a video has learned rows: grid, frame, one_token or no_token."""

    @abstractmethod
    def max_tiles(self, folder: Path) -> int:
        """Tiles whose number of patches an image is shrunk to."""

    def images(self, media: Sequence[Media]) -> dict[str, Any]:
        """What transformers' image processor says of all images of a conversation; pictures [n, 3, H, W] of each."""
        images = [item for item in media if not isinstance(item, Video)]
        inputs = self.image_processor()(images if self.each else [images])
        single = not self.each and len(images) > 1
        counts = [1 if single else 1 + num_tiles(size, self.side) for size in inputs["image_sizes"]]
        pictures = [torch.as_tensor(np.asarray(v)) for v in inputs["pixel_values"]]
        return {
            "pixel_values": [values[:count] for values, count in zip(pictures, counts, strict=True)],
            "image_sizes": [tuple(map(int, size)) for size in inputs["image_sizes"]],
            "batch_num_images": [1] * len(images) if self.each else [len(images)],
        }

    def video(self, video: Video) -> Tensor:
        """Pictures [N, 3, H, W]."""
        return self.normalised(np.stack([self.frame(frame) for frame in video.frames]))

    def pixels(self, folder: Path, media: Media) -> list[Array]:
        return self.pixels_among(folder, media, [media])

    def pixels_among(self, folder: Path, media: Media, among: Sequence[Media]) -> list[Array]:
        pictures = self.video(media) if isinstance(media, Video) else self.of_image(among, self.images(among), media)
        columns = nn.functional.unfold(pictures, tiny.PATCH, stride=tiny.PATCH)  # a convolution's patches
        return [columns.transpose(1, 2).numpy()]

    def of_image(self, among: Sequence[Media], inputs: dict[str, Any], media: Media) -> Tensor:
        images = [item for item in among if not isinstance(item, Video)]
        pictures: Tensor = inputs["pixel_values"][next(i for i, image in enumerate(images) if image is media)]
        return pictures

    def packed(
        self, folder: Path, features: Sequence[Tensor], inputs: dict[str, Any], newline: Tensor | None
    ) -> list[Tensor]:
        """Rows of each image by transformers' own layout of features [n, P, D], `newline` [D] at the ends of lines."""
        from transformers import LlavaOnevisionModel

        vision = SimpleNamespace(image_size=self.side, patch_size=tiny.PATCH)
        model: Any = SimpleNamespace(
            config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=tiny.tilings(self.side))
        )
        pack: Any = LlavaOnevisionModel.pack_image_features
        aspect = f"anyres_max_{self.max_tiles(folder)}"
        packed: list[Tensor] = pack(model, features, inputs["image_sizes"], newline, vision_aspect_ratio=aspect)[0]
        return packed

    def layouts(self, folder: Path, media: Sequence[Media]) -> list[list[bool]]:
        """Of each visual: which of its rows are learned ones."""
        inputs = self.images(media) if any(not isinstance(item, Video) for item in media) else {"pixel_values": []}
        ones = [torch.ones(len(values), self.patches**2, 1) for values in inputs["pixel_values"]]
        images = iter(self.packed(folder, ones, inputs, torch.tensor([NEWLINE])) if ones else [])
        return [
            self.video_layout(folder, len(item.frames))
            if isinstance(item, Video)
            else (next(images)[:, 0] == NEWLINE).tolist()
            for item in media
        ]

    def video_layout(self, folder: Path, frames: int) -> list[bool]:
        side, newlines = self.pooled(folder), self.newlines(folder)
        if newlines == "grid":
            return ([False] * side + [True]) * side * frames
        if newlines == "frame":
            return ([False] * side**2 + [True]) * frames
        return [False] * side**2 * frames + [True] * (newlines == "one_token")

    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        labels, first = [-1] * len(ids), 0
        for item, layout, start in zip(media, *self.runs(folder, ids, media), strict=True):
            item_labels = self.own_labels(folder, item, layout)
            labels[start : start + len(item_labels)] = [label + first if label >= 0 else -1 for label in item_labels]
            first += max(item_labels) + 1
        return labels

    def own_labels(self, folder: Path, media: Media, layout: list[bool]) -> list[int]:
        """Places of a frame, the learned rows that every frame has among them; or the places of an image."""
        if isinstance(media, Video) and self.newlines(folder) in ("grid", "frame"):
            return list(range(len(layout) // len(media.frames))) * len(media.frames)
        places = self.pooled(folder) ** 2 if isinstance(media, Video) else len(layout)
        numbers = iter(i % places for i in range(len(layout)))
        return [-1 if newline else next(numbers) for newline in layout]

    def runs(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> tuple[list[list[bool]], list[int]]:
        """The layout of each visual, and where it begins."""
        layouts, starts, at = self.layouts(folder, media), [], 0
        for layout in layouts:
            at = next(i for i in range(at, len(ids)) if self.is_row(folder, ids[i]))
            starts.append(at)
            at += len(layout)
        return layouts, starts

    @abstractmethod
    def is_row(self, folder: Path, index: int) -> bool:
        """Whether an id stands for a row of the tower."""


def num_tiles(size: Sequence[int], side: int) -> int:
    from transformers.image_processing_utils import select_best_resolution

    tall, wide = select_best_resolution(tuple(map(int, size)), tiny.tilings(side))
    return int(tall * wide // side**2)


def resized(pixels: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tokenizer_of(folder: Path) -> Any:
    import transformers

    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(tokenizer_file=str(folder / "tokenizer.json"))
