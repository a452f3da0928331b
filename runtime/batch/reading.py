"""How a batch reads films: with a user's limits instead of those of a server's clients, and as many bytes as there are.

Knows no question.
"""

from __future__ import annotations

from pathlib import Path

from framefusion.runtime.format.manifest import Manifest
from framefusion.runtime.media.frame_sampling import FrameSampling
from framefusion.runtime.media.media_file import MediaLimits
from framefusion.runtime.server.media.policy import MediaPolicy
from framefusion.runtime.server.media.reader import MediaReader

NO_LIMIT = 1 << 62
DECODER_MEMORY = 8 << 30
DECODER_SECONDS = 3600.0


def local_files() -> MediaPolicy:
    """Every file of this machine, and nothing of the network: for names that the user wrote."""
    return MediaPolicy(local_folder=Path("/"), file_bytes=NO_LIMIT)


def batch_reader(
    manifest: Manifest, policy: MediaPolicy, decoders: int, sampling: FrameSampling | None = None
) -> MediaReader:
    """What opens and decodes the films of a batch.

    Args:
        manifest: of the bundle.
        policy: what may be opened.
        decoders: films that are decoded at once.
        sampling: of their frames; None takes the bundle's.
    """
    return MediaReader(
        policy,
        manifest.preprocessing,
        sampling or manifest.sampling,
        MediaLimits(),
        DECODER_MEMORY,
        DECODER_SECONDS,
        decoders,
        request_bytes=None,
    )
