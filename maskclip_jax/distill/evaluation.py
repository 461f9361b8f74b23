"""Scores of a student over a data source: `evaluate.encoder`'s engine, with the student in the encoder's place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from maskclip_jax.data.preprocess import Preprocess, upsample_matrix
from maskclip_jax.data.sources import DataSource
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.evaluate.encoder import Evaluation, evaluate
from maskclip_jax.evaluate.engine import Counter, Reader
from maskclip_jax.segment.refine import Logits, to_probabilities
from maskclip_jax.students import create_student


def evaluate_student(
    config: DistillConfig,
    variables: Any,
    text: Float[Array | np.ndarray, "C E"],
    source: DataSource,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores of a student whose `variables` are {"params", "batch_stats"}; sizes as in training.

    Args:
      text: classifier rows of the named classes.
      source: images with annotation in label values of `config.label_names`.
      scales, flip: views whose probabilities are averaged.
      batch_size: images at once on each device, at most.
      progress: called with (images done, images in all) of this host.

    Raises:
      UserError: an image without annotation, or a label that is no class.
    """
    size = config.augmentation
    views = {"scales": list(scales), "flip": flip, "short side": size.short_side, "within": size.within}
    return evaluate(
        _student_counter(config),
        {"student": variables, "text": text},
        source,
        config.label_names,
        unseen=config.unseen_labels,
        scales=scales,
        flip=flip,
        batch_size=batch_size,
        progress=progress,
        protocol=views,
    )


@functools.lru_cache(maxsize=2)  # a run evaluates many times: one program
def _student_counter(config: DistillConfig) -> Counter:
    return Counter(student_reader(config), config.num_classes)


@functools.lru_cache(maxsize=4)  # programs are remembered by it
def student_reader(config: DistillConfig) -> Reader:
    """A student as it is used: running statistics, no dropout, images sized as in training without the random scale.

    A student of the released code's habits (`teacher.fidelity`) has its cells stretched over the image, and resized
    twice.
    """
    student = config.student_config
    module = create_student(dataclasses.replace(student, bn_axis_name=None))
    size = {name: getattr(config.augmentation, name) for name in ("short_side", "long_side", "within")}
    least = student.output_stride if student.stem == "clip" else 1
    habits = {"aligned": True} if config.teacher.fidelity == "clip" else {"aligned": False, "steps": 2}

    def matrix(columns: int, valid: int, original: int) -> np.ndarray:
        cells = student.cells(max(valid, least))
        return upsample_matrix(
            cells, student.grid_stride, valid, original, partial=least > 1, columns=columns, **habits
        )

    return Reader(
        lambda v, pixels, sizes: Logits(module.apply(v["student"], pixels, v["text"], sizes=sizes)),
        lambda v, scores: to_probabilities(scores, 1.0),
        Preprocess(config.image_mean, config.image_std, config.augmentation.interpolation, **size),
        stride=student.output_stride,
        matrix=matrix,
        least=least,
    )
