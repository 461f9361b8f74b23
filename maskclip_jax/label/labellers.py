"""The models that `label` can use: a CLIP with its options, on all devices of this host, or a trained student.

A block's images go through the grid engine together, and its shapes and batches follow from the block alone: so the
same block is computed in the same batches in every process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array

from maskclip_jax.data.buckets import Shape
from maskclip_jax.data.preprocess import ResizedImage
from maskclip_jax.label.corpus import Read
from maskclip_jax.ops.hosts import shardings
from maskclip_jax.segment.grid import (
    Batch,
    CellResults,
    GridScores,
    batch_size_for,
    bucket_shapes,
    cells_of_image,
    grid_scores,
    plan_batches,
    run_batches,
    score_batch,
)
from maskclip_jax.segment.pixels import PixelMaps
from maskclip_jax.segment.predict import labelled_pixels, scorer_of
from maskclip_jax.segment.settings import PredictionSettings


@runtime_checkable
class Labeller(Protocol):
    """What labels images: a CLIP as `PredictionSettings` say (`ClipLabeller`), or a trained student."""

    names: tuple[str, ...]
    batch_size: int

    def resize(self, image: np.ndarray) -> ResizedImage | None:
        """What is computed from; None where that is the image itself."""

    def scores(
        self, images: Sequence[tuple[Read, ResizedImage | None]], wanted: set[int], *, top_k: int, features: bool
    ) -> Iterator[tuple[int, GridScores, dict[str, np.ndarray]]]:
        """(row, scores, cells) of the wanted rows of a block, in batches that the block alone decides."""

    def maps(self, found: GridScores) -> PixelMaps:
        """Labels and confidences of one image, from its scores."""

    def geometry(self, resized: ResizedImage | None) -> dict[str, Any]:
        """How cells become pixels again."""


class Devices:
    """This host's devices: the settings' arrays on all of them, batches split over them."""

    def __init__(self, settings: PredictionSettings):
        self.count = jax.local_device_count()
        self._split, everywhere = shardings(jax.local_devices())
        variables, classifier = jax.device_put((settings.variables, settings.classifier), everywhere)
        self.settings = dataclasses.replace(settings, variables=variables, classifier=classifier)

    def batches(self, originals: Sequence[Shape]) -> Iterator[Batch]:
        """The batches of a block of images of these sizes: every device gets as many."""
        fitting = functools.partial(batch_size_for, self.settings)
        shapes = bucket_shapes(originals, self.settings)
        return plan_batches(shapes, lambda shape, count: self.count * fitting(shape, -(-count // self.count)))

    def split(self, *arrays: np.ndarray) -> tuple[Array, ...]:
        """Arrays split over the devices along their first axis."""
        return jax.device_put(arrays, self._split)

    def compute(self, pixels: np.ndarray, sizes: np.ndarray, top_k: int = 0, features: bool = False) -> CellResults:
        """Results of one padded batch, on the devices; returns at once."""
        return score_batch(self.settings, *self.split(pixels, sizes), top_k, features)


class ClipLabeller:
    """A CLIP as the settings say, on all devices of this host."""

    def __init__(self, settings: PredictionSettings):
        self.settings, self.names, self.batch_size = settings, tuple(settings.names), settings.options.batch_size

    def resize(self, image: np.ndarray) -> ResizedImage | None:
        return None if self.settings.options.windows is not None else self.settings.resize(image)

    def scores(
        self, images: Sequence[tuple[Read, ResizedImage | None]], wanted: set[int], *, top_k: int, features: bool
    ) -> Iterator[tuple[int, GridScores, dict[str, np.ndarray]]]:
        settings = self.settings
        if settings.options.windows is not None:
            windowed = scorer_of(settings)([found.image for found, _ in images], settings)
            yield from ((row, scores, {}) for row, scores in windowed if row in wanted)
            return
        resized = [image for _, image in images if image is not None]
        devices = _devices(settings)
        compute = functools.partial(devices.compute, top_k=top_k, features=features)
        batches = devices.batches([image.original for image in resized])
        for row, found in run_batches(batches, lambda row: settings.prepare(resized[row]).pixels, compute, wanted):
            height, width = cells_of_image(settings.config, resized[row].valid)
            kept = {name: array for name, array in found._asdict().items() if name != "scores" and array is not None}
            cells = {name: array[:height, :width] for name, array in kept.items()}
            yield row, grid_scores(found.scores, resized[row].original, settings), cells

    def maps(self, found: GridScores) -> PixelMaps:
        return labelled_pixels(found, self.settings)

    def geometry(self, resized: ResizedImage | None) -> dict[str, Any]:
        sizes = {} if resized is None else {"valid": resized.valid, "original": resized.original}
        return sizes | {"stride": self.settings.config.stride}


def labeller_of(settings: Any) -> Any:
    """`settings` as a `Labeller`."""
    return ClipLabeller(settings) if isinstance(settings, PredictionSettings) else settings


@functools.lru_cache(maxsize=1)  # shard after shard: the variables are copied to the devices once
def _devices(settings: PredictionSettings) -> Devices:
    return Devices(settings)
