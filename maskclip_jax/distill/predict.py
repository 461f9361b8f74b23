"""Images of any size -> masks by a trained student: its own classes, no teacher, no text tower."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from maskclip_jax.data.buckets import bucket_shapes
from maskclip_jax.data.preprocess import ResizedImage, resize
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.evaluation import student_reader
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.engine import Reader
from maskclip_jax.segment.classifier import named_classes
from maskclip_jax.segment.grid import GridScores, plan_batches, run_batches, usual_sides
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.pixels import PixelMaps, label_pixels
from maskclip_jax.segment.predict import Image, Segmentation, chunks, in_order, segmentation_of
from maskclip_jax.segment.refine import Logits, Scores
from maskclip_jax.students import Student

LOOKAHEAD = 64  # images whose sizes are looked at together, at most


class TrainedStudent(NamedTuple):
    """A student as `load_student` has it: `student.apply(variables, images, text)` gives logits."""

    config: DistillConfig
    student: Student
    variables: dict[str, Any]  # "params" and "batch_stats", float32, on the host
    text: Float[np.ndarray, "C E"]
    step: int
    chosen: str = ""  # how the step was chosen, in words
    scores: dict[str, Any] | None = None  # of this step, where it was evaluated: `Evaluation.to_dict()`

    @property
    def origin(self) -> str:
        """Which checkpoint it is, and how it was chosen, for a line."""
        return f"checkpoint: step {self.step} of {self.config.steps}" + f", {self.chosen}" * bool(self.chosen)

    def iter_segmentations(self, images: Any, classes: Any, options: Options, progress: Any = None) -> Iterator:
        """What `segment_images` calls in place of a CLIP's. Raises UserError for an option that no student reads."""
        given = options.changed()
        given.pop("cache", None)  # of a text classifier, which is none of a student's
        takes = ("short_side", "batch_size", "background_threshold", "return_probabilities")
        if refused := [name for name in given if name not in takes]:
            raise UserError(f"a student is read as it was trained, got {refused[0]}: leave it out")
        names = None if classes is None else [str(entry) for entry in named_classes(classes)]
        return iter_student_segmentations(images, self, progress, classes=names, **given)


def iter_student_segmentations(
    images: Iterable[Image],
    trained: TrainedStudent,
    progress: Callable[[int], None] | None = None,
    *,
    classes: Sequence[str] | None = None,
    short_side: int | None = None,
    batch_size: int = 8,
    background_threshold: float | None = None,
    return_probabilities: bool = False,
) -> Iterator[Segmentation]:
    """What `iter_segmentations` is for a CLIP: one `Segmentation` per image, in order and in its original size.

    Args:
      images: uint8 RGB arrays [H, W, 3], or paths of image files.
      trained: from `load_student`.
      progress: called with the number of images done.
      classes: some of the student's own names, which then compete alone; None is all of them.
      short_side: pixels that the short side is resized to; None is the size of its training.
      batch_size: images of one padded shape at once, at most.
      background_threshold: for students with a background: pixels less probable than this are background.

    Raises:
      UserError: an image that cannot be read, a class that the student has not learned, a threshold without background.
    """
    names = trained.config.label_names
    chosen = chosen_labels(trained.config, classes)
    if background_threshold is not None and not (trained.config.background and 0 in chosen):
        raise UserError("a background threshold needs a student with a background, but this one has none: leave it out")
    labeller = StudentLabeller(trained, short_side=short_side, batch_size=batch_size)
    naming = {"least": background_threshold or 0.0, "with_probabilities": return_probabilities}
    done = 0
    for chunk in chunks(images, LOOKAHEAD):
        resized = [labeller.resize(image) for image in chunk]
        for scores, *matrices in in_order(labeller.grid_scores(resized)):
            maps = label_pixels(Logits(scores.values[..., chosen]), *matrices, np.arange(len(chosen)), **naming)
            done += 1
            if progress is not None:
                progress(done)
            yield segmentation_of(maps, [names[label] for label in chosen])


class StudentLabeller:
    """A trained student as what `label` labels with: its own classes, on this host's first device."""

    def __init__(self, trained: TrainedStudent, *, short_side: int | None, batch_size: int):
        self.names, self.batch_size, self.step = trained.config.label_names, batch_size, trained.step
        self._reader = reader = student_reader(trained.config)
        if short_side is not None:
            size = dataclasses.replace(reader.preprocess, short_side=short_side, long_side=None, within=None)
            self._reader = dataclasses.replace(reader, preprocess=size)
        self._scores = functools.partial(_scores, reader)  # what images are resized to is no part of the program
        self._variables = jax.device_put({"student": trained.variables, "text": trained.text})

    def resize(self, image: UInt8[np.ndarray, "H W 3"]) -> ResizedImage:
        return resize(image, self._reader.preprocess)

    def scores(self, images: Sequence[tuple], wanted: set[int], *, top_k: int, features: bool) -> Iterator[tuple]:
        del top_k, features  # of a CLIP's cells; the command refuses them
        for row, found in self.grid_scores([resized for _, resized in images], wanted):
            yield row, found, {}

    def grid_scores(
        self, images: Sequence[ResizedImage], wanted: set[int] | None = None
    ) -> Iterator[tuple[int, GridScores]]:
        """(index, result) of the wanted images; batches are made of all, so that they are the same whatever is wanted.
        Two programs for a padded shape at most."""
        reader, sizes = self._reader, [tuple(max(side, self._reader.least) for side in image.valid) for image in images]
        shapes = bucket_shapes(sizes, reader.stride, **usual_sides(reader.preprocess))
        batches = plan_batches(shapes, lambda _, count: self.batch_size if 2 * count > self.batch_size else 1)
        compute = functools.partial(self._scores, self._variables)
        for index, found in run_batches(batches, lambda index: reader.prepare(images[index]).pixels, compute, wanted):
            image = images[index]
            sides = zip(found.values.shape[:2], shapes[index], image.valid, image.original, strict=True)
            yield index, GridScores(found, *(reader.axis_matrix(*side) for side in sides))

    def maps(self, found: GridScores) -> PixelMaps:
        return label_pixels(*found, np.arange(len(self.names)))

    def geometry(self, resized: ResizedImage) -> dict[str, Any]:
        return {"valid": resized.valid, "original": resized.original}


def chosen_labels(config: DistillConfig, classes: Sequence[str] | None) -> list[int]:
    """Label values of the classes asked for, and the background's. Raises UserError for a class that it has not."""
    names = config.label_names
    if classes is None:
        return list(range(len(names)))
    unknown = [name for name in classes if name not in names]
    if unknown or len(set(classes)) != len(classes):
        raise UserError(
            f"a student has the {len(names)} classes it was trained on, each once, got {unknown or list(classes)}: "
            f"choose among {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
        )
    wanted = [names.index(name) for name in classes]
    return [0] * (config.background and 0 not in wanted) + wanted


@functools.partial(jax.jit, static_argnums=0)
def _scores(reader: Reader, variables: Any, pixels: Float[Array, "B H W 3"], sizes: Int[Array, "B 2"]) -> Scores:
    return reader.scores(variables, pixels, sizes)
