"""Where each pixel's label comes from (paper, section 3.3): annotation, teacher or student. Pure functions.

On the host, `training_annotation` removes what is hidden from training and `check_no_leak` checks that. On the
device, pixels marked `UNLABELLED` (254) get the best of the candidate classes: by the teacher's scores in phase 1
(MaskCLIP-guided learning), by the student's own in phase 2 (self-training). `IGNORE` (255) stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Int32, Integer

from maskclip_jax.data.augment import UNLABELLED
from maskclip_jax.data.images import IGNORE
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.errors import UserError
from maskclip_jax.segment.refine import Scale, Scores, to_probabilities


def training_annotation(
    annotation: Integer[np.ndarray, "*shape"], config: DistillConfig
) -> Int32[np.ndarray, "*shape"]:
    """The part of an annotation that training uses (labels of `config.label_names`, 255 where there is none).

    annotation-free, feature: nothing (`foreground="none"`: all 254), or which pixels are of some class ("annotation":
    254 there, background and 255 as they are); zero-shot: unseen classes become 254; finetuned-clip: 255; supervised:
    all of it. Padding of the augmented crop is 255 and comes later.
    """
    labels = annotation.astype(np.int32)
    if config.mode in ("annotation-free", "feature"):
        if config.foreground == "none":
            return np.full_like(labels, UNLABELLED)
        return np.where(np.isin(labels, config.candidates), UNLABELLED, labels)
    if config.mode == "supervised":
        return labels
    hidden = UNLABELLED if config.mode == "zero-shot" else IGNORE
    return np.where(np.isin(labels, config.unseen_labels), hidden, labels)


def check_no_leak(labels: Integer[np.ndarray, "*shape"], config: DistillConfig) -> None:
    """Raises UserError where a training annotation holds a class that has none (host side, before the step).

    Those are the unseen classes of zero-shot and finetuned-clip, and every named class of the annotation-free modes.
    """
    if config.mode == "supervised":
        return
    counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)
    if forbidden := [label for label in forbidden_labels(config) if counts[label]]:
        names = ", ".join(config.label_names[label] for label in forbidden)
        raise UserError(
            f"refuse to train: the annotation must not hold classes without annotation ({config.mode}), but it holds "
            f"{names}: mark their pixels {UNLABELLED} (training_annotation does)"
        )


def forbidden_labels(config: DistillConfig) -> tuple[int, ...]:
    """Label values that no training annotation of this mode may hold."""
    if config.mode == "supervised":
        return ()
    return config.unseen_labels if config.mode in ("zero-shot", "finetuned-clip") else config.candidates


def leaked_pixels(annotation: Int[Array, "B H W"], config: DistillConfig) -> Float[Array, ""]:
    """How many pixels have a label they must not have (traced; the loop stops when it is not 0)."""
    forbidden = jnp.asarray(forbidden_labels(config), jnp.int32)
    return jnp.isin(annotation, forbidden).sum().astype(jnp.float32)


def best_candidate(
    scores: Scores,
    candidates: Sequence[int],
    *,
    scale: Scale = 1.0,
    threshold: ArrayLike | None = None,
) -> Int[Array, "B H W"]:
    """Scores of the candidate classes alone -> the best one's label, or 255 where it is less probable than `threshold`.

    Args:
      scores: of every pixel and candidate, values [B, H, W, K]; other classes do not compete: neither background nor
        seen classes result.
      candidates: label values of the K scores.
      scale: of the softmax of logits (`to_probabilities`); only `threshold` needs it.
    """
    labels = jnp.asarray(candidates, jnp.int32)[scores.values.argmax(axis=-1)]
    if threshold is None:
        return labels
    confidence = to_probabilities(scores, scale).max(axis=-1)
    return jnp.where(confidence < threshold, IGNORE, labels)


def fill_unlabelled(annotation: Int[Array, "B H W"], pseudo: Int[Array, "B H W"]) -> Int[Array, "B H W"]:
    """The pseudo label where nothing is annotated; annotated and ignored pixels keep what they have."""
    return jnp.where(annotation == UNLABELLED, pseudo, annotation)


def is_guided(step: Int[ArrayLike, ""], config: DistillConfig) -> Bool[ArrayLike, ""]:
    """Phase 1 at this optimiser step (counted from 0): the teacher labels; else the student does."""
    return jnp.asarray(step) < config.guided_steps if config.self_training else jnp.asarray(True)
