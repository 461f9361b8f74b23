"""Where sliding windows lie, and how their overlapping grids become pixels of the original image.

Windows form a grid of rows and columns, and upsampling, averaging where they overlap, and resizing to the original
size are all linear and separable. So the cells of all windows, laid side by side, are one larger grid with a matrix per
axis, and from here on a windowed image is like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from maskclip_jax.data.preprocess import interpolation_matrix


class AxisWindows(NamedTuple):
    """The windows along one axis of an image, in pixels of the resized image."""

    starts: tuple[int, ...]
    size: int


def axis_windows(length: int, window: int, stride: int) -> AxisWindows:
    """Windows that cover `length` pixels; the last one is moved back to end at the border (as mmsegmentation does)."""
    size = min(window, length)
    count = max(length - window + stride - 1, 0) // stride + 1
    return AxisWindows(tuple(min(i * stride, length - size) for i in range(count)), size)


def window_matrix(
    windows: AxisWindows, up: Float32[np.ndarray, "size cells"], valid: int, original: int
) -> Float32[np.ndarray, "original n"]:
    """Cells of all windows of an axis, side by side -> pixels of the original image (n is windows × cells).

    Each window is upsampled to its own pixels (by `up`), windows are averaged where they overlap, and the image that
    results is resized bilinearly to the original size.

    Args:
      valid, original: pixels of the resized and of the original image.
    """
    size, cells = up.shape
    stitched = np.zeros((valid, len(windows.starts), cells), np.float32)
    count = np.zeros((valid, 1, 1), np.float32)
    for i, start in enumerate(windows.starts):
        stitched[start : start + size, i] += up
        count[start : start + size] += 1
    matrix = (stitched / count).reshape(valid, -1)
    return matrix if valid == original else interpolation_matrix(valid, original) @ matrix


def side_by_side(scores: Float[np.ndarray, "n h w C"], rows: int, columns: int) -> Float[np.ndarray, "R K C"]:
    """The grids of `rows × columns` windows (in reading order) as one grid of rows·h by columns·w cells."""
    _, h, w, classes = scores.shape
    return scores.reshape(rows, columns, h, w, classes).swapaxes(1, 2).reshape(rows * h, columns * w, classes)
