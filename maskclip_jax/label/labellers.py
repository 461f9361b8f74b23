"""The models that `label` can use: a CLIP with its options, or a trained student (`Labeller`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from maskclip_jax.data.preprocess import PreparedImage
from maskclip_jax.label.batches import Devices, whole_cells
from maskclip_jax.label.corpus import Read
from maskclip_jax.segment.pixels import PixelMaps
from maskclip_jax.segment.predict import labelled_pixels
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.windows import window_scores


@runtime_checkable
class Labeller(Protocol):
    """What labels images: a CLIP as `PredictionSettings` say (`ClipLabeller`), or a trained student."""

    names: tuple[str, ...]
    batch_size: int

    def prepare(self, image: np.ndarray) -> PreparedImage | None:
        """What is computed from; None where that is the image itself."""

    def scores(
        self, images: Sequence[tuple[Read, PreparedImage | None]], wanted: set[int], *, top_k: int, features: bool
    ) -> Iterator[tuple[int, Any, dict[str, np.ndarray]]]:
        """(row, scores, cells) of the wanted rows of a block, in batches that the block alone decides."""

    def maps(self, upsampled: Any) -> PixelMaps:
        """Labels and confidences of one image, from its scores."""

    def geometry(self, prepared: PreparedImage | None) -> dict[str, Any]:
        """How cells become pixels again."""


class ClipLabeller:
    """A CLIP as the settings say, on all devices of this host."""

    def __init__(self, settings: PredictionSettings):
        self.settings, self.names, self.batch_size = settings, tuple(settings.names), settings.options.batch_size

    def prepare(self, image: np.ndarray) -> PreparedImage | None:
        if self.settings.options.windows is not None:
            return None
        return self.settings.prepare(image)

    def scores(
        self, images: Sequence[tuple[Read, PreparedImage | None]], wanted: set[int], *, top_k: int, features: bool
    ) -> Iterator[tuple[int, Any, dict[str, np.ndarray]]]:
        if self.settings.options.windows is None:
            cells = {"top_k": top_k, "with_features": features}
            prepared = [prepared for _, prepared in images]
            yield from whole_cells(prepared, self.settings, _devices(self.settings), wanted, **cells)
        else:
            whole = window_scores([found.image for found, _ in images], self.settings)
            yield from ((row, upsampled, {}) for row, upsampled in whole if row in wanted)

    def maps(self, upsampled: Any) -> PixelMaps:
        return labelled_pixels(upsampled, self.settings)

    def geometry(self, prepared: PreparedImage | None) -> dict[str, Any]:
        sizes = {} if prepared is None else {"valid": prepared.valid, "original": prepared.original}
        return sizes | {"stride": self.settings.config.stride}


def labeller_of(settings: Any) -> Any:
    """`settings` as a `Labeller`."""
    return ClipLabeller(settings) if isinstance(settings, PredictionSettings) else settings


@functools.lru_cache(maxsize=1)  # shard after shard: the variables are copied to the devices once
def _devices(settings: PredictionSettings) -> Devices:
    return Devices(settings)
