"""Image features computed once and kept; any words and thresholds are then scored from them.

`segment_images` runs the tower and the reading as one program, which is right for a corpus. Where somebody tries words
on one picture, the picture stays and the words change: `keep_features` is the slow half, `read_features` the quick one.
Both are made of the steps of `whole` and `windowed`, so that they answer as those do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from maskclip_jax.data.buckets import Shape
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.ops import round_up
from maskclip_jax.segment.images import Upsampled, batch_size_for, bucket_shapes, padded_batch, upsampled
from maskclip_jax.segment.pixels import PixelMaps, label_pixels
from maskclip_jax.segment.predict import Segmentation, segmentation_of
from maskclip_jax.segment.refine import DROPPED, class_confidence
from maskclip_jax.segment.scores import flat_mask, probability_scale, refined
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.windows import Plan, WindowLogits, plan_windows, stitched, window_crops

_LEAST_COLUMNS = 8


class KeptBatch(NamedTuple):
    """What the tower made of one batch: a whole image, or some windows of one."""

    features: Float[Array, "B h w E"]
    keys: Float[Array, "B L D"]
    grid: Int[np.ndarray, "B 2"]


class Kept(NamedTuple):
    """All that an image's masks are read from, for one way of running the tower (model, attention, windows, sizes)."""

    batches: tuple[KeptBatch, ...]
    windows: int  # how many of the batches' rows are windows; 0: one row, the whole image
    plan: Plan | None
    valid: Shape  # pixels of the resized image
    original: Shape

    @property
    def nbytes(self) -> int:
        """Memory that the features take."""
        return sum(batch.features.nbytes + batch.keys.nbytes for batch in self.batches)


def keep_features(image: UInt8[np.ndarray, "H W 3"], settings: PredictionSettings) -> Kept:
    """Runs the image tower. Of the settings, the words, the thresholds and the background play no part."""
    config = settings.config
    if settings.options.windows is None:
        (shape,) = bucket_shapes([image.shape[:2]], settings)
        prepared = settings.prepare(image)
        batches = [padded_batch([prepared.pixels], 1, shape, config)]
        windows, plan, valid = 0, None, prepared.valid
    else:
        plan = plan_windows(image.shape[:2], settings)
        side = window_side(plan, config.stride)
        size = batch_size_for(settings, (side, side), plan.count)
        crops = list(window_crops(image, plan, settings))
        batches = [
            padded_batch(crops[start : start + size], size, (side, side), config)
            for start in range(0, len(crops), size)
        ]
        windows, valid = plan.count, plan.valid
    kept = tuple(
        KeptBatch(*_encode(settings.model, settings.variables, pixels, grid, method=settings.method), grid)
        for pixels, grid in batches
    )
    return Kept(kept, windows, plan, valid, image.shape[:2])


def window_side(plan: Plan, multiple: int) -> int:
    """Pixels that each window is padded to: no more than the image needs, and four sizes to an octave, so that few
    programs serve windows of every size (padding is masked)."""
    cells = round_up(max(plan.rows.size, plan.columns.size), multiple) // multiple
    return multiple * round_up(cells, max(1, 1 << (cells - 1).bit_length() >> 3))


def read_features(
    kept: Kept, settings: PredictionSettings, *, size: Shape | None = None, columns: int | None = None
) -> Segmentation:
    """The masks that `segment_images` finds, without the image tower.

    Args:
      kept: from `keep_features` with the same model, attention, windows and sizes.
      settings: words, thresholds and background may be others than they were then.
      size: pixels of the answer, for a screen that shows fewer than the image has; None is the original size.
      columns: words to make room for, so that one compiled program serves every number of words up to it; the words
        that are not there have no say (only where smoothing leaves nothing of any class at a pixel is the confidence,
        "all alike", shared with them). None makes room for the words there are, and labels and confidences are those
        of `segment_images`.
    """
    maps = _maps(
        kept, settings, settings.word_class, size, columns, with_probabilities=settings.options.return_probabilities
    )
    return segmentation_of(maps, settings.names)


def class_probability(
    kept: Kept, settings: PredictionSettings, index: int, *, size: Shape | None = None, columns: int | None = None
) -> Float32[np.ndarray, "H W"]:
    """The probability of one class (an index into `settings.names`) at every pixel; the rest as in `read_features`."""
    chosen = [int(word == index) for word in settings.word_class]
    if not any(chosen):
        # "background" made by a threshold alone has no words: nothing is ever more or less like it
        return np.zeros(kept.original if size is None else size, np.float32)
    maps = _maps(kept, settings, chosen, size, columns, with_probabilities=True)
    assert maps.probabilities is not None
    return maps.probabilities[..., 1]


