"""Batched inference with sliding windows: crops of many images, padded to one shape -> scores of every window."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data.buckets import Shape
from maskclip_jax.data.preprocess import prepare, resize_shape
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.ops import round_up
from maskclip_jax.segment.images import Upsampled, batch_size_for, padded_batch
from maskclip_jax.segment.pixels import pixel_matrix
from maskclip_jax.segment.refine import class_confidence
from maskclip_jax.segment.scores import dense_logits, flat_mask, probability_scale, refined
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.window_layout import AxisWindows, axis_windows, side_by_side, window_matrix

MOST_WINDOWS = 4096  # of one image: 512×683 pixels at a stride of 10


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


class WindowLogits(NamedTuple):
    """Of one window, padding included."""

    logits: Float32[np.ndarray, "h w C"]
    keys: Float32[np.ndarray, "L D"] | None
    confidence: Float32[np.ndarray, " C"]


def window_scores(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings
) -> Iterator[tuple[int, Upsampled]]:
    """(index, result) of every image, in order. All windows have one padded shape: one program (two when refined)."""
    plans = [plan_windows(image.shape[:2], settings) for image in images]
    side = window_side(settings)
    size = batch_size_for(settings, (side, side), sum(plan.count for plan in plans))
    crops = ((i, crop) for i, plan in enumerate(plans) for crop in window_crops(images[i], plan, settings))
    found: dict[int, list[WindowLogits]] = defaultdict(list)
    while part := list(itertools.islice(crops, size)):
        pixels, grid = padded_batch([crop for _, crop in part], size, (side, side), settings.config)
        logits, keys, confidence = jax.device_get(
            _window_logits(
                settings.model,
                settings.variables,
                pixels,
                settings.classifier,
                grid,
                method=settings.method,
                with_keys=settings.smoothing is not None,
            )
        )
        for row, (i, _) in enumerate(part):
            found[i].append(WindowLogits(logits[row], None if keys is None else keys[row], confidence[row]))
            if len(found[i]) == plans[i].count:
                yield i, stitched(found.pop(i), plans[i], size, settings)


def window_side(settings: PredictionSettings) -> int:
    """The padded side that all windows share, in pixels."""
    assert settings.options.windows is not None
    return round_up(settings.options.windows[0], settings.config.stride)


def plan_windows(original: Shape, settings: PredictionSettings) -> Plan:
    """The windows of an image of that size. Raises UserError where they would be thousands."""
    assert settings.options.windows is not None
    p = settings.preprocess
    valid = resize_shape(*original, short_side=p.short_side, long_side=p.long_side, within=p.within)
    plan = Plan(*(axis_windows(length, *settings.options.windows) for length in valid), valid, original)
    if plan.count > MOST_WINDOWS:
        window, stride = settings.options.windows
        raise UserError(
            f"an image is read in at most {MOST_WINDOWS} windows, but windows of {window} every {stride} pixels make "
            f"{plan.count} of one of {valid[1]} × {valid[0]}: make the stride larger"
        )
    return plan


def window_crops(
    image: UInt8[np.ndarray, "H W 3"], plan: Plan, settings: PredictionSettings
) -> Iterator[Float32[np.ndarray, "_h _w 3"]]:
    """Windows in reading order, each padded as an image by itself is."""
    prepared = prepare(image, settings.preprocess, 1).pixels
    height, width = plan.rows.size, plan.columns.size
    padding = [(0, settings.config.padded(n) - n) for n in (height, width)]
    for y, x in itertools.product(plan.rows.starts, plan.columns.starts):
        yield np.pad(prepared[y : y + height, x : x + width], (*padding, (0, 0)))


@functools.partial(jax.jit, static_argnames=("model", "method", "with_keys"))
def _window_logits(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    classifier: Float[Array, "C E"],
    grid: Int[Array, "B 2"],
    *,
    method: DenseMethod,
    with_keys: bool,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B L D"] | None, Float[Array, "B C"]]:
    logits, keys = dense_logits(model, variables, images, classifier, grid=grid, method=method)
    flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])
    valid = flat_mask(grid, logits.shape[1:3], model.config)
    confidence = class_confidence(flat, scale=probability_scale(model, variables), valid=valid)
    return logits, keys if with_keys else None, confidence


@functools.partial(jax.jit, static_argnames="config")
def _refine_windows(
    logits: Float[Array, "B h w C"],
    keys: Float[Array, "B L D"] | None,
    confidence: Float[Array, "B C"],
    grid: Int[Array, "B 2"],
    scale: ArrayLike,
    denoising: ArrayLike | None,
    smoothing: ArrayLike | None,
    *,
    config: CLIPConfig,
) -> Float[Array, "B h w C"]:
    flat, valid = logits.reshape(logits.shape[0], -1, logits.shape[-1]), flat_mask(grid, logits.shape[1:3], config)
    return refined(flat, keys, confidence, config.fidelity, scale, denoising, smoothing, valid).reshape(logits.shape)


def stitched(windows: list[WindowLogits], plan: Plan, size: int, settings: PredictionSettings) -> Upsampled:
    """Refines the windows of one image, `size` at a time, and lays them side by side."""
    config = settings.config
    grid = [config.padded(axis.size) // config.multiple for axis in plan[:2]]
    h, w = map(config.cells, grid)
    # A class is in the image when one of its windows says so: a window alone would drop what its neighbour sees.
    confidence = np.max([window.confidence for window in windows], axis=0)
    scores = []
    for start in range(0, len(windows), size):
        part = windows[start : start + size]
        logits = _stacked([window.logits for window in part], size)
        if settings.denoising is not None or settings.smoothing is not None:
            keys = None if part[0].keys is None else _stacked([window.keys for window in part], size)
            logits = np.asarray(
                _refine_windows(
                    logits,
                    keys,
                    np.broadcast_to(confidence, (size, len(confidence))),
                    np.broadcast_to(np.array(grid, np.int32), (size, 2)),
                    settings.scale,
                    settings.denoising,
                    settings.smoothing,
                    config=config,
                )
            )
        scores.append(logits[: len(part), :h, :w])
    matrices = (
        window_matrix(axis, pixel_matrix(config, cells, axis.size, axis.size), valid, original)
        for axis, cells, valid, original in zip(plan[:2], (h, w), plan.valid, plan.original, strict=True)
    )
    together = side_by_side(np.concatenate(scores), len(plan.rows.starts), len(plan.columns.starts))
    return Upsampled(together, *matrices)


def _stacked(arrays: list[np.ndarray], size: int) -> np.ndarray:
    """[size, …]: the last array repeated where there are too few, so that one program serves the remainder too."""
    return np.stack(arrays + [arrays[-1]] * (size - len(arrays)))
