"""Where each token stands for rotary attention: 1-D RoPE, 3-D M-RoPE and the vision tower's 2-D RoPE.

Knows spans of text and grids of patches, not what is written or shown in them. M-RoPE follows the rule that the
Qwen2-VL checkpoints were trained with: after a grid, text resumes one past the grid's largest position on any axis.
(transformers 5 resumes earlier, after the larger of height and width.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from framefusion.runtime.media.visual_input import Grid


class MropePositions(NamedTuple):
    """Positions of a prompt, and what to add to a token's index to go on after it."""

    positions: NDArray[np.int64]  # [3, S] temporal, row, column
    rope_delta: int  # next position - S


def grid_places(grid: Grid, interval: float = 1.0) -> NDArray[np.int64]:
    """Offsets [3, n] of a grid of tokens from where it begins: temporal, row, column.

    Temporal grids are `interval` apart, rounded down; in fp32, as transformers has it.
    """
    places = np.indices(grid, np.int64).reshape(3, -1)
    places[0] = np.floor(places[0].astype(np.float32) * np.float32(interval))
    return places


def mrope_positions(spans: Sequence[int | NDArray[np.int64]]) -> MropePositions:
    """Positions of spans in prompt order: an int is that many text tokens, an array [3, n] the offsets of a run."""
    blocks = [np.zeros((3, 0), np.int64)]
    start = 0
    for span in spans:
        block = np.broadcast_to(np.arange(span), (3, span)) if isinstance(span, int) else span
        blocks.append(start + block)
        start += int(block.max(initial=-1)) + 1
    positions = np.concatenate(blocks, axis=1)
    return MropePositions(positions, start - positions.shape[1])


def decode_positions(sequence_length: int, rope_delta: int, count: int = 1) -> NDArray[np.int64]:
    """Positions [3, count] from token `sequence_length` on, counted in the *original*, unreduced prompt."""
    return np.broadcast_to(np.arange(count) + sequence_length + rope_delta, (3, count)).copy()


def rope_tables(
    positions: NDArray[np.int64],  # [S], or [3, S] with sections
    head_dim: int,
    theta: float,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [S, head_dim] for rotate-half attention: the frequencies, twice in a row.

    With `mrope_section` the frequencies are dealt out to the temporal, row and column positions: in three blocks in
    that order, or interleaved one by one until rows and columns have theirs, the temporal axis taking the rest.
    """
    frequencies = _inverse_frequencies(head_dim, theta)  # [head_dim / 2]
    if mrope_section is None:
        axis_of_frequency = np.zeros(frequencies.size, np.intp)
    elif sum(mrope_section) == frequencies.size and len(mrope_section) == 3:
        axis_of_frequency = np.repeat(np.arange(3), mrope_section)
        if mrope_interleaved:
            axis_of_frequency = np.zeros(frequencies.size, np.intp)
            for axis in (1, 2):
                axis_of_frequency[axis : 3 * mrope_section[axis] : 3] = axis
    else:
        raise ValueError(f"mrope_section {list(mrope_section)} must be three numbers that sum to {frequencies.size}")
    places = np.atleast_2d(positions).astype(np.float32)  # [1 or 3, S]
    return _tables(places[axis_of_frequency].T * frequencies)


def vision_rope_tables(
    height: int, width: int, merge_size: int, head_dim: int, theta: float = 10000.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [height * width, head_dim] of one frame's patches: the first half of the frequencies for rows.

    Patches are in the vision tower's order: block row, block column, row in block, column in block.
    """
    rows, columns = Grid(1, height, width).merged(merge_size)[1:]
    places = np.indices((height, width), np.float32).reshape(2, rows, merge_size, columns, merge_size)
    places = places.transpose(0, 1, 3, 2, 4).reshape(2, -1, 1)  # [2, h * w, 1]
    angles = places * _inverse_frequencies(head_dim // 2, theta)  # [2, h * w, head_dim / 4]
    return _tables(np.concatenate(list(angles), axis=-1))


def sincos_table(height: int, width: int, dim: int, theta: float = 10000.0) -> NDArray[np.float32]:
    """[height * width, dim] for a frame's patches in raster order: columns before rows, sines before cosines."""
    exponents = np.arange(dim // 4, dtype=np.float32) / np.float32(dim / 4)
    frequencies = np.float32(1) / np.float32(theta) ** exponents  # all in fp32, as the checkpoints were trained
    axes = []
    for count in (width, height):
        angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
        axes.append(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1))  # [count, dim / 2]
    columns = np.broadcast_to(axes[0][None], (height, width, dim // 2))
    rows = np.broadcast_to(axes[1][:, None], (height, width, dim // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(height * width, dim)


def _inverse_frequencies(dim: int, theta: float) -> NDArray[np.float32]:
    """Angles a position turns each pair of channels by, [dim / 2]."""
    # Rounded to fp32 between power and division, as torch does: one ulp here is a visible angle at position 30000.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _tables(angles: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    doubled = np.concatenate([angles, angles], axis=-1)
    return np.cos(doubled), np.sin(doubled)
