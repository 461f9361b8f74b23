"""From cells to pixels: the label and confidence of every pixel of the original image.

Original sizes differ from image to image, so nothing compiled may depend on them: pixels are computed in tiles of a
fixed size, each from the cells that it needs, with the tile's part of the two upsampling matrices as arguments. One
program per number of classes serves every image, and classes × pixels never exist at once for more than a tile.
Averages over views and PAMR need every class at every pixel, which `every_pixel` makes; that is slower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Integer, UInt8

from maskclip_jax.errors import UserError
from maskclip_jax.ops import round_up
from maskclip_jax.segment.grid import GridScores
from maskclip_jax.segment.refine import (
    Probabilities,
    Scale,
    Scores,
    Sigmoid,
    class_probabilities,
    probabilities,
    to_probabilities,
)
from maskclip_jax.segment.settings import PredictionSettings

CELLS = 24  # along each axis of a tile
_TILE = (128, 256)  # pixels
_TILE_FLOATS = 2**23  # classes × pixels of a tile, at most
MOST_FLOATS = 2**28  # words × pixels of one image of which all are kept: 1 GiB, of which a few copies exist
_STEP = 64  # such images are padded to multiples of this, so that few programs serve many sizes

Scorer = Callable[[Sequence[UInt8[np.ndarray, "_H _W 3"]], PredictionSettings], Iterator[tuple[int, GridScores]]]


class PixelMaps(NamedTuple):
    """What every pixel of the original image got."""

    labels: Integer[np.ndarray, "H W"]
    confidence: Float32[np.ndarray, "H W"]
    probabilities: Float32[np.ndarray, "H W K"] | None


class Strip(NamedTuple):
    """Pixels start … stop of one axis, the cells they are made of, and how."""

    start: int
    stop: int
    cells: Int[np.ndarray, " n"]
    matrix: Float32[np.ndarray, "t n"]


def label_pixels(
    scores: Scores,
    rows: Float32[np.ndarray, "H h"],
    columns: Float32[np.ndarray, "W w"],
    word_class: Int[np.ndarray, " C"],
    *,
    scale: Scale = 1.0,
    least: ArrayLike = 0.0,
    synonyms: str = "mean",
    with_probabilities: bool = False,
) -> PixelMaps:
    """Upsamples, takes the best word of every pixel, and names its class.

    Args:
      scores: of every cell and word, values [h, w, C].
      rows, columns: upsampling matrices of the two axes.
      word_class: the class that each word belongs to. A class's probability is the sum of its words', or with
        `synonyms="max"` the largest of them.
      scale: of the softmax that makes logits probabilities, or a `Sigmoid` (a class then has its best word's).
      least: pixels whose class is less probable than this become class 0 (and keep the confidence they had).
      with_probabilities: also return the probability of every class, the one large array.
    """
    tile = tile_shape(scores.values.shape[-1])
    shape, classes = (len(rows), len(columns)), int(word_class.max()) + 1
    out = PixelMaps(
        np.empty(shape, _label_type(classes)),
        np.empty(shape, np.float32),
        np.empty((*shape, classes), np.float32) if with_probabilities else None,
    )
    across = list(strips(columns, tile[1]))
    rule = np.asarray(word_class, np.int32), scale, np.float32(least)
    for down in strips(rows, tile[0]):
        band = scores.values[down.cells]
        for right in across:
            cells = scores._replace(values=np.ascontiguousarray(band[:, right.cells], np.float32))
            found = _label_tile(
                cells, down.matrix, right.matrix, rule, synonyms=synonyms, classes=classes if with_probabilities else 0
            )
            to = np.s_[down.start : down.stop, right.start : right.stop]
            inside = np.s_[: down.stop - down.start, : right.stop - right.start]
            for whole, part in zip(out, found, strict=True):
                if whole is not None:
                    whole[to] = np.asarray(part)[inside]
    return out


def _label_type(classes: int) -> type[np.unsignedinteger]:
    return np.uint8 if classes <= 255 else np.uint16


def tile_shape(words: int) -> tuple[int, int]:
    """Pixels of a tile: 128 × 256, halved until all words fit the memory of one."""
    height, width = _TILE
    while height * width * words > _TILE_FLOATS and height * width > 256:
        height, width = (height // 2, width) if height >= width else (height, width // 2)
    return height, width


def strips(matrix: Float32[np.ndarray, "n_out n_in"], most: int) -> Iterator[Strip]:
    """Cuts an upsampling matrix into strips of at most `most` pixels and `CELLS` cells, all padded to that size."""
    start = 0
    while start < len(matrix):
        span = min(most, len(matrix) - start)
        cells = np.flatnonzero(matrix[start : start + span].any(axis=0))
        while len(cells) > CELLS:
            if span == 1:
                raise ValueError(f"a pixel is made of at most {CELLS} cells along an axis, got {len(cells)}")
            span = max(1, min(span - 1, span * CELLS // len(cells)))
            cells = np.flatnonzero(matrix[start : start + span].any(axis=0))
        part = np.zeros((most, CELLS), np.float32)
        part[:span, : len(cells)] = matrix[start : start + span, cells]
        yield Strip(start, start + span, np.pad(cells, (0, CELLS - len(cells)), mode="edge"), part)
        start += span


@functools.partial(jax.jit, static_argnames=("synonyms", "classes"))
def _label_tile(
    cells: Scores,
    rows: Float[Array, "H r"],
    columns: Float[Array, "W c"],
    rule: tuple,
    *,
    synonyms: str,
    classes: int,
) -> tuple:
    with jax.default_matmul_precision("highest"):
        values = jnp.einsum("wc,hcn->hwn", columns, jnp.einsum("hr,rcn->hcn", rows, cells.values))
    return best_class(cells._replace(values=values), *rule, synonyms=synonyms, classes=classes)


def best_class(
    scores: Scores, word_class: Int[Array, " C"], scale: Scale, least: ArrayLike, *, synonyms: str, classes: int
) -> tuple[Int[Array, "H W"], Float[Array, "H W"], Float[Array, "H W K"] | None]:
    """The class of every pixel's best word, its probability, and (for `classes` of them) every class's; traced."""
    best = synonyms == "max" or isinstance(scale, Sigmoid)  # words that are judged one by one do not add up
    with jax.default_matmul_precision("highest"):
        labels = word_class[scores.values.argmax(axis=-1)]
        words = to_probabilities(scores, scale)
        own = jnp.where(word_class == labels[..., None], words, 0)
        confidence = own.max(axis=-1) if best else own.sum(axis=-1)
        labels = jnp.where(confidence < least, 0, labels)
    return labels, confidence, class_probabilities(words, word_class, classes, best=best) if classes else None


def needs_every_pixel(settings: PredictionSettings) -> bool:
    """Whether an image's answer needs every class at every pixel: means of views, PAMR and LPOSS+ do."""
    return settings.options.pamr > 0 or settings.options.spread > 0 or len(settings.options.views) > 1


def every_pixel(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings, scorer: Scorer
) -> Iterator[tuple[int, PixelMaps]]:
    """(index, answer) of every image, in order. `scorer` is `whole_scores` or `window_scores`.

    Views are sizes and the mirrored image; more than one: their probabilities are averaged. PAMR, then LPOSS+ refine
    what is there, logits of one view or the mean of many. Raises UserError where pixels times words are too many.
    """
    words = len(settings.word_class)
    for image in images:
        if image.shape[0] * image.shape[1] * words > MOST_FLOATS:
            raise UserError(
                f"PAMR, spreading and views keep every word at every pixel, at most {MOST_FLOATS:.0e} numbers, but an "
                f"image has {image.shape[1]}×{image.shape[0]} pixels and there are {words} words: shrink the image, or "
                "leave them out"
            )
    found = []
    for scale, flipped in settings.options.views:
        view = dataclasses.replace(settings, times=scale)
        seen = [np.ascontiguousarray(image[:, ::-1]) for image in images] if flipped else images
        found.append((flipped, dict(scorer(seen, view))))
    for index, image in enumerate(images):
        parts = [_pixel_scores(results[index], flipped) for flipped, results in found]
        if len(parts) > 1:
            parts = [np.asarray(probabilities(part, settings.scale)) for part in parts]
            parts = [Probabilities(sum(parts) / len(parts))]
        yield index, _labelled(parts[0], image, settings)


def _pixel_scores(found: GridScores, flipped: bool) -> Scores:
    """Scores of every pixel of the original image, mirrored back where the view was."""
    columns = found.columns[::-1] if flipped else found.columns
    across = np.tensordot(found.scores.values.astype(np.float32), columns, axes=(1, 1))  # [h, C, W]
    values = np.tensordot(found.rows, across, axes=(1, 0)).swapaxes(1, 2)
    return found.scores._replace(values=np.ascontiguousarray(values))


def _labelled(scores: Scores, image: UInt8[np.ndarray, "H W 3"], settings: PredictionSettings) -> PixelMaps:
    """The answer of an image, padded so that few sizes are compiled, after PAMR."""
    size, classes = image.shape[:2], len(settings.names)
    padding = [(0, round_up(side, _STEP) - side) for side in size]
    naming = settings.naming
    found = _refined_labels(
        scores._replace(values=np.pad(scores.values, (*padding, (0, 0)))),
        np.pad(image, (*padding, (0, 0))),
        np.array(size, np.int32),
        settings.options.pamr,
        settings.options.spread,
        (naming["word_class"], naming["scale"], naming["least"]),
        synonyms=naming["synonyms"],
        classes=classes if settings.options.return_probabilities else 0,
    )
    labels, *others = (part if part is None else np.asarray(part)[: size[0], : size[1]] for part in found)
    return PixelMaps(np.asarray(labels, _label_type(classes)), *others)


@functools.partial(jax.jit, static_argnames=("spread", "synonyms", "classes"))
def _refined_labels(
    scores: Scores,
    image: UInt8[Array, "H W 3"],
    size: Int[Array, " 2"],
    steps: ArrayLike,
    spread: int,
    rule: tuple,
    *,
    synonyms: str,
    classes: int,
) -> tuple:
    from maskclip_jax.segment.pamr import pamr  # few ask for it

    colours = image.astype(jnp.float32) / 255
    values = pamr(scores.values, colours, steps=steps, size=size)
    if spread:
        from maskclip_jax.segment.propagation import lposs_pixels

        values = lposs_pixels(values, colours, iterations=spread, size=size)
    return best_class(scores._replace(values=values), *rule, synonyms=synonyms, classes=classes)
