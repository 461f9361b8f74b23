"""Losses as a sum and a count, so that a mean over devices and micro-batches is exactly that of one large batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.data.augment import UNLABELLED
from maskclip_jax.data.images import IGNORE
from maskclip_jax.ops.matmul import in_full_precision


class LossSum(NamedTuple):
    """The loss is total / count, each summed over everything first."""

    total: Float[Array, ""]
    count: Float[Array, ""]


def has_loss(labels: Int[Array, "B H W"]) -> Bool[Array, "B H W"]:
    """Pixels with a class; neither ignored (255) nor left without one (254)."""
    return (labels != IGNORE) & (labels != UNLABELLED)


def cross_entropy(
    logits: Float[Array, "B H W C"], labels: Int[Array, "B H W"], mean: Literal["labelled", "all"] = "labelled"
) -> LossSum:
    """Cross-entropy of every pixel's softmax.

    Args:
      logits: at label size (upsampled).
      labels: 0..C-1; 254 and 255 have no loss.
      mean: over the "labelled" pixels, or over "all" as in the released code: the fewer labels, the smaller its loss.
    """
    counted = has_loss(labels)
    # A sum over a one-hot rather than a gather: the gradient of a gather is a scatter, slow everywhere.
    chosen = jnp.where(labels[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    count = counted.sum() if mean == "labelled" else jnp.asarray(labels.size)
    return LossSum(jnp.where(counted, losses, 0).sum(), count.astype(jnp.float32))


def feature_l1(
    features: Float[Array, "B h w E"], target: Float[Array, "B h w E"], valid: Bool[Array, "B h w"]
) -> LossSum:
    """`|features − target|`, averaged over E, of every valid position (feature distillation).

    Gradients reach `features` alone. In the released code these were detached, so that the loss trained nothing.
    """
    difference = jnp.abs(in_full_precision(features) - jax.lax.stop_gradient(target)).mean(axis=-1)
    return LossSum(jnp.where(valid, difference, 0).sum(), valid.sum().astype(jnp.float32))


def valid_positions(labels: Int[Array, "B H W"], shape: tuple[int, int]) -> Bool[Array, "B h w"]:
    """Which positions of a coarser grid lie on the image: those whose centre pixel is not ignored."""
    rows, columns = (
        ((jnp.arange(n) + 0.5) * size / n).astype(jnp.int32) for n, size in zip(shape, labels.shape[1:], strict=True)
    )
    return labels[:, rows][:, :, columns] != IGNORE
