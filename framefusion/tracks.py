"""Tracks, for reducers of other packages. What they are is in framefusion/reduction/tracks.py."""

from framefusion.reduction.tracks import (
    TEXT,
    compact,
    compact_order,
    count_tracks,
    count_visual,
    frame_numbers,
    longest_track,
    place_in_track,
    previous_in_track,
    request_labels,
    track_order,
    track_similarity,
)

__all__ = [
    "TEXT",
    "compact",
    "compact_order",
    "count_tracks",
    "count_visual",
    "frame_numbers",
    "longest_track",
    "place_in_track",
    "previous_in_track",
    "request_labels",
    "track_order",
    "track_similarity",
]
