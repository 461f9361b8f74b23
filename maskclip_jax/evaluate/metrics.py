"""Scores of segmentation: confusion matrix, mIoU, accuracies, and the seen / unseen / harmonic scores of zero-shot.

IoU follows Everingham et al. (VOC) as mmsegmentation computes it; hIoU is that of Xian et al., "Semantic Projection
Network" (2019). Rows of a confusion matrix are ground truth, columns predictions.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from maskclip_jax.data.images import IGNORE
from maskclip_jax.errors import UserError


class MeanIoU(NamedTuple):
    """Intersection over union, in 0..1."""

    per_class: Float[Array | np.ndarray, " C"]  # NaN where a class is in neither ground truth nor prediction
    mean: Float[Array | np.ndarray, ""]  # over the classes that are not NaN; NaN when all are


class MeanAccuracy(NamedTuple):
    """Recall of each class, in 0..1."""

    per_class: Float[Array | np.ndarray, " C"]  # NaN where a class is not in the ground truth
    mean: Float[Array | np.ndarray, ""]


class ZeroShotScores(NamedTuple):
    """Zero-shot segmentation, in 0..1."""

    seen: float  # mean IoU over the seen classes
    unseen: float  # mean IoU over the unseen classes
    harmonic: float  # hIoU, the harmonic mean of the two


def confusion_matrix(
    labels_true: Integer[Array | np.ndarray, "*shape"],
    labels_pred: Integer[Array | np.ndarray, "*shape"],
    num_classes: int,
    ignore: int | None = IGNORE,
) -> Integer[Array | np.ndarray, "C C"]:
    """Counts the pixels of every (true, predicted) pair of classes.

    NumPy labels are checked and counted on the host in int64. JAX arrays, traced ones too, are counted on the device
    in int32, one call at most 2³¹−1 pixels, and a label outside 0..C-1 drops its pixel: `np.asarray` the result and
    add up in int64 over images (`total += …` with an int64 `total`), which stays exact for any corpus.

    Args:
      labels_true: ground truth.
      labels_pred: predictions, the same shape.
      num_classes: C.
      ignore: ground-truth value that is not counted; None counts all.

    Raises:
      UserError: `ignore` is itself a class, or (NumPy) a label is not in 0..C-1.
    """
    if ignore is not None and 0 <= ignore < num_classes:
        raise UserError(
            f"the ignored label must not be a class, but {ignore} is in 0..{num_classes - 1}: pass ignore=None or -1"
        )
    if isinstance(labels_true, jax.Array) or isinstance(labels_pred, jax.Array):
        return _count_on_device(jnp.asarray(labels_true), jnp.asarray(labels_pred), num_classes, ignore)
    true, pred = labels_true.astype(np.int64).ravel(), labels_pred.astype(np.int64).ravel()
    if ignore is not None:
        counted = true != ignore
        true, pred = true[counted], pred[counted]
    for labels, what in ((true, "ground-truth"), (pred, "predicted")):
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        if len(wrong):
            raise UserError(
                f"a {what} label must be in 0..{num_classes - 1}, but one is {wrong[0]}: check the class set"
            )
    return np.bincount(true * num_classes + pred, minlength=num_classes**2).reshape(num_classes, num_classes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _count_on_device(
    labels_true: Integer[Array, "*shape"], labels_pred: Integer[Array, "*shape"], num_classes: int, ignore: int | None
) -> Integer[Array, "C C"]:
    if labels_true.size >= 2**31 or num_classes**2 >= 2**31:
        raise ValueError(f"one call counts fewer than 2^31 pixels and pairs, got {labels_true.size} pixels")
    true, pred = labels_true.astype(jnp.int32).ravel(), labels_pred.astype(jnp.int32).ravel()
    counted = (true >= 0) & (true < num_classes) & (pred >= 0) & (pred < num_classes)
    if ignore is not None:
        counted &= true != ignore
    pair = jnp.where(counted, true * num_classes + pred, num_classes**2)
    counts = jnp.zeros(num_classes**2, jnp.int32).at[pair].add(1, mode="drop")
    return counts.reshape(num_classes, num_classes)


def mean_iou(confusion: Integer[Array | np.ndarray, "C C"]) -> MeanIoU:
    """IoU_c = n_cc / (Σ_j n_cj + Σ_i n_ic − n_cc); classes absent from both sides are NaN and left out of the mean."""
    xp = _namespace(confusion)
    hit = xp.diagonal(confusion)
    return MeanIoU(*_ratios(hit, confusion.sum(1) + confusion.sum(0) - hit))


def mean_accuracy(confusion: Integer[Array | np.ndarray, "C C"]) -> MeanAccuracy:
    """n_cc / Σ_j n_cj for each class, and the mean over the classes that the ground truth holds."""
    return MeanAccuracy(*_ratios(_namespace(confusion).diagonal(confusion), confusion.sum(1)))


def pixel_accuracy(confusion: Integer[Array | np.ndarray, "C C"]) -> Float[Array | np.ndarray, ""]:
    """The fraction of counted pixels that are right, in 0..1; NaN when there are none."""
    xp = _namespace(confusion)
    return _ratios(xp.trace(confusion)[None], confusion.sum()[None])[1]


def seen_unseen_harmonic(confusion: Integer[Array | np.ndarray, "C C"], unseen: Sequence[int]) -> ZeroShotScores:
    """Mean IoU of the seen and of the unseen classes, and their harmonic mean (0 when both are 0).

    IoU is computed over all classes together, so a seen class that swallows an unseen one pays for it.

    Args:
      confusion: over seen and unseen classes.
      unseen: indices of the unseen classes.

    Raises:
      UserError: an index is out of range or given twice, or one of the two groups is empty.
    """
    classes = len(confusion)
    chosen = sorted(set(unseen))
    if len(chosen) != len(unseen) or not 0 < len(chosen) < classes or chosen[0] < 0 or chosen[-1] >= classes:
        raise UserError(
            f"unseen classes are some, not all, of 0..{classes - 1}, each once, got {list(unseen)}: correct them"
        )
    per_class = np.asarray(mean_iou(np.asarray(confusion)).per_class)
    is_unseen = np.isin(np.arange(classes), chosen)
    seen_score, unseen_score = _mean(per_class[~is_unseen]), _mean(per_class[is_unseen])
    total = seen_score + unseen_score
    harmonic = 0.0 if total == 0 else 2 * seen_score * unseen_score / total
    return ZeroShotScores(seen_score, unseen_score, harmonic)


def _namespace(array):
    return jnp if isinstance(array, jax.Array) else np


def _ratios(part, whole):
    """part / whole with NaN for 0 / 0, and the mean of the rest; no warnings, also under jit."""
    xp = _namespace(part)
    present = whole > 0
    ratio = xp.where(present, part / xp.maximum(whole, 1), xp.nan)
    count = present.sum()
    total = xp.where(present, ratio, 0.0).sum()
    return ratio, xp.where(count > 0, total / xp.maximum(count, 1), xp.nan)


def _mean(values: Float[np.ndarray, " n"]) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
