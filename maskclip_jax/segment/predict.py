"""Images of any size and words -> masks: whole images or sliding windows, one compiled program per shape bucket.

    sizes, words, thresholds    settings
    resize, normalise, pad      grid (or windows)   on the host
    logits, refinement          refine              one program per bucket, padding masked exactly
    pixels, argmax              pixels              one program for all sizes

`segment_images` is all that most callers need. For streams, make `prediction_settings` once and loop over
`iter_segmentations`; for experiments, the pure functions of `refine` are re-exported here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import Classes
from maskclip_jax.segment.grid import GridScores, whole_scores
from maskclip_jax.segment.options import Options, with_overrides
from maskclip_jax.segment.pixels import PixelMaps, every_pixel, label_pixels, needs_every_pixel
from maskclip_jax.segment.refine import dense_logits as dense_logits
from maskclip_jax.segment.refine import predict_probabilities as predict_probabilities
from maskclip_jax.segment.refine import predict_scores as predict_scores
from maskclip_jax.segment.settings import PredictionSettings
from maskclip_jax.segment.settings import prediction_settings as prediction_settings

Image = np.ndarray | str | os.PathLike
LOOKAHEAD = 256  # images whose sizes are looked at together, at most
LOOKAHEAD_PIXELS = 2**26  # and that are held meanwhile: 200 MB
T = TypeVar("T")


class ClassScore(NamedTuple):
    """How much of an image a class has, and how sure that is."""

    area: float  # share of the image's pixels, 0..1
    confidence: float  # mean probability over the pixels it has; NaN where it has none


class Segmentation(NamedTuple):
    """The answer for one image, in its original size."""

    labels: Integer[np.ndarray, "H W"]  # indices into `classes`: uint8, or uint16 beyond 255 classes
    scores: dict[str, ClassScore]  # of every class, by name
    classes: tuple[str, ...]  # names to display; "background" first if there is one
    confidence: Float32[np.ndarray, "H W"]  # probability of each pixel's class
    probabilities: Float32[np.ndarray, "H W K"] | None  # of every class, if asked for

    def overlay(self, image: Image) -> UInt8[np.ndarray, "H2 W2 3"]:
        """The masks on the image they were found in, above a legend. Raises UserError for an image of another size."""
        from maskclip_jax.visualize import overlay_with_legend

        pixels = as_pixels(image)
        if pixels.shape[:2] != self.labels.shape:
            raise UserError(
                f"masks lie on the image they were found in, of {self.labels.shape[1]}×{self.labels.shape[0]} pixels, "
                f"got one of {pixels.shape[1]}×{pixels.shape[0]}: give that image"
            )
        return overlay_with_legend(pixels, self.labels, self.classes)

    def to_detections(self, *, per: str = "region", min_area: int = 1, min_confidence: float = 0.0) -> dict[str, Any]:
        """The objects as `supervision.Detections(**found.to_detections())` takes them; it is not needed here.

        `xyxy` float32 [N, 4] in pixels (the right and lower side are those of the last pixel), `mask` bool [N, H, W],
        `confidence` float32 [N] (means), `class_id` int [N], `data["class_name"]` [N]. A background, class 0, is no
        object. Arguments and order are those of `maskclip_jax.segment.regions.find_regions`.
        """
        from maskclip_jax.segment.regions import as_detections, find_regions

        limits = {"per": per, "min_area": min_area, "min_confidence": min_confidence}
        found = find_regions(self.labels, self.classes, self.confidence, **limits)
        return as_detections(self.labels.shape, found, self.classes)

    def save(self, folder: str | os.PathLike, image: Image | None = None, name: str | None = None) -> None:
        """The files that `segment` writes: NAME.json, NAME_labels.png and, given the image, NAME_overlay.png.

        `name` is the stem of the image's path, or "image"; files of that name are replaced. Raises UserError where
        they cannot be written, or where the image has another size.
        """
        from maskclip_jax.segment.files import write_result

        path = Path(image if isinstance(image, str | os.PathLike) else name or "image")
        write_result(Path(folder), name or path.stem, path, None if image is None else self.overlay(image), self)


def segment_images(
    images: Sequence[Image],
    classes: Classes | None,
    model: Pretrained | Any,
    options: Options | None = None,
    *,
    classifier: Float[np.ndarray, "words E"] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> list[Segmentation]:
    """Finds the named things in images of any sizes (MaskCLIP: paper, section 3).

    Args:
      images: uint8 RGB arrays [H, W, 3], or paths of image files.
      classes: names, "sofa,couch" or a tuple being synonyms; or one text, as `parse_classes` takes it.
      model: from `load_clip`, whose fidelity decides the habits; or from `load_student`: then `classes` are some of
        its own (None: all), and only sizes and thresholds of its own are read from the options.
      options: how images are read; `Options` says what there is.
      classifier: [words, E] of unit vectors to use instead of the text tower: background words, then classes (with
        synonyms="max" a row for every synonym).
      progress: called with (images done, images in all).
      overrides: fields of `Options` by name, `key_smoothing=True`, instead of what `options` has there.

    Returns:
      One `Segmentation` per image, in order. Where windows overlap, logits are averaged; denoising looks at all windows
      of an image together, smoothing at one window at a time, and then its probabilities are averaged. With a
      background, its words are one class, "background", the first; pixels that a threshold makes background keep their
      confidence.

    Raises:
      UserError: one line, on the first input or option that cannot be used.
    """
    if isinstance(images, str | os.PathLike):
        raise UserError(f"images must be a list, got one path ({images}): write [path]")
    total = len(images)
    report = (lambda done: progress(done, total)) if progress is not None else None
    student = getattr(model, "iter_segmentations", None)  # of a folder that comes after this one
    if student is not None:
        if classifier is not None:
            raise UserError("a student knows its own classes, got a classifier: leave it out")
        return list(student(images, classes, with_overrides(options, overrides), report))
    settings = prediction_settings(classes, model, options, classifier=classifier, **overrides)
    return list(iter_segmentations(images, settings, report))


def iter_segmentations(
    images: Iterable[Image], settings: PredictionSettings, progress: Callable[[int], None] | None = None
) -> Iterator[Segmentation]:
    """`segment_images` for any number of images, in order; an answer comes as soon as those before it have.

    A few images are held at a time (`chunks`), and the full-size maps of one. `progress` is called with the number of
    images done.
    """
    done, scorer = 0, scorer_of(settings)
    for chunk in chunks(images):
        if needs_every_pixel(settings):
            found = in_order(every_pixel(chunk, settings, scorer))
        else:
            found = (labelled_pixels(scores, settings) for scores in in_order(scorer(chunk, settings)))
        for maps in found:
            done += 1
            if progress is not None:
                progress(done)
            yield segmentation_of(maps, settings.names)


def scorer_of(settings: PredictionSettings) -> Callable[..., Iterator[tuple[int, GridScores]]]:
    """What scores images as the settings say: whole, or in sliding windows."""
    if settings.options.windows is None:
        return whole_scores
    from maskclip_jax.segment.windows import window_scores

    return window_scores


def chunks(
    images: Iterable[Image], most: int = LOOKAHEAD, pixels: int = LOOKAHEAD_PIXELS
) -> Iterator[list[UInt8[np.ndarray, "_H _W 3"]]]:
    """Images read and taken together: up to `most` of them, fewer once they have `pixels` pixels."""
    chunk, held = [], 0
    for image in images:
        chunk.append(as_pixels(image))
        held += chunk[-1].size // 3
        if len(chunk) >= most or held >= pixels:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def in_order(found: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Values by their index, 0, 1, …; those that come early wait."""
    early: dict[int, T] = {}
    turn = 0
    for index, value in found:
        early[index] = value
        while turn in early:
            yield early.pop(turn)
            turn += 1


