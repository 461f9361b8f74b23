"""Scores of an encoder read densely over a data source, on all devices of all hosts.

Every host reads its share and counts on its own devices, whatever shapes come; only the confusion matrices meet, as
exact 64-bit sums. A view (scale, flip) of an image is a resize before the network and a matrix per axis after it, so
that all views land on the annotation's own pixels; more than one view: their probabilities are averaged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int64

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.images import IGNORE, ignored_label
from maskclip_jax.data.preprocess import sized
from maskclip_jax.data.sources import DataSource
from maskclip_jax.encoders.dense import dense_method
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.engine import Counter, Reader, batches, prepared, read_ahead
from maskclip_jax.evaluate.metrics import (
    ZeroShotScores,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    seen_unseen_harmonic,
)
from maskclip_jax.ops.hosts import sum_over_hosts
from maskclip_jax.segment.options import Options, with_overrides
from maskclip_jax.segment.paired import named_method
from maskclip_jax.segment.refine import Scores, predict_scores, probability_scale, to_probabilities
from maskclip_jax.segment.settings import with_backbone

READ_HERE = (
    *("prompt_denoising", "key_smoothing", "method", "affinity", "short_side", "within", "scales", "flip"),
    *("batch_size", "templates", "cache"),  # the last two of the classifier, which is made before
)


class Evaluation(NamedTuple):
    """What an evaluation found, all in 0..1, and how."""

    confusion: Int64[np.ndarray, "C C"]
    names: tuple[str, ...]
    per_class: Float[np.ndarray, " C"]  # IoU; NaN where a class is in neither ground truth nor prediction
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    zero_shot: ZeroShotScores | None  # where some classes are unseen
    images: int
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Percentages, for a JSON file or a table."""
        found = {
            "mIoU": 100 * self.mean_iou,
            "mean accuracy": 100 * self.mean_accuracy,
            "pixel accuracy": 100 * self.pixel_accuracy,
        }
        if self.zero_shot is not None:
            found |= {name: 100 * value for name, value in self.zero_shot._asdict().items()}
        per_class = {name: 100 * float(iou) for name, iou in zip(self.names, self.per_class, strict=True)}
        return found | {"images": self.images, "protocol": self.protocol, "per class": per_class}


def evaluate_teacher(
    pretrained: Pretrained,
    classifier: Float[np.ndarray | Array, "C E"],
    names: Sequence[str],
    source: DataSource,
    options: Options | None = None,
    *,
    unseen: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
    counter: Counter | None = None,
    **overrides: Any,
) -> Evaluation:
    """Scores of MaskCLIP itself, whole images; `classifier` has a row for each name. Otherwise as for students.

    `options` and `overrides` as for `segment_images`, of those in `READ_HERE`; `evaluate_protocol` knows all of them.
    `counter` keeps compiled programs from call to call: `Counter(teacher_reader(…), C)` of the same model and options.
    """
    options = with_overrides(options, overrides)
    _check_counted(options)  # before a second backbone is fetched
    pretrained = with_backbone(pretrained, options)
    reader = teacher_reader(pretrained, options)
    if counter is None:
        counter = Counter(reader, len(names))
    elif counter.reader.preprocess != reader.preprocess:
        raise UserError("a counter is of the same model and options, but this one sizes images otherwise: make another")
    protocol = {
        "scales": list(options.scales),
        "flip": options.flip,
        "short side": reader.preprocess.short_side,
        "within": reader.preprocess.within,
        "prompt denoising": options.prompt_denoising,
        "key smoothing": options.key_smoothing,
        **named_method(options),
        "stride": pretrained.config.stride,
        "fidelity": dataclasses.asdict(pretrained.config.fidelity),
    }
    return evaluate(
        counter,
        {"clip": pretrained.variables, "text": classifier},
        source,
        names,
        unseen=unseen,
        scales=options.scales,
        flip=options.flip,
        batch_size=options.batch_size,
        progress=progress,
        protocol=protocol,
    )


def beyond_counting(options: Options) -> list[str]:
    """The options that are set and that only `evaluate_protocol` knows."""
    return [name for name in options.changed() if name not in READ_HERE]


def _check_counted(options: Options) -> None:
    if unread := beyond_counting(options):
        raise UserError(
            f"evaluate_teacher counts whole images, by {', '.join(READ_HERE)}, got {unread[0]}: "
            "call evaluate_protocol, or leave it out"
        )


def teacher_reader(pretrained: Pretrained, options: Options | None = None) -> Reader:
    """MaskCLIP with its refinement: the options' thresholds, method and size; `pretrained` has their backbone beside
    it. Views, batches and words are its caller's. Raises UserError for what needs more than a whole image's scores."""
    o, model = Options() if options is None else options, pretrained.model
    _check_counted(o)
    preprocess = sized(pretrained.preprocess, o.short_side, o.within)
    method = dense_method(o.method, pretrained.config)

    def scores(v: Any, pixels: Array, grid: Array | None) -> Scores:
        refinement = {"denoising": o.prompt_denoising, "smoothing": o.key_smoothing}
        return predict_scores(model, v["clip"], pixels, v["text"], grid=grid, method=method, **refinement)

    def probabilities(v: Any, found: Scores) -> Array:
        return to_probabilities(found, probability_scale(model, v["clip"]))

    return Reader(scores, probabilities, preprocess, model.config, method=method)


def evaluate(
    counter: Counter,
    variables: Any,
    source: DataSource,
    names: Sequence[str],
    *,
    unseen: Sequence[int] = (),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    protocol: dict[str, Any],
) -> Evaluation:
    """Counts over this host's share of `source` (every n-th image), sums over the hosts, and scores the sum."""
    share = range(jax.process_index(), len(source), jax.process_count())
    variables = counter.place(variables)
    prepare_one = functools.partial(prepared, counter, variables, Options(scales=tuple(scales), flip=flip).views)
    total, done = np.zeros((len(names), len(names)), np.int64), 0
    for batch in batches(read_ahead(source, share, prepare_one), counter.images_at_once(batch_size)):
        total += counter(variables, batch)
        done += len(batch)
        if progress is not None:
            progress(done, len(share))
    return scored(sum_over_hosts(total), names, unseen, len(source), protocol)


def scored(
    total: Int64[np.ndarray, "C C"],
    names: Sequence[str],
    unseen: Sequence[int],
    images: int,
    protocol: dict[str, Any],
) -> Evaluation:
    """All scores of one confusion matrix."""
    if (ignored := ignored_label(len(names))) != IGNORE:  # said, because 255 is a class then
        protocol = protocol | {"ignored label": ignored}
    iou = mean_iou(total)
    zero_shot = seen_unseen_harmonic(total, unseen) if 0 < len(unseen) < len(names) else None
    return Evaluation(
        total,
        tuple(map(str, names)),
        np.asarray(iou.per_class),
        float(iou.mean),
        float(mean_accuracy(total).mean),
        float(pixel_accuracy(total)),
        zero_shot,
        images,
        protocol,
    )
