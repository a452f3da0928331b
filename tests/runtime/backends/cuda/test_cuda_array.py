"""Views of a buffer on the GPU are those of numpy; addresses are all that is looked at, so host memory serves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framefusion.runtime.backends.cuda.array import DeviceArray

ARRAY = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)


def over(array: np.ndarray[Any, Any]) -> DeviceArray:
    return DeviceArray(array.ctypes.data, array.shape, array.dtype, array)


def as_numpy(view: DeviceArray) -> np.ndarray[Any, Any]:
    """The elements at the view's addresses."""
    first = (view.address - ARRAY.ctypes.data) // ARRAY.itemsize
    return np.lib.stride_tricks.as_strided(ARRAY.reshape(-1)[first:], view.shape, view.strides)


@st.composite
def keys(draw: st.DrawFn) -> Any:
    parts: list[Any] = []
    for size in ARRAY.shape[: draw(st.integers(0, 3))]:
        ends = st.one_of(st.none(), st.integers(-size - 2, size + 2))
        parts.extend([None] * draw(st.integers(0, 1)))
        parts.append(draw(st.one_of(st.integers(-size, size - 1), st.builds(slice, ends, ends))))
    if draw(st.booleans()):
        parts.append(Ellipsis)
        if len(parts) <= ARRAY.ndim and draw(st.booleans()):  # [..., one of the last axis]
            parts.append(draw(st.integers(0, ARRAY.shape[-1] - 1)))
    return tuple(parts)


@given(keys())
@settings(max_examples=150)
def test_views_are_those_of_numpy(key: Any) -> None:
    view, wanted = over(ARRAY)[key], ARRAY[key]
    assert view.shape == wanted.shape
    assert view.nbytes == wanted.nbytes
    assert view.owner is ARRAY
    assert view.contiguous == bool(wanted.flags.c_contiguous)
    if wanted.size:
        np.testing.assert_array_equal(as_numpy(view), wanted)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (slice(None, None, 2), IndexError),
        (slice(None, None, -1), IndexError),
        (3, IndexError),
        (-4, IndexError),
        ((0, 0, 0, 0), IndexError),
        ((Ellipsis, 0, Ellipsis), IndexError),
        (np.array([0, 1]), TypeError),
        ("a", TypeError),
    ],
)
def test_what_is_no_view_is_refused(key: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        over(ARRAY)[key]


def test_reshape_keeps_the_elements_and_refuses_gaps() -> None:
    np.testing.assert_array_equal(as_numpy(over(ARRAY)[1].reshape(10, 2)), ARRAY[1].reshape(10, 2))
    for view, shape in ((over(ARRAY)[:, 1:3], (30,)), (over(ARRAY), (7,))):
        with pytest.raises(ValueError, match="cannot be seen as"):
            view.reshape(*shape)
