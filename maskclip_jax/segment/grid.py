"""The grid engine: images of any size -> scores of the cells of the model's grid, in padded batches.

Whole images, sliding windows (`windows.py`), kept features (`feature_cache.py`), `label`, students and `evaluate` all
choose their padded shapes and batches here. Both follow from the sizes that are given, never from earlier calls, and
padding is masked: it changes nothing. How cells become pixels of the image again is a matrix for each axis.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, UInt8

from maskclip_jax.data import buckets
from maskclip_jax.data.buckets import Shape
from maskclip_jax.data.preprocess import Preprocess, upsample_matrix
from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.segment.refine import (
    Scores,
    Sigmoid,
    class_probabilities,
    cosines,
    dense_features,
    refined,
    to_probabilities,
)
from maskclip_jax.segment.settings import PredictionSettings

T = TypeVar("T")
_ATTENTION_BYTES = 2**30  # of one layer's attention matrices in float32
_BATCH_PIXELS, _BATCH_PIXELS_CPU = 2**24, 2**20  # more make a CPU no faster, and take a gigabyte of temporaries
_BACKBONE_HEADS = 16  # of a ViT-L, which stands for whatever second backbone


class Batch(NamedTuple):
    """Images that are computed together: the padded shape in pixels, how many there is room for, and which they are."""

    shape: Shape
    size: int
    rows: list[int]


class CellResults(NamedTuple):
    """What a batch's cells got: scores, and what `label` keeps of cells if it is asked to."""

    scores: Scores  # [B, h, w, words]
    classes: Array | None = None  # int32 [B, h, w, k], the most probable first
    probabilities: Array | None = None  # float32 [B, h, w, k]
    features: Array | None = None  # bfloat16 [B, h, w, E]


class GridScores(NamedTuple):
    """Scores of an image's cells, and the matrices of the two axes that make them pixels of the original image."""

    scores: Scores  # values [h, w, C]
    rows: Float32[np.ndarray, "H h"]
    columns: Float32[np.ndarray, "W w"]


def whole_scores(
    images: Sequence[UInt8[np.ndarray, "_H _W 3"]], settings: PredictionSettings
) -> Iterator[tuple[int, GridScores]]:
    """(index, result) of every image, read as a whole, bucket by bucket."""
    shapes = bucket_shapes([image.shape[:2] for image in images], settings)
    batches = plan_batches(shapes, functools.partial(batch_size_for, settings))
    compute = functools.partial(score_batch, settings)
    for index, found in run_batches(batches, lambda index: settings.prepare(images[index]).pixels, compute):
        yield index, grid_scores(found.scores, images[index].shape[:2], settings)


def bucket_shapes(originals: Sequence[Shape], settings: PredictionSettings) -> list[Shape]:
    """The padded shape each image is computed in, few altogether (pixels, multiples of `config.stride`)."""
    sizes, stride = [settings.resized(size) for size in originals], settings.config.stride
    shapes = buckets.bucket_shapes(sizes, stride, **usual_sides(settings.preprocess, settings.times))
    for i, (size, shape) in enumerate(zip(sizes, shapes, strict=True)):
        # Sharing a large square is cheap in programs, but attention's memory grows with the area squared.
        if attention_bytes(settings.config, shape, settings.method) > _ATTENTION_BYTES:
            own = buckets.bucket_shape(*size, stride)
            if 2 * own[0] * own[1] < shape[0] * shape[1]:
                shapes[i] = own
    return shapes


def usual_sides(preprocess: Preprocess, times: float = 1.0) -> dict[str, Any]:
    """The short side, or the frame, that most images are resized to, as `data.buckets` wants to know it."""
    scaled = preprocess.scaled(times)
    return {"short_side": scaled.short_side, "within": scaled.within}


def batch_size_for(settings: PredictionSettings, shape: Shape, count: int) -> int:
    """How many of `count` images of a padded shape go together: full batches (smaller where images are large), or one
    by one where a batch would be mostly empty. Two sizes a shape are all that is ever compiled."""
    most = most_at_once(settings.options.batch_size, shape, settings.config, settings.method)
    return most if 2 * count > most else 1


