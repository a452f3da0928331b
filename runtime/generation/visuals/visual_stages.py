"""What one video or image passes on its way from pixels to rows: cut into patches, then through the vision tower.

    preprocess -> encode_visual (-> join_rows, where its pictures passed the tower in parts)

Decodes nothing, and does not know in which order a conversation's films come.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.backends.buffer import Buffer
from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.generation.embedder import Embedder
from framefusion.runtime.media.preprocess import Preprocessing
from framefusion.runtime.media.video.frames import Video
from framefusion.runtime.media.visual_input import RowMap, VisualInput
from framefusion.runtime.request import Stopwatch
from framefusion.runtime.text.prompt import Visual

Media = Video | NDArray[np.uint8]
"""A video as it was sampled, or an image [H, W, 3]."""


class VisualStages:
    """What these stages need of a bundle.

    Attributes:
        manifest: of the bundle.
        embedder: that the tower belongs to.
    """

    manifest: Manifest
    embedder: Embedder

    def preprocessor(self, media: Sequence[Media], others: Sequence[Visual] = ()) -> Preprocessing:
        """What turns the videos and images of one conversation into patches; their number may change how."""
        images = sum(not isinstance(shown, Video) for shown in media)
        return self.manifest.preprocessing.for_images(images + others.count(Visual.IMAGE))

    def preprocess(
        self,
        media: Sequence[Media],
        stopwatch: Stopwatch,
        *,
        before: Sequence[Visual] = (),
        after: Sequence[Visual] = (),
    ) -> list[VisualInput]:
        """Patches and pieces of the prompt for videos and images of one conversation.

        Args:
            media: decoded.
            stopwatch: gets the stage "preprocess".
            before: what the conversation shows before these: videos and images are numbered.
            after: what it shows behind them.

        Raises:
            VideoError: a picture cannot be shown to this family.
        """
        visuals = list[VisualInput]()
        videos = before.count(Visual.VIDEO)
        images = before.count(Visual.IMAGE)
        preprocessor = self.preprocessor(media, [*before, *after])
        for shown in media:
            with stopwatch.stage("preprocess"):
                if isinstance(shown, Video):
                    visuals.append(preprocessor.video(shown, videos))
                    videos += 1
                else:
                    visuals.append(preprocessor.image(shown, images))
                    images += 1
        return visuals

    def encode_visual(self, visual: VisualInput) -> Buffer:
        """Rows [1+K, n, D] of one video or image: see `Embedder.encode_visual`."""
        return self.embedder.encode_visual(visual)

    def join_rows(self, parts: Sequence[Buffer], mapping: RowMap | None) -> Buffer:
        """Rows [1+K, n, D] of a video whose pictures passed the tower in parts: see `Embedder.join`."""
        return self.embedder.join(parts, mapping)

    def encode_rest(self, visuals: Sequence[VisualInput], rows: Sequence[Buffer | None]) -> list[Buffer]:
        """Rows [1+K, n, D] of each: the tower runs for those that have none.

        Raises:
            BackendError: the backend refuses or fails.
        """
        return [self.encode_visual(visual) if had is None else had for visual, had in zip(visuals, rows, strict=True)]
