"""Upsampling: scores of grid cells -> label and confidence of every pixel of the original image, in tiles.

Original sizes differ from image to image, so nothing compiled may depend on them: pixels are computed in tiles of a
fixed size, each from the cells that it needs, with the tile's part of the two upsampling matrices as arguments. One
program per number of classes serves every image, and classes × pixels never exist at once for more than a tile.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int, Integer

from maskclip_jax.data.preprocess import upsample_matrix
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.segment.scores import to_probabilities

CELLS = 24  # along each axis of a tile
_TILE = (128, 256)  # pixels
_TILE_FLOATS = 2**23  # classes × pixels of a tile, at most


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


def pixel_matrix(
    config: CLIPConfig, cells: int, valid: int, original: int, *, columns: int | None = None
) -> Float32[np.ndarray, "original columns"]:
    """`upsample_matrix` of one axis as the model's fidelity has it."""
    fidelity = config.fidelity
    return upsample_matrix(
        int(cells),
        config.stride,
        valid,
        original,
        aligned=fidelity.upsample == "aligned",
        steps=fidelity.upsample_steps,
        partial=config.multiple < config.stride,
        columns=columns,
    )


def label_pixels(
    scores: Float[np.ndarray, "h w C"],
    rows: Float32[np.ndarray, "H h"],
    columns: Float32[np.ndarray, "W w"],
    word_class: Int[np.ndarray, " C"],
    *,
    scale: ArrayLike,
    smoothed: bool,
    least: float = 0.0,
    synonyms: str = "mean",
    with_probabilities: bool = False,
) -> PixelMaps:
    """Upsamples, takes the best word of every pixel, and names its class.

    Args:
      scores: of every cell and word, as `predict_scores` gives them.
      rows, columns: upsampling matrices of the two axes.
      word_class: the class that each word belongs to. A class's probability is the sum of its words', or with
        `synonyms="max"` the largest of them.
      scale: of the softmax that makes logits probabilities.
      smoothed: the scores are smoothed probabilities already.
      least: pixels whose class is less probable than this become class 0 (and keep the confidence they had).
      with_probabilities: also return the probability of every class, the one large array.
    """
    tile = tile_shape(scores.shape[-1])
    shape, classes = (len(rows), len(columns)), int(word_class.max()) + 1
    out = PixelMaps(
        np.empty(shape, np.uint8 if classes <= 255 else np.uint16),
        np.empty(shape, np.float32),
        np.empty((*shape, classes), np.float32) if with_probabilities else None,
    )
    across = list(strips(columns, tile[1]))
    words = np.asarray(word_class, np.int32)
    for down in strips(rows, tile[0]):
        band = scores[down.cells]
        for right in across:
            labels, confidence, probabilities = _label_tile(
                np.ascontiguousarray(band[:, right.cells], np.float32),
                down.matrix,
                right.matrix,
                words,
                scale,
                np.float32(least),
                smoothed=smoothed,
                synonyms=synonyms,
                classes=classes if with_probabilities else None,
            )
            to, inside = np.s_[down.start : down.stop, right.start : right.stop], _corner(down, right)
            out.labels[to] = np.asarray(labels)[inside]
            out.confidence[to] = np.asarray(confidence)[inside]
            if out.probabilities is not None:
                out.probabilities[to] = np.asarray(probabilities)[inside]
    return out


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
                raise ValueError(f"a pixel is made of at most {CELLS} cells along an axis, but {len(cells)} came")
            span = max(1, min(span - 1, span * CELLS // len(cells)))
            cells = np.flatnonzero(matrix[start : start + span].any(axis=0))
        part = np.zeros((most, CELLS), np.float32)
        part[:span, : len(cells)] = matrix[start : start + span, cells]
        yield Strip(start, start + span, np.pad(cells, (0, CELLS - len(cells)), mode="edge"), part)
        start += span


def _corner(down: Strip, right: Strip) -> tuple[slice, slice]:
    return np.s_[: down.stop - down.start, : right.stop - right.start]


@functools.partial(jax.jit, static_argnames=("smoothed", "synonyms", "classes"))
def _label_tile(
    cells: Float[Array, "r c C"],
    rows: Float[Array, "H r"],
    columns: Float[Array, "W c"],
    word_class: Int[Array, " C"],
    scale: ArrayLike,
    least: ArrayLike,
    *,
    smoothed: bool,
    synonyms: str,
    classes: int | None,
) -> tuple[Int[Array, "H W"], Float[Array, "H W"], Float[Array, "H W K"] | None]:
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("wc,hcn->hwn", columns, jnp.einsum("hr,rcn->hcn", rows, cells))
    return best_class(scores, word_class, scale, least, smoothed=smoothed, synonyms=synonyms, classes=classes)


def best_class(
    scores: Float[Array, "H W C"],
    word_class: Int[Array, " C"],
    scale: ArrayLike,
    least: ArrayLike,
    *,
    smoothed: bool,
    synonyms: str,
    classes: int | None,
) -> tuple[Int[Array, "H W"], Float[Array, "H W"], Float[Array, "H W K"] | None]:
    """The class of every pixel's best word, its probability, and (for `classes` of them) every class's; traced."""
    with jax.default_matmul_precision("highest"):
        labels = word_class[scores.argmax(axis=-1)]
        words = to_probabilities(scores, scale, smoothed=smoothed)
        own = jnp.where(word_class == labels[..., None], words, 0)
        confidence = own.max(axis=-1) if synonyms == "max" else own.sum(axis=-1)
        labels = jnp.where(confidence < least, 0, labels)
        if classes is None:
            probabilities = None
        elif synonyms == "max":
            largest = jax.ops.segment_max(jnp.moveaxis(words, -1, 0), word_class, classes)
            probabilities = jnp.moveaxis(jnp.maximum(largest, 0), 0, -1)  # a class without words has none
        else:
            probabilities = words @ jax.nn.one_hot(word_class, classes)
    return labels, confidence, probabilities
