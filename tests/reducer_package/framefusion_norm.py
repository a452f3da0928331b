"""A reducer of a package of its own: the visual tokens of the largest norm stay. All that one has to write."""

import numpy as np

from framefusion.policy import Mask, top
from framefusion.reducers.reducer import Reading, Selection


class Norm(Selection):
    """By the norm of the hidden states that enter the LLM."""

    name = "norm"
    paper = "an example, no paper"
    inputs = frozenset({"features"})

    def choose(self, reading: Reading) -> Mask:
        assert reading.features is not None
        return top(np.linalg.norm(reading.features, axis=1), reading.keep, among=reading.labels >= 0, within=1e-4)
