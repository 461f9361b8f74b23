"""Refinement without training: prompt denoising and key smoothing (paper, section 3.3; docs/method.md, section 3).

Pure functions, safe under `jit`, `vmap` and `grad`; thresholds may be traced, so a whole grid of them is one `vmap`.
Where images of different sizes share a padded batch, `valid` says which positions are image.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from maskclip_jax.ops.matmul import in_full_precision

Arrays = Array | np.ndarray
DROPPED = -100.0  # the logit of a denoised class; a cosine is never below -1


def prompt_denoising(
    logits: Float[Arrays, "B L C"],
    *,
    scale: ArrayLike,
    threshold: ArrayLike,
    all_denoised: Literal["keep_best", "drop_all"] = "keep_best",
    valid: Bool[Arrays, "B L"] | None = None,
) -> Float[Array, "B L C"]:
    """Drops every class that no position of its image is confident of: its logits become -100.

    Args:
      logits: cosines of features and classifier.
      scale: the probabilities are `softmax(scale · logits)`.
      threshold: a class is dropped when its largest probability over the image is below this (strictly; paper: 0.5).
      all_denoised: when that would drop every class, keep the most confident one, or drop all (the released code,
        which then answers class 0 everywhere).
      valid: True where a position is image; the others have no say. None: all are.
    """
    confidence = class_confidence(logits, scale=scale, valid=valid)
    return drop_classes(logits, confidence, threshold=threshold, all_denoised=all_denoised)


def class_confidence(
    logits: Float[Arrays, "B L C"], *, scale: ArrayLike, valid: Bool[Arrays, "B L"] | None = None
) -> Float[Array, "B C"]:
    """The largest probability that each class reaches in each image, `max_i softmax(scale · logits)_ic`."""
    probabilities = jax.nn.softmax(scale * in_full_precision(jnp.asarray(logits)), axis=-1)
    if valid is not None:
        probabilities = jnp.where(valid[..., None], probabilities, 0)
    return probabilities.max(axis=1)


def drop_classes(
    logits: Float[Arrays, "B L C"],
    confidence: Float[Arrays, "B C"],
    *,
    threshold: ArrayLike,
    all_denoised: Literal["keep_best", "drop_all"] = "keep_best",
) -> Float[Array, "B L C"]:
    """The second half of `prompt_denoising`, for a confidence that was gathered elsewhere (over several windows)."""
    keep = confidence >= jnp.asarray(threshold, confidence.dtype)
    if all_denoised == "keep_best":
        best = jax.nn.one_hot(confidence.argmax(axis=-1), confidence.shape[-1], dtype=bool)
        keep = jnp.where(keep.any(axis=-1, keepdims=True), keep, best)
    return jnp.where(keep[:, None], logits, DROPPED)


def key_smoothing(
    probabilities: Float[Arrays, "B L C"],
    keys: Float[Arrays, "B L D"],
    *,
    threshold: ArrayLike = 1.0,
    normalize: Literal["channels", "positions"] = "channels",
    valid: Bool[Arrays, "B L"] | None = None,
) -> Float[Array, "B L C"]:
    """`p_i ← Σ_j cos(k_i, k_j) p_j` wherever p_i is not certain. The result does not sum to one (nor need it).

    The sum is linear in p, so `K̂(K̂ᵀP)` is the same as `(K̂K̂ᵀ)P`: whichever takes fewer multiplications by the shapes,
    2·L·D·C or L²(D+C), is computed. In the first order no L×L array exists.

    Args:
      probabilities: after denoising, if any.
      keys: of the last attention layer, as `encode_dense` gives them.
      threshold: positions whose largest probability is below this (strictly) are replaced; at 1.0 these are all but
        those saturated at exactly 1 (`saturated`).
      normalize: keys of unit length over "channels" (D: a cosine) or over "positions" (L: the released code).
      valid: True where a position is image; the others lend nothing to it. None: all are.
    """
    p, k = in_full_precision(jnp.asarray(probabilities)), in_full_precision(jnp.asarray(keys))
    source = p
    if valid is not None:
        source, k = (jnp.where(valid[..., None], x, 0) for x in (p, k))
    axis = -1 if normalize == "channels" else 1
    # rsqrt of a floored square, not a norm: it has a gradient at zero, where padding is
    k = k * jax.lax.rsqrt(jnp.maximum(jnp.square(k).sum(axis=axis, keepdims=True), 1e-24))
    _, length, width = k.shape
    classes = p.shape[-1]
    with jax.default_matmul_precision("highest"):
        if 2 * width * classes <= length * (width + classes):
            mixed = jnp.einsum("bld,bdc->blc", k, jnp.einsum("bld,blc->bdc", k, source))
        else:
            mixed = jnp.einsum("blm,bmc->blc", jnp.einsum("bld,bmd->blm", k, k), source)
    threshold = jnp.asarray(threshold, p.dtype)
    uncertain = jnp.where(threshold < 1, p.max(axis=-1, keepdims=True) < threshold, ~saturated(p)[..., None])
    return jnp.where(uncertain, mixed, p)


def saturated(probabilities: Float[Arrays, "*b C"]) -> Bool[Array, "*b"]:
    """Where the largest probability is exactly 1 in a softmax that adds its exponentials class by class.

    The released code's does so; asking `p == 1` would leave it to each processor's order of addition.

    The largest exponential is 1, so that its sum with what came before rounds to 1 up to half an epsilon, and each that
    follows is lost by itself up to that.
    """
    p = jnp.asarray(probabilities)
    best, place = p.argmax(axis=-1, keepdims=True), jnp.arange(p.shape[-1])
    exponential = p / p.max(axis=-1, keepdims=True)
    before = jnp.where(place < best, exponential, 0).sum(axis=-1)
    after = jnp.where(place > best, exponential, 0).max(axis=-1)
    return jnp.maximum(before, after) <= jnp.finfo(p.dtype).eps / 2
