"""VidCom2: more tokens for frames unlike the rest of the video, and of each frame the tokens unlike the others.

Knows hidden states, frames and counts only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from framefusion.reducers.reducer import Reading, Selection
from framefusion.reduction import tracks
from framefusion.reduction.plan import Mask, top
from framefusion.reduction.tracks import FloatArray, IntArray

TEMPERATURE = 0.01
EPSILON = 1e-8  # of equation 5
ROUNDING = 1e-5
"""Two machines sum in another order, and still pictures repeat their tokens: so near, cosines tie."""
TOKENS = 0.01
"""So near, the remainders of quotas tie: what ROUNDING becomes at the temperature of equation 5."""

Floats = npt.NDArray[np.float64]


class VidCom2(Selection):
    """Keep tokens by uniqueness in their frame and in the video (Liu et al., arXiv 2505.14454, section 3).

    Equations 3 to 10 as printed. With the rows x of T frames, M tokens each, and the kept share R:
    u_video = -cos(x, mean of the video), u_frame = -cos(x, mean of the frame); a frame's uniqueness is the mean of its
    u_video; sigma = softmax over frames at temperature 0.01; a frame keeps the share R (1 + sigma - 1/T) of its tokens,
    those of the highest u_frame + u_video.

    Three deviations. The shares of the paper are rounded frame by frame; here the whole tokens left over go to the
    largest remainders, so that the sum is the count which the cost allows. A frame whose share would exceed its tokens
    passes the rest on. All visual tokens of a prompt are one video, separators with a label among them, and frames may
    differ in size. (The authors' released code ranks by Gaussian kernels on half of the channels instead of cosines;
    the paper's equations are followed.)
    """

    name = "vidcom2"
    paper = "VidCom2, arXiv 2505.14454, equations 3-10"
    inputs = frozenset({"features"})

    def choose(self, reading: Reading) -> Mask:
        """The most unique tokens of each frame.  [S]"""
        assert reading.features is not None
        # 1. The visual tokens' rows, cut into frames.
        numbers = tracks.frame_numbers(reading.labels)
        visual = np.flatnonzero(numbers >= 0)
        rows = reading.features[visual]
        norms = np.linalg.norm(reading.features, axis=1)[visual]
        ends = np.cumsum(np.bincount(numbers[visual]))  # frames follow each other
        frames = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        # 2. How many tokens each frame keeps: more where it is unlike the mean of the video.
        of_video = -_alike(rows, norms, rows.mean(axis=0))
        uniqueness = [float(of_video[frame].mean()) for frame in frames]
        quotas = frame_quotas(uniqueness, np.diff(ends, prepend=0), reading.keep)
        # 3. In each frame those tokens that are least like the means of frame and video.
        kept = np.zeros(visual.size, dtype=np.bool_)
        for frame, quota in zip(frames, quotas, strict=True):
            unique = of_video[frame] - _alike(rows[frame], norms[frame], rows[frame].mean(axis=0))
            kept[frame] = top(unique, int(quota), np.ones(unique.size, dtype=np.bool_), ROUNDING)
        whole = np.zeros(reading.labels.size, dtype=np.bool_)
        whole[visual[kept]] = True
        return whole


def frame_quotas(uniqueness: list[float], room: IntArray, keep: int) -> IntArray:
    """Tokens that each frame of `room` tokens keeps: equations 5 and 6, then whole ones whose sum is `keep`.  [T]"""
    scores = np.array(uniqueness)
    raised = np.exp((scores - scores.max()) / TEMPERATURE)
    sigma: Floats = raised / (raised.sum() + EPSILON)
    wanted = (1 + sigma - 1 / room.size) * room
    wanted *= keep / wanted.sum()
    quotas: IntArray = np.minimum(np.floor(wanted).astype(np.int64), room)
    while (left := keep - int(quotas.sum())) > 0:
        quotas += top(wanted - quotas, left, among=quotas < room, within=TOKENS)
    return quotas


def _alike(rows: FloatArray, norms: FloatArray, center: FloatArray) -> FloatArray:
    """Cosine of each row to one vector; a zero row is like nothing.  [n, D], [n] and [D] -> [n]"""
    scale = norms * np.linalg.norm(center)
    cosine = np.full(norms.shape, tracks.DISSIMILAR, dtype=np.float32)
    np.divide(rows @ center, scale, out=cosine, where=scale > 0)
    return cosine