def most_at_once(batch_size: int, shape: Shape, config: CLIPConfig, method: DenseMethod = MASKCLIP) -> int:
    """Images of a padded shape that fit together: `batch_size`, or fewer where they are large."""
    attention = attention_bytes(config, shape, method)
    pixels = _BATCH_PIXELS_CPU if jax.default_backend() == "cpu" else _BATCH_PIXELS
    fitting = (batch_size, pixels // (shape[0] * shape[1]), _ATTENTION_BYTES // attention if attention else None)
    return max(1, min(most for most in fitting if most is not None))


def attention_bytes(config: CLIPConfig, shape: Shape, method: DenseMethod = MASKCLIP) -> int:
    """Bytes of one layer's attention matrices for one image of a padded shape, in float32."""
    if not isinstance(config.vision, ViTConfig) and method == MASKCLIP:
        return 0
    tokens = shape[0] * shape[1] // config.stride**2 + 1
    heads = max(config.vision.heads, _BACKBONE_HEADS if method.affinity else 0)
    return 4 * heads * tokens**2


def plan_batches(shapes: Sequence[Shape], size_for: Callable[[Shape, int], int]) -> Iterator[Batch]:
    """Batches of images of these padded shapes; `size_for` has batch sizes by shape and number of images."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    for row, shape in enumerate(shapes):
        groups[shape].append(row)
    for shape, rows in groups.items():
        size = size_for(shape, len(rows))
        for start in range(0, len(rows), size):
            yield Batch(shape, size, rows[start : start + size])


def run_batches(
    batches: Iterable[Batch],
    image: Callable[[int], Float32[np.ndarray, "_h _w 3"]],
    compute: Callable[[Any, Any], Any],
    wanted: set[int] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(row, its results on the host, the grid's padding still on) of every image, or of the wanted ones.

    Args:
      batches: in this order; one without a wanted row is left out.
      image: pixels of a row, called once for each row of a batch, in order, one batch ahead in a thread.
      compute: of `padded_batch`'s arrays; returns arrays [B, …] at once, as compiled functions do. The accelerator
        works on one batch while the host takes the one before apart.
    """

    def apart(rows: list[int], found: Any) -> Iterator[tuple[int, Any]]:
        on_host = jax.device_get(found)
        for place, row in enumerate(rows):
            if wanted is None or row in wanted:
                yield row, jax.tree.map(lambda x: x[place], on_host)  # noqa: B023  (used at once)

    def padded(batch: Batch) -> tuple[list[int], Any]:
        return batch.rows, padded_batch([image(row) for row in batch.rows], batch.size, batch.shape)

    waiting: tuple = ()
    for rows, arrays in ahead(padded, (b for b in batches if wanted is None or not wanted.isdisjoint(b.rows))):
        found = compute(*arrays)
        if waiting:
            yield from apart(*waiting)
        waiting = rows, found
    if waiting:
        yield from apart(*waiting)


def ahead(make: Callable[[Any], T], items: Iterable[Any], workers: int = 1, most: int = 1) -> Iterator[T]:
    """`make` of every item in order, up to `most` more being made in threads meanwhile."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # an error, or nobody who listens any more: what was not begun is not begun
            for one in waiting:
                one.cancel()


def padded_batch(
    images: Sequence[Float32[np.ndarray, "_h _w 3"]], size: int, shape: Shape
) -> tuple[Float32[np.ndarray, "B H W 3"], Int[np.ndarray, "B 2"]]:
    """Images of differing sizes in one array of `size`, and each one's height and width in pixels.

    A batch that is not full has black images at its end, as large as the first one.
    """
    batch = np.zeros((size, *shape, 3), np.float32)
    sizes = np.full((size, 2), images[0].shape[:2], np.int32)
    for row, image in enumerate(images):
        sizes[row] = image.shape[:2]
        batch[row, : sizes[row, 0], : sizes[row, 1]] = image
    return batch, sizes


def score_batch(
    settings: PredictionSettings,
    pixels: Float[Array | np.ndarray, "B H W 3"],
    sizes: Int[Array | np.ndarray, "B 2"],
    top_k: int = 0,
    with_features: bool = False,
) -> CellResults:
    """Results of a padded batch, on the device; returns at once."""
    return _score_batch(
        settings.model,
        settings.variables,
        pixels,
        settings.classifier,
        sizes,
        settings.refinement,
        method=settings.method,
        word_class=settings.word_class if top_k else (),
        top_k=top_k,
        with_features=with_features,
    )


@functools.partial(jax.jit, static_argnames=("model", "method", "word_class", "top_k", "with_features"))
def _score_batch(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    classifier: Float[Array, "C E"],
    sizes: Int[Array, "B 2"],
    refinement: dict[str, Any],
    *,
    method: DenseMethod,
    word_class: tuple[int, ...],
    top_k: int,
    with_features: bool,
) -> CellResults:
    grid = sizes // model.config.multiple
    features, keys = dense_features(model, variables, images, grid, method)
    scores = refined(cosines(features, classifier), keys, model.config, grid=grid, **refinement)
    classes = probabilities = None
    if top_k:
        scale = refinement["scale"]
        words, best = to_probabilities(scores, scale), isinstance(scale, Sigmoid)
        all_classes = class_probabilities(words, np.array(word_class), max(word_class) + 1, best=best)
        probabilities, classes = jax.lax.top_k(all_classes, top_k)
    return CellResults(scores, classes, probabilities, features.astype(jnp.bfloat16) if with_features else None)


def grid_scores(scores: Scores, original: Shape, settings: PredictionSettings, size: Shape | None = None) -> GridScores:
    """Scores of an image's padded grid, the padding cut off, with its matrices to `size` pixels (None: its own)."""
    valid = settings.resized(original)
    rows, columns = cells_of_image(settings.config, valid)
    sides = zip((rows, columns), valid, size or original, strict=True)
    cut = scores._replace(values=scores.values[:rows, :columns])
    return GridScores(cut, *(pixel_matrix(settings.config, *side) for side in sides))


def cells_of_image(config: CLIPConfig, valid: Sequence[int]) -> tuple[int, ...]:
    """Cells along each side of an image of so many pixels, which is padded as one by itself is."""
    return tuple(int(config.cells(config.padded(side) // config.multiple)) for side in valid)


def pixel_matrix(
    config: CLIPConfig, cells: int, valid: int, original: int, *, columns: int | None = None
) -> Float32[np.ndarray, "original columns"]:
    """Cells -> pixels along one axis: `upsample_matrix` as the model's fidelity has it."""
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
