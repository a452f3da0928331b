"""Write the small graphs that `ff-run doctor` runs, anew: after a change of an op or of a dialect.

python -m tools.block_graphs
"""

from __future__ import annotations

from pathlib import Path

from framefusion.export.graphs.tracing.blocks import write_block_graphs
from framefusion.runtime.proof.blocks import cases

if __name__ == "__main__":
    write_block_graphs(Path(cases.__file__).parent)
