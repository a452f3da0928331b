"""What each family must show, against parts that nobody here wrote: the interface of a test case, and what all share.

A case writes tiny checkpoints as the family's own tools would leave them, and holds a reference made of transformers'
classes. `test_families.py` runs every case through the same questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.text.prompt import Prompt, Turn, Visual

Array = NDArray[Any]
Media = Video | Array
"""A video as it was sampled, or an image [H, W, 3]; several of them are `media`, too."""

VIDEO, IMAGE = Visual.VIDEO, Visual.IMAGE


class Reference(ABC):
    """A model in fp32 made of transformers' classes, with the weights of a tiny checkpoint."""

    @abstractmethod
    def features(self, media: Sequence[Media]) -> Array:
        """[n, D]: the rows that the prompt shows for these videos and images, learned separator rows left out."""

    @abstractmethod
    def logits(self, prompt: Prompt, media: Sequence[Media], answer: Sequence[int]) -> Array:
        """[S + len(answer), V]: logits behind every token of the prompt and of an answer that follows it.

        Only ids and positions may be taken from `prompt`; ids below 0 are rows that no token stands for.
        """


class FamilyCase(ABC):
    """The test configuration of one row of the table of families."""

    family: ClassVar[str]
    """Name of the row."""
    variants: ClassVar[tuple[str, ...]]
    """Checkpoints that differ in layout, type, heads; the first one is asked everything, the others a video."""
    thorough: ClassVar[tuple[str, ...]] = ()
    """Variants beside the first one that are asked everything, too."""
    limit: ClassVar[float] = 1e-4
    """Of relative errors: fp32 sums in another order differ by about 1e-6 a layer; a wrong detail by 1e-2 and more."""

    @abstractmethod
    def write(self, folder: Path, variant: str) -> None:
        """Write a tiny checkpoint with random weights into an empty folder."""

    @abstractmethod
    def reference(self, folder: Path) -> Reference:
        """The reference of a checkpoint that `write` left."""

    @abstractmethod
    def pixels(self, folder: Path, media: Media) -> list[Array]:
        """What the tower sees by the family's own processor or formula, laid out as `VisualInput.tiles`."""

    def pixels_among(self, folder: Path, media: Media, among: Sequence[Media]) -> list[Array]:
        """The same where it depends on what else the conversation shows."""
        return self.pixels(folder, media)

    @abstractmethod
    def prompt_ids(self, folder: Path, turns: Sequence[Turn], media: Sequence[Media]) -> list[int]:
        """Token ids by the family's own processor, chat template or formula; -1 for rows of the tower without a token,
        -2 for learned rows."""

    @abstractmethod
    def labels(self, folder: Path, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """patch_type of every token, as families.md describes the reference code's, by a formula of the test's own.

        Those of a later video or image start behind the largest of the one before.
        """

    @abstractmethod
    def indices(self, total_frames: int, fps: float) -> list[int]:
        """Frames that the family's own code would pick from a film, with the checkpoint's own numbers."""


def clip(frames: int = 8, height: int = 84, width: int = 112, seed: int = 0) -> NDArray[np.uint8]:
    """A film with what reduction looks for: things that stay and a patch that moves."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 14 + 1, width // 14 + 1, 3))
    still = np.kron(coarse, np.ones((14, 14, 1)))[:height, :width]
    film = np.repeat(still[None], frames, axis=0) + random.integers(0, 8, (frames, height, width, 3))
    for t, frame in enumerate(film):
        frame[20:48, 6 * t : 6 * t + 28] = random.integers(0, 256, 3)
    shown: NDArray[np.uint8] = np.minimum(film, 255).astype(np.uint8)
    return shown


def picture(height: int = 70, width: int = 98, seed: int = 1) -> NDArray[np.uint8]:
    """An image [H, W, 3]."""
    shown: NDArray[np.uint8] = clip(1, height, width, seed)[0]
    return shown


CONVERSATIONS: dict[str, tuple[list[Turn], list[NDArray[np.uint8]]]] = {
    "video": ([Turn("user", (VIDEO, "What happens?"))], [clip()]),
    "text": ([Turn("user", ("What is 1 + 1?",))], []),
    "image": ([Turn("user", (IMAGE, "What is this?"))], [picture()]),
    "images": ([Turn("user", (IMAGE, IMAGE, "Which?"))], [picture(), picture(112, 70, seed=2)]),
    "videos": ([Turn("user", (VIDEO, VIDEO, "Same?"))], [clip(), clip(16, 70, 70, seed=3)]),
    "mixed": ([Turn("user", (IMAGE, VIDEO, "Is it there?"))], [picture(), clip(seed=4)]),
    "turns": (
        [Turn("user", (VIDEO, "What?")), Turn("assistant", ("A cat.",)), Turn("user", (IMAGE, "And this?"))],
        [clip(), picture()],
    ),
}
"""Prompts that every family answers."""


def relative_error(ours: Array, reference: Array) -> float:
    """Largest difference over the largest magnitude of the reference."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
