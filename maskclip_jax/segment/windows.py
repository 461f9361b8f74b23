"""Batched inference with sliding windows: crops of many images, padded to one shape -> scores of every window's cells.

Windows form a grid of rows and columns, and upsampling, averaging where they overlap, and resizing to the original
size are all linear and separable. So the cells of all windows, laid side by side, are one larger grid with a matrix per
axis, and from there on a windowed image is like any other.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data.buckets import Shape
from maskclip_jax.data.preprocess import interpolation_matrix
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.ops import round_up
from maskclip_jax.segment.grid import (
    GridScores,
    batch_size_for,
    cells_of_image,
    pixel_matrix,
    plan_batches,
    run_batches,
)
from maskclip_jax.segment.refine import (
    Logits,
    Probabilities,
    Scores,
    dense_logits,
    grid_confidence,
    probabilities,
    refined,
)
from maskclip_jax.segment.settings import PredictionSettings

MOST_WINDOWS = 4096  # of one image: 512×683 pixels at a stride of 10


class AxisWindows(NamedTuple):
    """The windows along one axis of an image, in pixels of the resized image."""

    starts: tuple[int, ...]
    size: int


class Plan(NamedTuple):
    """Where the windows of one image lie, and the sizes they lead to and from."""

    rows: AxisWindows
    columns: AxisWindows
    valid: Shape
    original: Shape

    @property
    def count(self) -> int:
        """Windows in all."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def window(self) -> Shape:
        """Height and width of each window in pixels."""
        return self.rows.size, self.columns.size


class WindowLogits(NamedTuple):
    """Of one window, padding included."""

    logits: Float32[np.ndarray, "h w C"]
    keys: Float32[np.ndarray, "L D"] | None  # where they are smoothed
    confidence: Float32[np.ndarray, " C"]


def window_scores(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings
) -> Iterator[tuple[int, GridScores]]:
    """(index, result) of every image, in order. All windows have one padded shape: one program (two when refined)."""
    assert settings.options.windows is not None
    plans = [plan_windows(image.shape[:2], settings) for image in images]
    owners = [i for i, plan in enumerate(plans) for _ in range(plan.count)]
    crops = (crop for image, plan in zip(images, plans, strict=True) for crop in window_crops(image, plan, settings))
    multiple, needed = settings.config.stride, round_up(settings.options.windows[0], settings.config.stride)
    shape = (min(needed, max((window_side(plan, multiple) for plan in plans), default=needed)),) * 2
    batches = list(plan_batches([shape] * len(owners), functools.partial(batch_size_for, settings)))
    found: dict[int, list[WindowLogits]] = defaultdict(list)
    smoothing = settings.refinement["smoothing"] is not None

    def compute(pixels: np.ndarray, sizes: np.ndarray) -> WindowLogits:
        towers = settings.model, settings.variables, pixels, settings.classifier, sizes, settings.scale
        return _window_logits(*towers, method=settings.method, with_keys=smoothing)

    for row, window in run_batches(batches, lambda _: next(crops), compute):
        windows, plan = found[owners[row]], plans[owners[row]]
        windows.append(window)
        if len(windows) == plan.count:
            yield owners[row], _stitched(found.pop(owners[row]), plan, batches[0].size, settings)


def plan_windows(original: Shape, settings: PredictionSettings) -> Plan:
    """The windows of an image of that size. Raises UserError where they would be thousands."""
    assert settings.options.windows is not None
    valid = settings.resized(original)
    plan = Plan(*(axis_windows(length, *settings.options.windows) for length in valid), valid, original)
    if plan.count > MOST_WINDOWS:
        window, stride = settings.options.windows
        raise UserError(
            f"an image is read in at most {MOST_WINDOWS} windows, but windows of {window} every {stride} pixels make "
            f"{plan.count} of one of {valid[1]} × {valid[0]}: make the stride larger"
        )
    return plan


def window_side(plan: Plan, multiple: int) -> int:
    """Pixels that each window is padded to: no more than the image needs, and four sizes to an octave, so that few
    programs serve windows of every size (padding is masked)."""
    cells = round_up(max(plan.window), multiple) // multiple
    return multiple * round_up(cells, max(1, 1 << (cells - 1).bit_length() >> 3))


