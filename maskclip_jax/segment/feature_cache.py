"""Image features computed once and kept; any words and thresholds are then scored from them.

`segment_images` runs the tower and the reading as one program, which is right for a corpus. Where somebody tries words
on one picture, the picture stays and the words change: `keep_features` is the slow half, `read_features` the quick one.
Both are made of the steps of `grid` and `windows`, so that they answer as those do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data.buckets import Shape
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.segment.grid import batch_size_for, bucket_shapes, grid_scores, padded_batch, plan_batches
from maskclip_jax.segment.pixels import PixelMaps, label_pixels
from maskclip_jax.segment.predict import Segmentation, segmentation_of
from maskclip_jax.segment.refine import DROPPED, Scale, cosines, dense_features, grid_confidence
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.windows import Plan, laid_out, plan_windows, refine_windows, window_crops, window_side

_LEAST_COLUMNS = 8


class KeptBatch(NamedTuple):
    """What the tower made of one batch: a whole image, or some windows of one."""

    features: Float[Array, "B h w E"]
    keys: Float[Array, "B L D"]
    sizes: Int[np.ndarray, "B 2"]  # pixels that are image, padded to `config.multiple`


class Kept(NamedTuple):
    """All that an image's masks are read from, for one way of running the tower (model, attention, windows, sizes)."""

    batches: tuple[KeptBatch, ...]
    plan: Plan | None  # of windows; None: one row, the whole image
    original: Shape

    @property
    def nbytes(self) -> int:
        """Memory that the features take."""
        return sum(batch.features.nbytes + batch.keys.nbytes for batch in self.batches)


def keep_features(image: UInt8[np.ndarray, "H W 3"], settings: PredictionSettings) -> Kept:
    """Runs the image tower. Of the settings, the words, the thresholds and the background play no part."""
    if settings.options.windows is None:
        plan, images = None, [settings.prepare(image).pixels]
        shapes = bucket_shapes([image.shape[:2]], settings)
    else:
        plan = plan_windows(image.shape[:2], settings)
        images = list(window_crops(image, plan, settings))
        shapes = [(window_side(plan, settings.config.stride),) * 2] * plan.count
    batches = []
    for batch in plan_batches(shapes, functools.partial(batch_size_for, settings)):
        pixels, sizes = padded_batch([images[row] for row in batch.rows], batch.size, batch.shape)
        batches.append(
            KeptBatch(*_encode(settings.model, settings.variables, pixels, sizes, method=settings.method), sizes)
        )
    return Kept(tuple(batches), plan, image.shape[:2])


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
    classifier = np.zeros((columns, settings.classifier.shape[1]), np.float32)
    classifier[:words] = settings.classifier
    config, refinement = settings.config, settings.refinement
    refinement["denoising"] = refinement["denoising"] or np.float32(0)  # below zero is no class: the same as off
    read = [
        _logits(batch.features, batch.sizes, classifier, words, settings.scale, config=config) for batch in kept.batches
    ]
    count = 1 if kept.plan is None else kept.plan.count  # the last batch may have room for more
    confidence = np.concatenate([np.asarray(sure) for _, sure in read])[:count].max(axis=0)
    scores = []
    for batch, (logits, _) in zip(kept.batches, read, strict=True):
        keys = None if refinement["smoothing"] is None else batch.keys
        scores.append(refine_windows(logits, keys, confidence, batch.sizes[0], refinement, config=config))
    if kept.plan is None:
        first = type(scores[0])(np.asarray(scores[0].values)[0])
        found = grid_scores(first, kept.original, settings, size)
    else:
        found = laid_out(scores, kept.plan._replace(original=size or kept.original), settings)
    values = np.array(found.scores.values)
    values[..., words:] = DROPPED  # smoothed, they would be zero, and some class may be below that
    classes = np.asarray([*word_class, *[0] * (columns - words)], np.int32)
    naming = settings.naming | {"word_class": classes, "with_probabilities": with_probabilities}
    return label_pixels(type(found.scores)(values), *found[1:], **naming)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _encode(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    *,
    method: DenseMethod,
) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
    return dense_features(model, variables, images, sizes // model.config.multiple, method)


@functools.partial(jax.jit, static_argnames="config")
def _logits(
    features: Float[Array, "B h w E"],
    sizes: Int[Array, "B 2"],
    classifier: Float[Array, "C E"],
    words: ArrayLike,
    scale: Scale,
    *,
    config: CLIPConfig,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B C"]]:
    """Logits (of padding columns `DROPPED`), and each class's confidence."""
    logits = cosines(features, classifier)
    logits = jnp.where(jnp.arange(logits.shape[-1]) < words, logits, DROPPED)
    return logits, grid_confidence(logits, sizes // config.multiple, config, scale)
