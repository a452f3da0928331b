"""A buffer in the memory of a GPU: an address with a shape, a numpy dtype (bfloat16 is ml_dtypes') and views.

Knows no kernel and copies nothing; the device does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from framefusion.runtime.backends.buffer import Buffer, Index

Place = int | np.integer[Any] | slice | None


class DeviceArray:
    """Elements at `address`, and the allocation they lie in, kept alive by every view.

    Attributes:
        address: address of the first element on the GPU.
        shape: sizes of the axes.
        dtype: numpy's type of an element.
        strides: bytes from one element to the next along each axis.
        owner: the allocation; None for memory of others.
        room: rows behind the last that lie in the same allocation and belong to nobody else.
    """

    __slots__ = ("__weakref__", "address", "dtype", "owner", "room", "shape", "strides")

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: DTypeLike,
        owner: object = None,
        *,
        strides: tuple[int, ...] | None = None,
        room: int = 0,
    ) -> None:
        self.address = address
        self.owner = owner
        self.room = room
        self.shape = tuple(int(size) for size in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.strides = _packed(self.shape, self.dtype.itemsize) if strides is None else strides

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other without a gap; axes of one element do not count."""
        packed = zip(self.shape, self.strides, _packed(self.shape, self.dtype.itemsize), strict=True)
        return self.size == 0 or all(size == 1 or stride == expected for size, stride, expected in packed)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array without axes has no length")
        return self.shape[0]

    def __getitem__(self, key: Index) -> DeviceArray:
        """A view, by integers, slices of step 1, None and one Ellipsis; IndexError or TypeError for anything else."""
        address = self.address
        shape = []
        strides = []
        axis = 0
        for part in _spelled_out(key, self.ndim):
            if part is None:
                shape.append(1)
                strides.append(0)
                continue
            size = self.shape[axis]
            stride = self.strides[axis]
            axis += 1
            if isinstance(part, slice):
                start, stop, step = part.indices(size)
                if step != 1:
                    raise IndexError(f"a view by {part} would leave elements out; only steps of 1 are views here")
                shape.append(max(0, stop - start))
                strides.append(stride)
                address += start * stride
            else:
                place = part + size if part < 0 else part
                if not 0 <= place < size:
                    raise IndexError(f"index {part} is outside an axis of {size}")
                address += place * stride
        shape.extend(self.shape[axis:])
        strides.extend(self.strides[axis:])
        return DeviceArray(address, shape, self.dtype, self.owner, strides=tuple(strides))

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape; ValueError where they do not lie together."""
        if not self.contiguous or math.prod(shape) != self.size:
            raise ValueError(f"{self!r} cannot be seen as {shape}")
        return DeviceArray(self.address, shape, self.dtype, self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype.name} {list(self.shape)} at {self.address:#x})"


def device_array(buffer: Buffer) -> DeviceArray:
    """A buffer of a GPU as what it is.

    Raises:
        TypeError: it lies on another device.
    """
    if not isinstance(buffer, DeviceArray):
        raise TypeError(f"{type(buffer).__name__} lies on another device and was given to a GPU")
    return buffer


def _packed(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= size
    return tuple(reversed(strides))


def _spelled_out(key: Index, ndim: int) -> list[Place]:
    """The parts of an index, full slices in place of an Ellipsis."""
    parts = list(key) if isinstance(key, tuple) else [key]
    for part in parts:
        if not (part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))):
            raise TypeError(f"a buffer on the GPU has views by integers and slices, not by {type(part).__name__}")
    if sum(part is Ellipsis for part in parts) > 1:
        raise IndexError("an index has one Ellipsis at most")
    named = sum(part is not None and part is not Ellipsis for part in parts)
    if named > ndim:
        raise IndexError(f"{named} indices for {ndim} axes")
    spelled: list[Place] = []
    for part in parts:
        spelled.extend([slice(None)] * (ndim - named) if part is Ellipsis else [part])
    return spelled