def axis_windows(length: int, window: int, stride: int) -> AxisWindows:
    """Windows that cover `length` pixels; the last one is moved back to end at the border (as mmsegmentation does)."""
    size = min(window, length)
    count = max(length - window + stride - 1, 0) // stride + 1
    return AxisWindows(tuple(min(i * stride, length - size) for i in range(count)), size)


def window_crops(
    image: UInt8[np.ndarray, "H W 3"], plan: Plan, settings: PredictionSettings
) -> Iterator[Float32[np.ndarray, "_h _w 3"]]:
    """Windows in reading order, each padded as an image by itself is."""
    prepared = settings.prepare(image, 1).pixels
    height, width = plan.window
    padding = [(0, settings.config.padded(n) - n) for n in plan.window]
    for y, x in itertools.product(plan.rows.starts, plan.columns.starts):
        yield np.pad(prepared[y : y + height, x : x + width], (*padding, (0, 0)))


@functools.partial(jax.jit, static_argnames=("model", "method", "with_keys"))
def _window_logits(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    classifier: Float[Array, "C E"],
    sizes: Int[Array, "B 2"],
    scale: Any,
    *,
    method: DenseMethod,
    with_keys: bool,
) -> WindowLogits:
    grid = sizes // model.config.multiple
    logits, keys = dense_logits(model, variables, images, classifier, grid=grid, method=method)
    return WindowLogits(logits, keys if with_keys else None, grid_confidence(logits, grid, model.config, scale))


@functools.partial(jax.jit, static_argnames="config")
def refine_windows(
    logits: Float[Array, "B h w C"],
    keys: Float[Array, "B L D"] | None,
    confidence: Float[Array, " C"],
    sizes: Int[Array, " 2"],
    refinement: dict[str, Any],
    *,
    config: CLIPConfig,
) -> Scores:
    """`refined` for windows of one size in pixels (padded to `config.multiple`), of one image, which is a class's
    `confidence` in all of them: a window alone would drop what its neighbour sees."""
    grid, confidence = (
        jax.numpy.broadcast_to(x, (len(logits), len(x))) for x in (sizes // config.multiple, confidence)
    )
    return refined(logits, keys, config, grid=grid, confidence=confidence, **refinement)


def _stitched(windows: list[WindowLogits], plan: Plan, size: int, settings: PredictionSettings) -> GridScores:
    """Refines the windows of one image, `size` at a time, and lays them side by side."""
    confidence = np.max([window.confidence for window in windows], axis=0)
    scores: list[Scores] = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        part = part + [part[-1]] * (size - len(part))  # so that one program serves the remainder too
        logits = np.stack([window.logits for window in part])
        if settings.refinement["denoising"] is None and settings.refinement["smoothing"] is None:
            scores.append(Logits(logits))
            continue
        keys = None if part[0].keys is None else np.stack([window.keys for window in part])
        sizes = np.array([settings.config.padded(side) for side in plan.window], np.int32)
        scores.append(
            refine_windows(logits, keys, confidence, sizes, settings.refinement, config=settings.config),
        )
    return laid_out(scores, plan, settings)


def laid_out(batches: Sequence[Scores], plan: Plan, settings: PredictionSettings) -> GridScores:
    """The windows of one image, in batches with padding, as one grid with its matrices to the original pixels."""
    config = settings.config
    if settings.options.window_mean == "probabilities":
        batches = [Probabilities(probabilities(scores, settings.scale)) for scores in batches]
    h, w = cells_of_image(config, plan.window)
    values = np.concatenate([np.asarray(scores.values)[:, :h, :w] for scores in batches])[: plan.count]
    together = side_by_side(values, len(plan.rows.starts), len(plan.columns.starts))
    matrices = (
        window_matrix(axis, pixel_matrix(config, cells, axis.size, axis.size), valid, original)
        for axis, cells, valid, original in zip(plan[:2], (h, w), plan.valid, plan.original, strict=True)
    )
    return GridScores(type(batches[0])(together), *matrices)


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
