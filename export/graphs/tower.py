"""What all vision towers have in common: a graph of patches that says itself how it is to be traced.

    patches   [N, P, W]           float   N pictures (or temporal grids) of one size, P patches of W numbers each
    ...                                   what its kind adds, shared by the N pictures (runtime/media/tower_kinds.py)
    -> tokens [N*Q, D]            float   Q rows of the LLM's width a picture
       deepstack [K, N*Q, D]      float   where the family has such features

Knows no checkpoint, no preprocessing and no family.
"""

from __future__ import annotations

from framefusion.export.graphs.graph_plan import GraphModule


class Tower(GraphModule):
    """A vision tower with its projector."""
