"""Inference that needs every class at every pixel: averages over scales and flips, and PAMR. Slower.

Views are sizes and the mirrored image; more than one: their probabilities are averaged. PAMR then refines what is
there, logits of one view or the mean of many.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.errors import UserError
from maskclip_jax.segment.images import Upsampled
from maskclip_jax.segment.pamr import pamr
from maskclip_jax.segment.pixels import PixelMaps, best_class
from maskclip_jax.segment.scores import to_probabilities
from maskclip_jax.segment.settings import PredictionSettings

MOST_FLOATS = 2**28  # words × pixels of one image: 1 GiB, of which a few copies exist
_STEP = 64  # images are padded to multiples of this, so that few programs serve many sizes

Scorer = Callable[[Sequence[UInt8[np.ndarray, "_H _W 3"]], PredictionSettings], Iterator[tuple[int, Upsampled]]]


def needs_every_pixel(settings: PredictionSettings) -> bool:
    """Whether an image takes this way."""
    return settings.options.pamr > 0 or len(settings.options.views) > 1


def pixel_maps(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings, scorer: Scorer
) -> Iterator[tuple[int, PixelMaps]]:
    """(index, answer) of every image, in order. `scorer` is `whole_scores` or `window_scores`.

    Raises UserError for an image with too many pixels times words.
    """
    words = len(settings.word_class)
    for image in images:
        if image.shape[0] * image.shape[1] * words > MOST_FLOATS:
            raise UserError(
                f"PAMR and views keep every word at every pixel, at most {MOST_FLOATS:.0e} numbers, but an image has "
                f"{image.shape[1]}×{image.shape[0]} pixels and there are {words} words: shrink the image, or leave "
                "them out"
            )
    found = []
    for scale, flipped in settings.options.views:
        view = dataclasses.replace(settings, preprocess=scaled(settings.preprocess, scale))
        seen = [np.ascontiguousarray(image[:, ::-1]) for image in images] if flipped else images
        found.append((flipped, dict(scorer(seen, view))))
    for index, image in enumerate(images):
        parts = [pixel_scores(results[index], flipped) for flipped, results in found]
        if len(parts) > 1:
            smoothed = settings.smoothing is not None
            parts = [np.asarray(_probabilities(part, settings.scale, smoothed=smoothed)) for part in parts]
        scores = sum(parts) / len(parts)
        yield index, _finished(scores, image, settings, smoothed=settings.smoothing is not None or len(parts) > 1)


def scaled(preprocess: Preprocess, scale: float) -> Preprocess:
    """Sizes times `scale`."""
    times = lambda side: None if side is None else max(1, round(scale * side))  # noqa: E731
    within = None if preprocess.within is None else tuple(times(side) for side in preprocess.within)
    return dataclasses.replace(
        preprocess, short_side=times(preprocess.short_side), long_side=times(preprocess.long_side), within=within
    )


def pixel_scores(upsampled: Upsampled, flipped: bool) -> Float32[np.ndarray, "H W C"]:
    """Scores of every pixel of the original image, mirrored back where the view was."""
    columns = upsampled.columns[::-1] if flipped else upsampled.columns
    across = np.tensordot(upsampled.scores.astype(np.float32), columns, axes=(1, 1))  # [h, C, W]
    return np.ascontiguousarray(np.tensordot(upsampled.rows, across, axes=(1, 0)).swapaxes(1, 2))


def _finished(
    scores: Float32[np.ndarray, "H W C"],
    image: UInt8[np.ndarray, "H W 3"],
    settings: PredictionSettings,
    smoothed: bool,
) -> PixelMaps:
    height, width = image.shape[:2]
    classes = len(settings.names)
    padding = [(0, -side % _STEP) for side in (height, width)]
    labels, confidence, probabilities = _refined_labels(
        np.pad(scores, (*padding, (0, 0))),
        np.pad(image, (*padding, (0, 0))),
        np.array([height, width], np.int32),
        np.asarray(settings.word_class, np.int32),
        settings.scale,
        np.float32(settings.least),
        settings.options.pamr,
        smoothed=smoothed,
        synonyms=settings.options.synonyms,
        classes=classes if settings.options.return_probabilities else None,
    )
    inside = np.s_[:height, :width]
    return PixelMaps(
        np.asarray(labels)[inside].astype(np.uint8 if classes <= 255 else np.uint16),
        np.asarray(confidence)[inside],
        None if probabilities is None else np.asarray(probabilities)[inside],
    )


@functools.partial(jax.jit, static_argnames="smoothed")
def _probabilities(scores: Float[Array, "H W C"], scale: ArrayLike, *, smoothed: bool) -> Float[Array, "H W C"]:
    return to_probabilities(scores, scale, smoothed=smoothed)


@functools.partial(jax.jit, static_argnames=("smoothed", "synonyms", "classes"))
def _refined_labels(
    scores: Float[Array, "H W C"],
    image: Array,
    size: Int[Array, " 2"],
    word_class: Int[Array, " C"],
    scale: ArrayLike,
    least: ArrayLike,
    steps: ArrayLike,
    *,
    smoothed: bool,
    synonyms: str,
    classes: int | None,
) -> tuple[Int[Array, "H W"], Float[Array, "H W"], Float[Array, "H W K"] | None]:
    scores = pamr(scores, image.astype(jnp.float32) / 255, steps=steps, size=size)
    return best_class(scores, word_class, scale, least, smoothed=smoothed, synonyms=synonyms, classes=classes)
