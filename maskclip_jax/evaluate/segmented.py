"""Scores of `segment_images` as it is, windows, PAMR and all: what a paper's protocol asks for.

`encoder.py` is faster (it counts on the device) and knows whole images only; this goes the way that a user's images
go, one result at a time, every host its share.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.images import ignored_label
from maskclip_jax.data.sources import DataSource
from maskclip_jax.data.vocabulary import ClassName
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import Evaluation, scored
from maskclip_jax.evaluate.engine import check_amount, known_labels
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.ops.hosts import sum_over_hosts
from maskclip_jax.segment.options import BACKGROUND, FIELDS, Options, with_overrides
from maskclip_jax.segment.paired import named_method
from maskclip_jax.segment.predict import iter_segmentations, prediction_settings
from maskclip_jax.segment.refine import Sigmoid


def evaluate_protocol(
    pretrained: Pretrained,
    source: DataSource,
    options: Options | None = None,
    *,
    classes: Sequence[ClassName],
    unseen: Sequence[int] = (),
    protocol_name: str | None = None,
    classifier: Float[np.ndarray, "words E"] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **overrides: Any,
) -> Evaluation:
    """mIoU of the masks that `segment_images` makes, with any of its options.

    Args:
      classes: names of the masks' values, in order. Where the first is "background", its synonyms are the words of the
        background (none: only the threshold makes it), and `background_threshold` applies.
      unseen: indices of unseen classes.
      protocol_name: for the record.
      options, classifier, overrides: as for `segment_images`.

    Raises:
      UserError: an option that cannot be used, an image without annotation, or a label that is no class.
    """
    names = [str(name) for name in classes]
    check_amount(len(names))
    options = with_overrides(options, overrides)
    # not part of a protocol, or recorded below as it was used
    apart = "batch_size cache return_probabilities short_side within probability_scale method affinity".split()
    protocol = {"protocol": protocol_name} | {
        field.name: value
        for field in FIELDS
        if field.name not in apart and (value := getattr(options, field.name)) is not None
    }
    if names[0].casefold() == BACKGROUND and len(classes) > 1:
        options = dataclasses.replace(options, background=[(word,) for word in classes[0][1:]] or None)
        classes = classes[1:]
        if options.background is None and options.background_threshold is None:
            raise UserError(
                "a background needs words of its own ('background, sky, wall; dog') or a threshold, but there are "
                "neither: name some, or take a --protocol that has one"
            )
    settings = prediction_settings(classes, pretrained, options, classifier=classifier)
    protocol |= {
        "short side": settings.preprocess.short_side,
        "within": settings.preprocess.within,
        "probability scale": _rounded(settings.scale),
        **named_method(options),
        "fidelity": dataclasses.asdict(pretrained.config.fidelity),
    }
    waiting: deque[np.ndarray] = deque()
    share = range(jax.process_index(), len(source), jax.process_count())

    def images() -> Iterator[np.ndarray]:
        for index in share:
            example = source[index]
            waiting.append(known_labels(example, len(names)))
            yield example.image

    report = None if progress is None else (lambda done: progress(done, len(share)))
    total = np.zeros((len(names), len(names)), np.int64)
    for result in iter_segmentations(images(), settings, report):
        total += confusion_matrix(waiting.popleft(), result.labels, len(names), ignored_label(len(names)))
    return scored(sum_over_hosts(total), names, unseen, len(source), protocol)


def _rounded(scale: Any) -> Any:
    """The softmax's scale, or the sigmoid's two numbers, for a record."""
    if isinstance(scale, Sigmoid):
        return {"scale": round(float(scale.scale), 3), "bias": round(float(scale.bias), 3)}
    return round(float(scale), 3)
