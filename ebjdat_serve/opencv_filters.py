"""Resizing as OpenCV's cv2.resize does it, for networks that were trained behind it: without antialiasing, in its fixed-point sums.

Each pixel of the result is made of 2, 4 or 8 pixels of a line of the image, however much larger that is, and those beyond an edge repeat
the last one. Weights are multiples of 1/2048, as in OpenCV's, and a line is summed before a column.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.errors import BundleError

UNITS = 2048
"""What OpenCV's weights of bytes sum to."""


def linear(at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights (N, 2) of INTER_LINEAR at fractions (N,) of a pixel."""
    return np.stack([1 - at, at], axis=1)


def cubic(at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights (N, 4) of INTER_CUBIC, whose a is -0.75."""
    a = -0.75
    left, right = at + 1, 1 - at
    first = ((a * left - 5 * a) * left + 8 * a) * left - 4 * a
    second = ((a + 2) * at - (a + 3)) * at * at + 1
    third = ((a + 2) * right - (a + 3)) * right * right + 1
    return np.stack([first, second, third, 1 - first - second - third], axis=1)


def lanczos(at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights (N, 8) of INTER_LANCZOS4."""
    distance = at[:, None] + 3 - np.arange(8)
    weights = np.sinc(distance) * np.sinc(distance / 4)
    whole: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return whole


FILTERS: dict[str, tuple[int, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "opencv-linear": (2, linear),
    "opencv-cubic": (4, cubic),
    "opencv-lanczos": (8, lanczos),
}
"""Each filter's pixels and weights."""


def resize(image: NDArray[np.uint8], height: int, width: int, name: str) -> NDArray[np.uint8]:
    """Return an image (H, W, C) as (height, width, C); raise BundleError for a filter that is none of FILTERS."""
    if name not in FILTERS:
        raise BundleError(f"{name[:40]!r} is no filter of OpenCV's: {', '.join(FILTERS)}")
    rows, down = _taps(image.shape[0], height, name)
    columns, across = _taps(image.shape[1], width, name)
    used, rows = np.unique(rows, return_inverse=True)
    lines = _summed(image[used], columns, across.astype(np.int32), axis=1)
    total = _summed(lines, rows.reshape(down.shape), down, axis=0)
    total += UNITS * UNITS // 2
    total //= UNITS * UNITS
    return total.clip(0, 255).astype(np.uint8)


def _taps(size: int, wanted: int, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which pixels of a line of ``size`` each of ``wanted`` is made of, and their weights in UNITS, both (wanted, n)."""
    n, weights = FILTERS[name]
    place = ((np.arange(wanted) + 0.5) * (size / wanted) - 0.5).astype(np.float32).astype(np.float64)
    first = np.floor(place)
    index = first[:, None].astype(np.int64) - (n // 2 - 1) + np.arange(n)
    return index.clip(0, size - 1), np.rint(weights(place - first) * UNITS).astype(np.int64)


def _summed(lines: NDArray[Any], index: NDArray[np.int64], weights: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the weighted sums of ``lines`` along an axis, of the weights' type."""
    shape = list(lines.shape)
    shape[axis] = len(index)
    total, each = np.zeros(shape, weights.dtype), np.empty(shape, weights.dtype)
    along = (None, slice(None), None) if axis else (slice(None), None, None)
    for tap in range(index.shape[1]):
        np.multiply(np.take(lines, index[:, tap], axis=axis), weights[:, tap][along], out=each)
        total += each
    return total
