"""From images to a confusion matrix: views, batches of equal shapes, one program per shape, this host's devices.

The engine under `encoder.py` and `distill.evaluation`; it knows neither teachers nor students, only `Reader`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64, Integer

from maskclip_jax.data.buckets import bucket_shape
from maskclip_jax.data.images import IGNORE_16, ignored_label
from maskclip_jax.data.preprocess import PreparedImage, Preprocess, ResizedImage, pad_image, prepare, upsample_matrix
from maskclip_jax.data.sources import DataSource, Example
from maskclip_jax.encoders.config import CLIPConfig
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.ops.hosts import shardings
from maskclip_jax.segment.grid import ahead, cells_of_image, most_at_once, pixel_matrix, usual_sides
from maskclip_jax.segment.refine import Scores

CANVAS = 32  # annotations are padded to multiples of this
READERS, AHEAD = 4, 16  # threads that read and resize, and examples that they may be ahead by
MOST_WAITING = 128  # examples that wait for others of their shape: about 1 GB of 512-pixel images
MOST_SCORES = 2**27  # scores of one program on one device: batches of large images shrink to stay below
MOST_CLASSES = 10_000  # the confusion matrix has their square in 64-bit numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A network that scores every position of an image.

    Fields:
      scores: (variables, pixels [B, H, W, 3], each image's size [B, 2], or None where nothing is padding) -> `Scores`,
        values [B, h, w, C]; traced. A CLIP's sizes are those that `encode_dense` counts in, others' are in pixels.
      probabilities: (variables, upsampled `Scores`) -> probabilities; traced, used when there are several views.
      preprocess: size, statistics, and the multiple that sides are padded to.
      clip: of a CLIP, how pixels become cells and these pixels again. None is a student.
      stride: multiple of pixels that sides of shape buckets are (a CLIP's own); 0 for a network that would see the
        padding: its images have none.
      matrix: of a student, (cells with padding, valid, original) -> matrix of one axis from its cells to the image's
        pixels; None where cells divide the padded pixels.
      least: pixels that each side has at least.
      method: of a CLIP, how its last blocks are read.
    """

    scores: Callable[[Any, Array, Array], Scores]
    probabilities: Callable[[Any, Scores], Array]
    preprocess: Preprocess
    clip: CLIPConfig | None = None
    stride: int = 0
    matrix: Callable[[int, int, int], np.ndarray] | None = None
    least: int = 1
    method: DenseMethod = MASKCLIP

    def prepare(self, rgb: np.ndarray | ResizedImage, scale: float = 1.0) -> PreparedImage:
        """An image as the network takes it, before it is padded to a bucket; `scale` times as large."""
        multiple, least = (None, self.least) if self.clip is None else (self.clip.multiple, self.clip.stride)
        return prepare(rgb, self.preprocess, multiple, least, scale)

    def axis_matrix(self, cells: int, padded: int, valid: int, original: int) -> np.ndarray:
        """[original, cells]: from all cells of one axis to the image's pixels."""
        if self.clip is not None:
            (own,) = cells_of_image(self.clip, [valid])
            return pixel_matrix(self.clip, own, valid, original, columns=cells)
        if self.matrix is not None:
            return self.matrix(cells, valid, original)
        stride = padded // cells
        return upsample_matrix(-(-valid // stride), stride, valid, original, columns=cells)


class View(NamedTuple):
    """One view of one image, or stacked, of a batch."""

    pixels: np.ndarray  # [H, W, 3] normalised and padded
    size: np.ndarray  # [2] without the padding, as `Reader.scores` takes it
    rows: np.ndarray  # [canvas height, h]
    columns: np.ndarray  # [canvas width, w]


Prepared = tuple[tuple[View, ...], Integer[np.ndarray, "H W"]]


def read_ahead(source: DataSource, share: range, prepare_one: Callable[[Example], Prepared]) -> Iterator[Prepared]:
    """The examples of `share`, read and resized ahead of time, in order."""
    return ahead(lambda index: prepare_one(source[index]), share, READERS, AHEAD)


def prepared(
    counter: Counter,
    variables: Any,
    views: Sequence[tuple[float, bool]],
    example: Example,
) -> Prepared:
    """The views (scale, flipped) of an example, and its labels on a canvas. Raises UserError for unusable labels."""
    classes = counter.classes
    known = known_labels(example, classes)
    grid_shape = functools.partial(counter.grid_shape, variables)
    found = [_view(counter.reader, grid_shape, example.image, *view) for view in views]
    canvas = canvas_shape(known.shape, found[0].pixels.shape[:2])

    def on_canvas(view: View) -> View:
        beyond = (((0, side - len(matrix)), (0, 0)) for side, matrix in zip(canvas, view[2:], strict=True))
        return View(*view[:2], *map(np.pad, view[2:], beyond))

    labels = np.full(canvas, ignored_label(classes), np.int32)
    labels[: known.shape[0], : known.shape[1]] = known
    return tuple(map(on_canvas, found)), labels


def canvas_shape(original: tuple[int, int], padded: tuple[int, int]) -> tuple[int, int]:
    """What annotation is padded to: the image's padded shape, enlarged by √2 until it holds the original.

    Then there are not many more programs than padded shapes, however many sizes the originals have.
    """
    enlarged = ([-(-side * 2 ** (k / 2) // CANVAS) * CANVAS for side in padded] for k in itertools.count())
    return tuple(
        next([int(s) for s in sides] for sides in enlarged if sides[0] >= original[0] and sides[1] >= original[1])
    )


def check_amount(classes: int) -> None:
    """Raises UserError where there are too many classes for a confusion matrix."""
    if classes > MOST_CLASSES:
        raise UserError(f"at most {MOST_CLASSES:,} classes are scored, got {classes:,}: score them in parts")


def known_labels(example: Example, classes: int) -> Integer[np.ndarray, "H W"]:
    """An example's labels: classes, or `ignored_label(classes)`. Raises UserError where there are others, or none."""
    if example.labels is None:
        raise UserError(f"scores need annotation, but {example.name} has none: choose data with masks")
    ignore, labels = ignored_label(classes), example.labels.astype(np.int32)
    labels[labels == IGNORE_16] = ignore
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore)]
    if wrong.size:
        raise UserError(
            f"labels are 0..{classes - 1} or {ignore}, but {example.name} has {wrong[0]}: check the classes"
        )
    return labels


def _view(reader: Reader, grid_shape: Callable, rgb: np.ndarray, scale: float, flipped: bool) -> View:
    """A view whose matrices end at the image's own pixels."""
    image, clip = reader.prepare(np.ascontiguousarray(rgb[:, ::-1]) if flipped else rgb, scale), reader.clip
    size = np.array(image.pixels.shape[:2], np.int32)
    if stride := reader.stride if clip is None else clip.stride:
        usual = usual_sides(reader.preprocess, scale)
        image = pad_image(image, bucket_shape(*image.pixels.shape[:2], stride, **usual))
    padded = image.pixels.shape[:2]
    sides = zip(grid_shape(padded), padded, image.valid, image.original, strict=True)
    rows, columns = (reader.axis_matrix(*side) for side in sides)
    return View(
        image.pixels, size if clip is None else size // clip.multiple, rows, columns[::-1] if flipped else columns
    )


def batches(examples: Iterator[Prepared], at_once: Callable[[Prepared], int]) -> Iterator[list[Prepared]]:
    """Examples of equal shapes together; batches are full but the last ones, and where too many shapes wait."""
    waiting: dict[Any, list[Prepared]] = {}
    for example in examples:
        key = tuple(x.shape for x in jax.tree.leaves(example))
        waiting.setdefault(key, []).append(example)
        if len(waiting[key]) == at_once(example):
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) > MOST_WAITING:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


class Counter:
    """Batches -> confusion matrices, on this host's devices (no program here waits for another host)."""

    def __init__(self, reader: Reader, classes: int):
        check_amount(classes)
        self.reader, self.classes = reader, classes
        self._split, self._everywhere = shardings(jax.local_devices())
        self._devices = jax.local_device_count()
        self._count = jax.jit(self._traced)
        self._grid_shapes: dict[tuple[int, int], tuple[int, int]] = {}
        self._sizes: dict[Any, int] = {}

    def place(self, variables: Any) -> Any:
        """Variables on all local devices; what training keeps on the devices of all hosts is read back first."""
        return jax.device_put(jax.tree.map(np.asarray, variables), self._everywhere)

    def grid_shape(self, variables: Any, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the scores of an image of `shape` pixels."""
        if shape not in self._grid_shapes:
            pixels = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
            size = jax.ShapeDtypeStruct((1, 2), jnp.int32)
            self._grid_shapes[shape] = jax.eval_shape(self.reader.scores, variables, pixels, size).values.shape[1:3]
        return self._grid_shapes[shape]

    def images_at_once(self, batch_size: int) -> Callable[[Prepared], int]:
        """How many examples like the given one make a batch."""

        def at_once(example: Prepared) -> int:
            views, labels = example
            most, clip = min(batch_size, MOST_SCORES // (labels.size * self.classes)), self.reader.clip
            if clip is not None:
                shapes = {view.pixels.shape[:2] for view in views}
                most = min([most, *(most_at_once(batch_size, shape, clip, self.reader.method) for shape in shapes)])
            return self._devices * max(1, most)

        return at_once

    def __call__(self, variables: Any, batch: list[Prepared]) -> Int64[np.ndarray, "C C"]:
        """The confusion matrix of one batch; `variables` come from `place`."""
        views, labels = jax.tree.map(lambda *x: np.stack(x), *batch)
        # Whole shares for every device, and the size of an earlier batch of these shapes, which has its program.
        shapes = tuple(x.shape[1:] for x in jax.tree.leaves((views, labels)))
        size = max(-(-len(labels) // self._devices) * self._devices, self._sizes.get(shapes, 0))
        self._sizes[shapes] = size
        missing = size - len(labels)
        if missing:  # the first image again, labelled "ignore"
            views = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)]), views)
            labels = np.concatenate(
                [labels, np.full((missing, *labels.shape[1:]), ignored_label(self.classes), labels.dtype)]
            )
        views, labels = jax.device_put((views, labels), self._split)
        return np.asarray(self._count(variables, views, labels)).astype(np.int64)

    def _traced(self, variables: Any, views: tuple[View, ...], labels: Array) -> Array:
        scores = [self.reader.scores(variables, view.pixels, view.size) for view in views]

        def best(rows: list[Array]) -> Array:
            """Labels of the pixels that the given rows of the upsampling matrices make."""
            total = jnp.zeros(())
            for cells, down, view in zip(scores, rows, views, strict=True):
                # full precision: TPUs and GPUs would move the borders otherwise
                found = jnp.einsum("bhwc,byh->bywc", cells.values, down, precision="highest")
                found = jnp.einsum("bywc,bxw->byxc", found, view.columns, precision="highest")
                several = len(views) > 1
                total += self.reader.probabilities(variables, cells._replace(values=found)) if several else found
            return total.argmax(axis=-1)

        rows = [view.rows for view in views]
        count, height, width = labels.shape
        parts = min(height, -(-height * width * self.classes // MOST_SCORES))
        parts = next(n for n in range(parts, height + 1) if height % n == 0)
        if parts == 1:
            predicted = best(rows)
        else:  # thousands of classes do not fit at every pixel at once
            cut = [jnp.moveaxis(x.reshape(count, parts, height // parts, -1), 1, 0) for x in rows]
            predicted = jnp.moveaxis(jax.lax.map(best, cut), 0, 1).reshape(labels.shape)
        return confusion_matrix(labels, predicted, self.classes, ignored_label(self.classes))
