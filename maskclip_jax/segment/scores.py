"""Pure functions: images and a classifier -> dense logits, refined scores, probabilities; for `jit`, `vmap`, `grad`.

Everything an image needs is in the arguments; nothing is read from disk, kept, or compiled here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.encoders.config import CLIPConfig, Fidelity
from maskclip_jax.encoders.dense import MASKCLIP, DenseMethod
from maskclip_jax.encoders.layers import valid_mask
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.segment.refine import Arrays, class_confidence, drop_classes, key_smoothing


class DenseLogits(NamedTuple):
    """Cosines of every position with every class, and the keys that smoothing wants."""

    logits: Float[Array, "B h w C"]
    keys: Float[Array, "B L D"]


def dense_logits(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
) -> DenseLogits:
    """MaskCLIP (paper, equation 4): the text classifier applied to the value features of every position.

    Args:
      model, variables: as in `Pretrained`.
      images: normalised, sides multiples of `config.multiple`.
      classifier: unit vectors, as `text_classifier` makes them. Logits are differentiable in them.
      grid: valid rows and columns of each image inside a padded batch, in units of `config.multiple` (`encode_dense`).
      method: how the last blocks are read (`maskclip_jax.encoders.dense.METHODS`).
    """
    images, grid = jnp.asarray(images), None if grid is None else jnp.asarray(grid)
    reading = dataclasses.asdict(method)
    features, keys = model.apply(variables, images, grid=grid, method="encode_dense", **reading)
    return DenseLogits(jnp.einsum("bhwe,ce->bhwc", features, classifier, precision="highest"), keys)


def probability_scale(model: CLIP, variables: Any) -> ArrayLike:
    """What logits are multiplied by before the softmax: the model's own scale, or the fidelity's constant."""
    fixed = model.config.fidelity.probability_scale
    return jnp.exp(variables["params"]["logit_scale"]) if fixed is None else fixed


def predict_scores(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
    denoising: ArrayLike | None = None,
    smoothing: ArrayLike | None = None,
) -> Float[Array, "B h w C"]:
    """What is upsampled and whose largest entry is the answer: logits, or with smoothing, smoothed probabilities.

    Args:
      denoising: threshold of `prompt_denoising`, may be traced; None is off.
      smoothing: threshold of `key_smoothing`, may be traced; None is off.
      The others are those of `dense_logits`; the habits are those of `model.config.fidelity`.
    """
    logits, keys = dense_logits(model, variables, images, classifier, grid=grid, method=method)
    scale = probability_scale(model, variables)
    flat, valid = (
        logits.reshape(logits.shape[0], -1, logits.shape[-1]),
        flat_mask(grid, logits.shape[1:3], model.config),
    )
    confidence = None if denoising is None else class_confidence(flat, scale=scale, valid=valid)
    flat = refined(flat, keys, confidence, model.config.fidelity, scale, denoising, smoothing, valid)
    return flat.reshape(logits.shape)


def refined(
    logits: Float[Array, "B L C"],
    keys: Float[Array, "B L D"] | None,
    confidence: Float[Array, "B C"] | None,
    fidelity: Fidelity,
    scale: ArrayLike,
    denoising: ArrayLike | None,
    smoothing: ArrayLike | None,
    valid: Bool[Array, "B L"] | None,
) -> Float[Array, "B L C"]:
    """Denoised, then smoothed (docs/method.md, section 3): logits, or with smoothing, smoothed probabilities.

    `confidence` is that of `class_confidence`, over whatever counts as one image; only denoising needs it, and only
    smoothing needs `keys`.
    """
    if denoising is not None:
        logits = drop_classes(logits, confidence, threshold=denoising, all_denoised=fidelity.all_denoised)
    if smoothing is None:
        return logits
    p = jax.nn.softmax(scale * logits, axis=-1)
    return key_smoothing(p, keys, threshold=smoothing, normalize=fidelity.key_normalization, valid=valid)


def predict_probabilities(
    model: CLIP,
    variables: Any,
    images: Float[Arrays, "B H W 3"],
    classifier: Float[Arrays, "C E"],
    *,
    grid: Int[Arrays, "B 2"] | None = None,
    method: DenseMethod = MASKCLIP,
    denoising: ArrayLike | None = None,
    smoothing: ArrayLike | None = None,
) -> Float[Array, "B h w C"]:
    """`predict_scores` as probabilities that sum to one at every position of the grid."""
    scores = predict_scores(
        model,
        variables,
        images,
        classifier,
        grid=grid,
        method=method,
        denoising=denoising,
        smoothing=smoothing,
    )
    return to_probabilities(scores, probability_scale(model, variables), smoothed=smoothing is not None)


def to_probabilities(scores: Float[Array, "*b C"], scale: ArrayLike, *, smoothed: bool) -> Float[Array, "*b C"]:
    """Scores -> probabilities: a softmax of logits; smoothed probabilities, cosines being what they are, are clipped at
    zero and divided by their sum (all alike where nothing is left)."""
    if not smoothed:
        return jax.nn.softmax(scale * scores, axis=-1)
    positive = jnp.maximum(scores, 0)
    total = positive.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1), 1 / scores.shape[-1])


def flat_mask(grid: Int[Arrays, "B 2"] | None, shape: tuple[int, int], config: CLIPConfig) -> Bool[Array, "B L"] | None:
    """True at the positions (flattened, of a feature grid of this shape) that hold image; None when all do."""
    mask = valid_mask(None if grid is None else config.cells(grid), shape)
    return None if mask is None else mask.reshape(mask.shape[0], -1)
