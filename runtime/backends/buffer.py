"""A buffer: memory of some device with a shape, as segments are bound to it. Knows no device and no graph."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


Part = int | np.integer[Any] | slice | EllipsisType | None
Index = Part | tuple[Part, ...]
"""What leading axes are indexed by: integers, slices of step 1, None for an axis more, one Ellipsis."""


class Buffer(Protocol):
    """Memory of a device with a shape: a numpy array on the CPU, a `DeviceArray` or a tensor of torch on a GPU.

    Only the host reads elements: what is behind a buffer of a GPU comes by `Device.download` or a `Mirror`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's type of an element; a tensor has torch's, which has the same name."""

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""

    def __getitem__(self, key: Index, /) -> Buffer:
        """A view of the same memory; IndexError outside it."""


def float_type(dtype: str) -> np.dtype[Any]:
    """numpy's type of a name; bfloat16 is of ml_dtypes.

    Raises:
        ImportError: ml_dtypes is not installed.
    """
    if dtype != "bfloat16":
        return np.dtype(dtype)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16