def segmentation_of(maps: PixelMaps, names: Sequence[str]) -> Segmentation:
    """The answer that an image's pixels make: areas and mean confidences are counted over them."""
    return Segmentation(maps.labels, _class_scores(maps, names), tuple(names), *maps[1:])


def labelled_pixels(found: GridScores, settings: PredictionSettings) -> PixelMaps:
    """`label_pixels` as the settings say."""
    return label_pixels(*found, **settings.naming, with_probabilities=settings.options.return_probabilities)


def _class_scores(maps: PixelMaps, names: Sequence[str]) -> dict[str, ClassScore]:
    labels, size = maps.labels.ravel(), maps.labels.size
    pixels = np.bincount(labels, minlength=len(names))
    sums = np.bincount(labels, maps.confidence.ravel(), minlength=len(names))
    mean = np.full(len(names), np.nan)
    np.divide(sums, pixels, out=mean, where=pixels > 0)
    return {n: ClassScore(float(a) / size, float(c)) for n, a, c in zip(names, pixels, mean, strict=True)}


def as_pixels(image: Image) -> UInt8[np.ndarray, "H W 3"]:
    """An image as its pixels, read where it is a path. Raises UserError for anything that is no 8-bit RGB picture."""
    if isinstance(image, str | os.PathLike):
        from maskclip_jax.data.images import read_image  # here: arrays need no decoder

        return read_image(image)
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image is an array or a path, got {type(image).__name__}: use numpy.asarray(image)")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise UserError(
            f"an image array is uint8 [height, width, 3] and not empty, got {image.dtype} {list(image.shape)}: "
            "convert it to 8-bit RGB"
        )
    return image
