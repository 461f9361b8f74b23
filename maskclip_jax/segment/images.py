"""Batched inference on whole images, padded to a few bucket shapes: images -> scores of every grid cell."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data.buckets import Shape, ShapeBuckets, bucket_shape
from maskclip_jax.data.preprocess import PreparedImage, resize_shape
from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.segment.pixels import pixel_matrix
from maskclip_jax.segment.scores import predict_scores
from maskclip_jax.segment.settings import PredictionSettings

BUCKETS = 6  # shapes to compile for; with the pixels and the text tower that makes 8 programs
_ATTENTION_BYTES = 2**30  # of one layer's attention matrices in float32
_BATCH_PIXELS = 2**24


class Upsampled(NamedTuple):
    """Scores of an image's cells, and the matrices of the two axes that make them pixels of the original image."""

    scores: Float32[np.ndarray, "h w C"]
    rows: Float32[np.ndarray, "H h"]
    columns: Float32[np.ndarray, "W w"]


def whole_scores(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings
) -> Iterator[tuple[int, Upsampled]]:
    """(index, result) of every image, bucket by bucket."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    for index, shape in enumerate(bucket_shapes([image.shape[:2] for image in images], settings)):
        groups[shape].append(index)
    waiting: tuple = ()
    for shape, members in groups.items():
        size = batch_size_for(settings, shape, len(members))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            prepared = [settings.prepare(images[i]) for i in part]
            pixels, grid = padded_batch([image.pixels for image in prepared], size, shape, settings.config)
            scores = _scores(
                settings.model,
                settings.variables,
                pixels,
                settings.classifier,
                grid,
                settings.denoising,
                settings.smoothing,
                method=settings.method,
            )
            # The accelerator works on this batch while the host makes pixels of the one before.
            if waiting:
                yield from _results(*waiting, settings)
            waiting = part, prepared, scores, grid
    if waiting:
        yield from _results(*waiting, settings)


def bucket_shapes(originals: Sequence[Shape], settings: PredictionSettings) -> list[Shape]:
    """The padded shape each image is computed in, few altogether (pixels, multiples of `config.stride`)."""
    p, config = settings.preprocess, settings.config
    sizes = [resize_shape(*size, short_side=p.short_side, long_side=p.long_side, within=p.within) for size in originals]
    shapes = _buckets(settings.model, p.short_side).assign(sizes)
    for i, (size, shape) in enumerate(zip(sizes, shapes, strict=True)):
        # Sharing a large square is cheap in programs, but attention's memory grows with the area squared.
        if attention_bytes(config, shape, settings) > _ATTENTION_BYTES:
            own = bucket_shape(*size, config.stride, short_side=p.short_side)
            if 2 * own[0] * own[1] < shape[0] * shape[1]:
                shapes[i] = own
    return shapes


@functools.lru_cache(maxsize=32)
def _buckets(model: CLIP, short_side: int | None) -> ShapeBuckets:
    """Remembered for as long as the compiled programs are, so that call after call shares both."""
    return ShapeBuckets(model.config.stride, short_side=short_side, limit=BUCKETS)


def batch_size_for(settings: PredictionSettings, shape: Shape, count: int) -> int:
    """How many of `count` images of a padded shape go together: full batches (smaller where images are large), or one
    by one where a batch would be mostly empty. Two sizes a shape are all that is ever compiled."""
    most = min(settings.options.batch_size, max(1, _BATCH_PIXELS // (shape[0] * shape[1])))
    attention = attention_bytes(settings.config, shape, settings)
    most = min(most, max(1, _ATTENTION_BYTES // attention)) if attention else most
    return most if 2 * count > most else 1


def attention_bytes(config: CLIPConfig, shape: Shape, settings: PredictionSettings) -> int:
    """Bytes of one layer's attention matrices for one image of a padded shape, in float32."""
    values_alone = settings.method.attention == MASKCLIP.attention
    if not isinstance(config.vision, ViTConfig) and values_alone:
        return 0
    tokens = shape[0] * shape[1] // config.stride**2 + 1
    return 4 * config.vision.heads * tokens**2


def padded_batch(
    pixels: Sequence[Float32[np.ndarray, "_h _w 3"]], size: int, shape: Shape, config: CLIPConfig
) -> tuple[Float32[np.ndarray, "B H W 3"], Int[np.ndarray, "B 2"]]:
    """Images of differing sizes in one array, and each one's valid size in units of `config.multiple`.

    A batch that is not full has empty images of one cell at its end.
    """
    batch = np.zeros((size, *shape, 3), np.float32)
    grid = np.full((size, 2), config.stride // config.multiple, np.int32)
    for row, image in enumerate(pixels):
        height, width = image.shape[:2]
        batch[row, :height, :width] = image
        grid[row] = height // config.multiple, width // config.multiple
    return batch, grid


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _scores(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    classifier: Float[Array, "C E"],
    grid: Int[Array, "B 2"],
    denoising: ArrayLike | None,
    smoothing: ArrayLike | None,
    *,
    method: DenseMethod,
) -> Float[Array, "B h w C"]:
    return predict_scores(
        model,
        variables,
        images,
        classifier,
        grid=grid,
        method=method,
        denoising=denoising,
        smoothing=smoothing,
    )


def _results(
    part: list[int], prepared: list[PreparedImage], scores: Array, grid: np.ndarray, settings: PredictionSettings
) -> Iterator[tuple[int, Upsampled]]:
    on_host = np.asarray(scores)
    for row, (index, image) in enumerate(zip(part, prepared, strict=True)):
        yield index, upsampled(on_host[row], grid[row], image.valid, image.original, settings)


def upsampled(
    scores: Float[np.ndarray, "_h _w C"],
    grid: Int[np.ndarray, " 2"],
    valid: Shape,
    size: Shape,
    settings: PredictionSettings,
) -> Upsampled:
    """Scores of a padded grid, padding cut off, and the matrices that bring them to pixels.

    Args:
      grid: rows and columns that hold image, in units of `config.multiple`.
      valid: pixels of the resized image.
      size: pixels to bring them to, the original image's as a rule.
    """
    rows, columns = map(int, settings.config.cells(grid))
    matrices = (pixel_matrix(settings.config, *sides) for sides in zip((rows, columns), valid, size, strict=True))
    return Upsampled(scores[:rows, :columns], *matrices)
