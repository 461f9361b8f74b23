"""Batched inference for `label`: blocks of prepared images -> scores, best classes and features, on all devices.

Shapes come from a fixed ladder and batches from the block alone, so the same block is computed in the same batches in
every process: nothing here remembers what came before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from maskclip_jax.data.buckets import bucket_shape
from maskclip_jax.data.preprocess import PreparedImage
from maskclip_jax.encoders.dense import DenseMethod
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.segment.images import Shape, Upsampled, batch_size_for, padded_batch, upsampled
from maskclip_jax.segment.scores import predict_scores, to_probabilities
from maskclip_jax.segment.settings import PredictionSettings


class Cells(NamedTuple):
    """Results of one batch, padding included."""

    scores: Array  # [B, h, w, words]
    classes: Array | None  # int32 [B, h, w, k], the most probable first
    probabilities: Array | None  # float32 [B, h, w, k]
    features: Array | None  # bfloat16 [B, h, w, E]


class Devices:
    """This host's devices: arrays on all of them, batches split over them."""

    def __init__(self, settings: PredictionSettings):
        devices = np.asarray(jax.local_devices())
        spec = jax.sharding.PartitionSpec
        mesh = jax.sharding.Mesh(devices, ("images",))
        self.count = len(devices)
        self._split = jax.sharding.NamedSharding(mesh, spec("images"))
        everywhere = jax.sharding.NamedSharding(mesh, spec())
        self.variables, self.classifier = jax.device_put((settings.variables, settings.classifier), everywhere)

    def split(self, *arrays: np.ndarray) -> tuple[Array, ...]:
        """Arrays split over the devices along their first axis."""
        return jax.device_put(arrays, self._split)


def whole_cells(
    prepared: Sequence[PreparedImage],
    settings: PredictionSettings,
    devices: Devices,
    wanted: set[int],
    *,
    top_k: int,
    with_features: bool,
) -> Iterator[tuple[int, Upsampled, dict[str, np.ndarray]]]:
    """(row, scores, cells) of the wanted rows: `cells` has "classes", "probabilities" [h, w, k], "features" [h, w, E].

    Batches are those of all rows; one without a wanted row is left out."""
    waiting: tuple | None = None
    for shape, size, part in cell_batches([image.valid for image in prepared], settings, devices.count):
        if wanted.isdisjoint(part):
            continue
        pixels, grid = padded_batch([prepared[row].pixels for row in part], size, shape, settings.config)
        found = compute_cells(settings, devices, *devices.split(pixels, grid), top_k, with_features)
        # The devices work on this batch while the host takes the one before apart.
        if waiting is not None:
            yield from _apart(*waiting, prepared, settings, wanted)
        waiting = part, found, grid
    if waiting is not None:
        yield from _apart(*waiting, prepared, settings, wanted)


def cell_batches(
    sizes: Sequence[Shape], settings: PredictionSettings, devices: int
) -> Iterator[tuple[Shape, int, list[int]]]:
    """(padded shape, images of a full batch, rows) of every batch of a block whose images have these sizes."""
    groups: dict[Shape, list[int]] = collections.defaultdict(list)
    for row, valid in enumerate(sizes):
        shape = bucket_shape(*valid, settings.config.stride, short_side=settings.preprocess.short_side)
        groups[shape].append(row)
    for shape, rows in groups.items():
        size = devices * batch_size_for(settings, shape, -(-len(rows) // devices))
        for start in range(0, len(rows), size):
            yield shape, size, rows[start : start + size]


def compute_cells(
    settings: PredictionSettings, devices: Devices, pixels: Array, grid: Array, top_k: int, with_features: bool
) -> Cells:
    """One batch that is on the devices already; returns at once."""
    return _cells(
        settings.model,
        devices.variables,
        pixels,
        grid,
        devices.classifier,
        settings.denoising,
        settings.smoothing,
        settings.scale,
        method=settings.method,
        word_class=settings.word_class,
        top_k=top_k,
        with_features=with_features,
    )


@functools.partial(jax.jit, static_argnames=("model", "method", "word_class", "top_k", "with_features"))
def _cells(
    model: CLIP,
    variables: Any,
    images: Float[Array, "B H W 3"],
    grid: Int[Array, "B 2"],
    classifier: Float[Array, "C E"],
    denoising: ArrayLike | None,
    smoothing: ArrayLike | None,
    scale: ArrayLike,
    *,
    method: DenseMethod,
    word_class: tuple[int, ...],
    top_k: int,
    with_features: bool,
) -> Cells:
    options = {"grid": grid, "method": method, "denoising": denoising, "smoothing": smoothing}
    scores = predict_scores(model, variables, images, classifier, **options)
    classes = probabilities = features = None
    if top_k:
        words = to_probabilities(scores, scale, smoothed=smoothing is not None)
        of_class = jax.nn.one_hot(np.array(word_class), max(word_class) + 1)
        probabilities, classes = jax.lax.top_k(jnp.einsum("bhwc,ck->bhwk", words, of_class, precision="highest"), top_k)
    if with_features:  # the same tower again in one program: XLA computes it once
        reading = dataclasses.asdict(method)
        features, _ = model.apply(variables, images, grid=grid, method="encode_dense", **reading)
        features = features.astype(jnp.bfloat16)
    return Cells(scores, classes, probabilities, features)


def _apart(
    part: Sequence[int],
    found: Cells,
    grid: np.ndarray,
    prepared: Sequence[PreparedImage],
    settings: PredictionSettings,
    wanted: set[int],
) -> Iterator[tuple[int, Upsampled, dict[str, np.ndarray]]]:
    on_host = Cells(*(None if array is None else np.asarray(array) for array in found))
    for place, row in enumerate(part):
        if row not in wanted:
            continue
        image, (h, w) = prepared[row], map(int, settings.config.cells(grid[place]))
        inside = np.s_[place, :h, :w]
        scores = upsampled(on_host.scores[place], grid[place], image.valid, image.original, settings)
        cells = on_host._asdict() | {"scores": None}
        yield row, scores, {name: array[inside] for name, array in cells.items() if array is not None}
