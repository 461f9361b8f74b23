"""Sliding windows: where they lie, and how their grids become pixels of the original image.

Windows form a grid of rows and columns, and upsampling, averaging where they overlap, and resizing to the original
size are all linear and separable. So the cells of all windows, laid side by side, are one larger grid with a matrix per
axis, and from here on a windowed image is like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from maskclip_jax.data.preprocess import interpolation_matrix
from maskclip_jax.errors import UserError

MOST_OVERLAP = 8  # windows over one pixel, along one axis


class AxisWindows(NamedTuple):
    """The windows along one axis of an image, in pixels of the resized image."""

    starts: tuple[int, ...]
    size: int


def check_windows(window: int | None, stride: int | None) -> tuple[int, int] | None:
    """(window, stride) in pixels; the stride is half the window unless given; None without windows."""
    if window is None:
        if stride is not None:
            raise UserError(f"a stride ({stride}) belongs to a window, but no window came: give both or neither")
        return None
    stride = max(1, window // 2) if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise UserError(
            f"windows are at least 1 pixel and the stride at most the window, but {window} and {stride} came: "
            "try --window 224 --stride 112"
        )
    if stride * MOST_OVERLAP < window:
        raise UserError(
            f"at most {MOST_OVERLAP} windows overlap, so a window of {window} has a stride of at least "
            f"{-(-window // MOST_OVERLAP)}, but {stride} came: use a larger stride"
        )
    return window, stride


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