def room_for(words: int) -> int:
    """`columns` of `read_features` for a number of words: the next power of two, so that few programs serve all."""
    return max(_LEAST_COLUMNS, 1 << (words - 1).bit_length())


def _maps(
    kept: Kept,
    settings: PredictionSettings,
    word_class: Sequence[int],
    size: Shape | None,
    columns: int | None,
    *,
    with_probabilities: bool,
) -> PixelMaps:
    words = len(word_class)
    columns = words if columns is None else columns
    if columns < words:
        raise ValueError(f"the columns must hold all words, but {columns} are fewer than {words}")
    padded = np.zeros((columns, settings.classifier.shape[1]), np.float32)
    padded[:words] = settings.classifier
    found = (_whole if kept.plan is None else _windows)(kept, settings, padded, size or kept.original)
    scores = np.array(found.scores)
    scores[..., words:] = DROPPED  # smoothed, they would be zero, and some class may be below that
    return label_pixels(
        *found._replace(scores=scores),
        np.asarray([*word_class, *[0] * (columns - words)], np.int32),
        scale=settings.scale,
        smoothed=settings.smoothing is not None,
        least=settings.least,
        synonyms=settings.options.synonyms,
        with_probabilities=with_probabilities,
    )


def _whole(kept: Kept, settings: PredictionSettings, classifier: np.ndarray, size: Shape) -> Upsampled:
    (batch,) = kept.batches
    scores = _read(
        settings.model,
        {"params": {"logit_scale": settings.variables["params"]["logit_scale"]}},
        *batch,
        classifier,
        len(settings.word_class),
        np.float32(0) if settings.denoising is None else settings.denoising,  # below zero is no class: the same as off
        settings.smoothing,
    )
    return upsampled(np.asarray(scores)[0], np.asarray(batch.grid)[0], kept.valid, size, settings)


def _windows(kept: Kept, settings: PredictionSettings, classifier: np.ndarray, size: Shape) -> Upsampled:
    found, words = [], len(settings.word_class)
    for batch in kept.batches:
        variables = {"params": {"logit_scale": settings.variables["params"]["logit_scale"]}}
        logits, confidence = jax.device_get(_window_logits(settings.model, variables, *batch, classifier, words))
        keys = [None] * len(logits) if settings.smoothing is None else np.asarray(batch.keys)
        found += [WindowLogits(*window) for window in zip(logits, keys, confidence, strict=True)]
    assert kept.plan is not None
    plan = kept.plan._replace(original=size)
    return stitched(found[: kept.windows], plan, len(kept.batches[0].features), settings)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _encode(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    grid: Int[Array, "B 2"],
    *,
    method: DenseMethod,
) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
    return tuple(model.apply(variables, images, grid=grid, method="encode_dense", **dataclasses.asdict(method)))


def _confident_logits(
    features: Float[Array, "B h w E"],
    grid: Int[Array, "B 2"],
    classifier: Float[Array, "C E"],
    words: ArrayLike,
    scale: ArrayLike,
    config: CLIPConfig,
) -> tuple[Float[Array, "B h w C"], Bool[Array, "B L"] | None, Float[Array, "B C"]]:
    """Logits (of padding columns `DROPPED`), which positions are image, and each class's confidence."""
    logits = jnp.einsum("bhwe,ce->bhwc", features, classifier, precision="highest")
    logits = jnp.where(jnp.arange(logits.shape[-1]) < words, logits, DROPPED)
    flat, valid = logits.reshape(logits.shape[0], -1, logits.shape[-1]), flat_mask(grid, logits.shape[1:3], config)
    return logits, valid, class_confidence(flat, scale=scale, valid=valid)


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: CLIP,
    variables: Any,
    features: Float[Array, "B h w E"],
    keys: Float[Array, "B L D"],
    grid: Int[Array, "B 2"],
    classifier: Float[Array, "C E"],
    words: ArrayLike,
    denoising: ArrayLike,
    smoothing: ArrayLike | None,
) -> Float[Array, "B h w C"]:
    scale = probability_scale(model, variables)
    logits, valid, confidence = _confident_logits(features, grid, classifier, words, scale, model.config)
    flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])
    flat = refined(flat, keys, confidence, model.config.fidelity, scale, denoising, smoothing, valid)
    return flat.reshape(logits.shape)


@functools.partial(jax.jit, static_argnames="model")
def _window_logits(
    model: CLIP,
    variables: Any,
    features: Float[Array, "B h w E"],
    keys: Float[Array, "B L D"],
    grid: Int[Array, "B 2"],
    classifier: Float[Array, "C E"],
    words: ArrayLike,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B C"]]:
    scale = probability_scale(model, variables)
    logits, _, confidence = _confident_logits(features, grid, classifier, words, scale, model.config)
    return logits, confidence
