"""Self-calibrated CLIP (Bai et al., 2024): what it does to tokens in front of, and behind, the last attention.

Anomalous tokens, found as outliers, take their neighbours' mean; what a middle block finds alike is averaged and looks
at one another; the same is done once more with the tokens of many blocks summed. Pure functions of one tower's tokens;
what lies beyond an image in a padded batch (`valid`) lends nothing. Numbers are those of the authors' code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskclip_jax.ops.matmul import alike, in_full_precision, mixed, similarity

NEIGHBOURS, CONTAMINATION = 30, 0.05
ALIKE = 0.4  # cosines below it are none where patches are averaged
CLASS_SHARE = 0.3  # of the class token, added to every patch behind the attention
EARLY, MIDDLE, SUMMED = 4, 9, (4, 5, 6, 7, 8, 9, 10)

Tokens = Float[Array, "B L D"]
Valid = Bool[Array, "B L"] | None


def outliers(tokens: Tokens, valid: Valid = None) -> Bool[Array, "B L"]:
    """Tokens whose local outlier factor is among the largest 5% of their image.

    A token's density is the inverse of the squared distance to its 30th neighbour (fewer in a small image); its factor
    is the mean of its neighbours' densities over its own. Flags have no gradient.
    """
    x = jax.lax.stop_gradient(in_full_precision(tokens))
    batch, length, _ = x.shape
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    count = valid.sum(axis=1)
    square = jnp.square(x).sum(axis=-1)
    with jax.default_matmul_precision("highest"):
        distances = square[:, :, None] + square[:, None] - 2 * jnp.einsum("bld,bmd->blm", x, x)
    far = ~valid[:, None] | jnp.eye(length, dtype=bool)
    nearest, index = jax.lax.top_k(-jnp.where(far, jnp.inf, jnp.maximum(distances, 0)), min(NEIGHBOURS, length))
    neighbours = jnp.clip(count - 1, 1, NEIGHBOURS)
    reach = jnp.take_along_axis(-nearest, (neighbours - 1)[:, None, None], axis=2)[..., 0]
    density = 1 / jnp.maximum(reach, jnp.finfo(x.dtype).tiny ** 0.5)
    near = jnp.take_along_axis(density[:, None], index, axis=2)
    ranks = jnp.arange(index.shape[2])
    factor = near.mean(axis=2, where=ranks < neighbours[:, None, None]) / density
    factor = jnp.where(valid, factor, jnp.inf)
    place = (1 - CONTAMINATION) * (count - 1)  # the quantile, interpolated between two of the ordered factors
    below = jnp.floor(place).astype(jnp.int32)
    pair = jnp.stack([below, jnp.minimum(below + 1, jnp.maximum(count - 1, 0))], axis=1)
    low, high = jnp.take_along_axis(jnp.sort(factor, axis=1), pair, axis=1).T
    threshold = low + (place - below) * (high - low)
    return valid & (factor > threshold[:, None])


def replaced(tokens: Tokens, outlier: Bool[Array, "B L"], shape: tuple[int, int], valid: Valid = None) -> Tokens:
    """Outliers as the mean of those of their eight neighbours on the grid that are none; as they are where all are."""
    batch, _, width = tokens.shape
    kept = ~outlier if valid is None else valid & ~outlier
    both = jnp.concatenate([jnp.where(kept[..., None], tokens, 0), kept[..., None].astype(tokens.dtype)], axis=-1)
    grid = jnp.pad(both.reshape(batch, *shape, width + 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    places = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    around = functools.reduce(jnp.add, [grid[:, i : i + shape[0], j : j + shape[1]] for i, j in places])
    around = around.reshape(batch, -1, width + 1)
    total, count = around[..., :-1], around[..., -1:]
    return jnp.where(outlier[..., None] & (count > 0), total / jnp.maximum(count, 1), tokens)


def self_calibrated(
    tokens: Float[Array, "B T D"],
    earlier: Mapping[int, Float[Array, "B T D"]],
    read: Callable[[Tokens, Float[Array, "B L L"]], Tokens],
    shape: tuple[int, int],
    valid: Valid = None,
) -> Tokens:
    """What the last block answers for every patch.

    Args:
      tokens: in front of the last attention, class tokens first.
      earlier: those behind each block of `dense.KEPT`.
      read: the last block's attention, of patches and of what is alike.
      shape: rows and columns of the grid of patches.
      valid: True where a patch is image.
    """
    first = tokens.shape[1] - shape[0] * shape[1]
    outlier = outliers(tokens[:, first:], valid)
    middle = similarity(replaced(earlier[MIDDLE][:, first:], outlier, shape, valid), valid)
    early = alike(similarity(earlier[EARLY][:, first:], valid), ALIKE)

    def answer(patches: Array, class_tokens: Array) -> Array:
        found = read(patches, middle)
        found = found + CLASS_SHARE * class_tokens[:, :1] if first else found
        return mixed(early, found)

    whole = functools.reduce(jnp.add, [earlier[i] for i in SUMMED])
    calm = mixed(alike(middle, ALIKE), replaced(tokens[:, first:], outlier, shape, valid))
    return answer(calm, tokens[:, :first]) + answer(whole[:, first:], whole[:, :first])
