"""LPOSS: scores that spread over a graph of patches, and LPOSS+ over one of pixels (Stojnić et al., CVPR 2025).

Both solve `(I − α D^-½ W D^-½) Ŷ = Y` for every class by itself, by ten steps of conjugate gradients as the authors'
code does. W joins each patch to those that are most like it to a second backbone (`affinity.py`), and each pixel to
those around it by their colours. Between patches W is a matrix [L, L], one head's share of what an attention layer
takes; pixels have `(2 radius + 1)²` weights each, so that memory grows linearly with them.

Pure functions, safe under `jit`, `vmap` and `grad` (the gradient is that of the solution: it is as exact as that is).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import in_full_precision
from maskclip_jax.segment.affinity import grid_similarity

Arrays = Array | np.ndarray
_CLASSES = 8  # solved for together, over pixels: more would leave a CPU's cache
# From linear sRGB to XYZ under D65 (IEC 61966-2-1), and the white point.
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])
_LAB_RANGE = np.array([100.0, 128.0, 128.0])


@functools.partial(jax.jit, static_argnames=("neighbours", "iterations", "tolerance"))
def lposs(
    scores: Float[Arrays, "B h w C"],
    tokens: Float[Arrays, "B h w D"],
    grid: Int[Arrays, "B 2"] | None = None,
    *,
    cell: ArrayLike = 16,
    alpha: ArrayLike = 0.95,
    neighbours: int = 400,
    gamma: ArrayLike = 3.0,
    sigma: ArrayLike = 0.01,
    power: ArrayLike = 1.0,
    iterations: int = 10,
    tolerance: float = 1e-6,
) -> Float[Array, "B h w C"]:
    """LPOSS: `W_ij = S_ij^γ exp(−σ ‖x_i − x_j‖^power)` where j is one of i's nearest by S, plus the same
    from j to i; nothing from i to itself, nothing negative.

    Args:
      scores: cosines with the classes, at best.
      tokens: the backbone's patches, on the same grid.
      grid: valid rows and columns of each image; None: all are.
      cell: pixels from one patch to the next, in which `sigma` counts.
      neighbours: how many of each patch's nearest are kept, itself among them (in a tie with the last, all that tie).
      iterations, tolerance: of conjugate gradients; it stops at this share of ‖Y‖.
      The others are the paper's, and may be traced.

    Returns:
      (1 − α) Ŷ, a mean of scores roughly, and what patches without neighbours had. No mask depends on the factor.

    Raises:
      UserError: fewer than one neighbour.
    """
    batch, h, w, classes = scores.shape
    if neighbours < 1:
        raise UserError(f"each patch keeps itself and its nearest, got {neighbours} neighbours: give 1 or more")
    s, valid = grid_similarity(tokens, grid)
    apart = _distances((h, w), s.dtype) * cell
    kept = jnp.where(valid[:, None], s, -jnp.inf)
    least = jax.lax.top_k(kept, min(neighbours, h * w))[0][..., -1:]
    weight = _power(jnp.maximum(s, 0), gamma) * jnp.exp(-jnp.asarray(sigma, s.dtype) * _power(apart, power))
    weight = jnp.where(~(kept < least) & valid[..., None] & ~jnp.eye(h * w, dtype=bool), weight, 0)
    weight = weight + weight.swapaxes(1, 2)

    def image(weight: Array, y: Array) -> Array:
        def spread(x: Array) -> Array:
            return jnp.matmul(weight, x, precision="highest")

        return _propagated(spread, y, weight.sum(axis=1), alpha, iterations, tolerance)

    y = jnp.where(valid[..., None], in_full_precision(jnp.asarray(scores)).reshape(batch, h * w, classes), 0)
    return jax.vmap(image)(weight, y.swapaxes(1, 2)).swapaxes(1, 2).reshape(scores.shape)


@functools.partial(jax.jit, static_argnames=("radius", "iterations", "tolerance"))
def lposs_pixels(
    scores: Float[Arrays, "H W C"],
    image: Float[Arrays, "H W 3"],
    *,
    alpha: ArrayLike = 0.95,
    tau: ArrayLike = 0.01,
    radius: int = 6,
    iterations: int = 10,
    tolerance: float = 1e-6,
    size: Int[Arrays, " 2"] | None = None,
) -> Float[Array, "H W C"]:
    """LPOSS+: scores of pixels, spread by `W_ij = exp(−‖c_i − c_j‖ / τ)` to those within `radius` along both axes.

    Colours c are CIELAB, divided by (100, 128, 128).

    Args:
      scores: of every pixel; classes do not mix.
      image: sRGB colours of the same pixels, 0..1.
      size: rows and columns that are image, where arrays are padded.
      The others are the paper's (r = 13 is a radius of 6), and as in `lposs`, whose factor comes out here too.

    Memory: 4 (2 radius + 1)² bytes a pixel for the weights, 127 MB at 500 × 375, and some ten copies of eight classes.
    """
    height, width, _ = scores.shape
    inside = jnp.ones((height, width), bool)
    if size is not None:
        inside = (jnp.arange(height)[:, None] < size[0]) & (jnp.arange(width) < size[1])
    colours = lab(image)
    weights = _colour_weights(colours, inside, tau, radius)
    spread = functools.partial(_spread_over_pixels, weights, radius)
    degree = weights.sum(axis=(0, 1))

    def one_class(y: Array) -> Array:
        return _propagated(spread, y[None], degree, alpha, iterations, tolerance)[0]

    y = jnp.where(inside[..., None], in_full_precision(jnp.asarray(scores)), 0)
    return jnp.moveaxis(jax.lax.map(one_class, jnp.moveaxis(y, -1, 0), batch_size=_CLASSES), 0, -1)


def lab(image: Float[Arrays, "*b 3"]) -> Float[Array, "*b 3"]:
    """CIELAB under D65 of sRGB colours in 0..1, divided by (100, 128, 128)."""
    rgb = in_full_precision(jnp.asarray(image))
    linear = jnp.where(rgb > 0.04045, _power((jnp.maximum(rgb, 0.04045) + 0.055) / 1.055, 2.4), rgb / 12.92)
    xyz = jnp.einsum("...c,xc->...x", linear, (_XYZ / _WHITE[:, None]).astype(linear.dtype), precision="highest")
    f = jnp.where(xyz > 0.008856, jnp.cbrt(jnp.maximum(xyz, 0.008856)), 7.787 * xyz + 4 / 29)
    x, y, z = jnp.moveaxis(f, -1, 0)
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1) / _LAB_RANGE.astype(f.dtype)


def _propagated(
    spread: Callable[[Array], Array],
    y: Float[Array, " C *n"],
    degree: Float[Array, " *n"],
    alpha: ArrayLike,
    iterations: int,
    tolerance: float,
) -> Float[Array, " C *n"]:
    """`(1 − α) (I − α D^-½ W D^-½)^-1 y` of every class; `spread` multiplies one class's nodes by W."""
    alone = degree <= float(jnp.finfo(degree.dtype).tiny) ** 0.6  # of less the root's gradient would overflow
    root = jnp.where(alone, 1, jax.lax.rsqrt(jnp.where(alone, 1, degree)))
    sound = jnp.isfinite(root).all()

    def laplacian(x: Array) -> Array:
        return x - alpha * root * spread(root * x)

    def solve(y: Array) -> Array:
        # cg squares y, and gives 0 where the squares vanish, or are no numbers
        most = jax.lax.stop_gradient(jnp.abs(y).max(initial=0))
        most = jnp.where(sound, jnp.where(most == 0, 1, most), jnp.nan)
        return cg(laplacian, y / most, tol=tolerance, maxiter=iterations)[0] * most

    return jax.vmap(solve)(y.astype(jnp.result_type(y, degree))) * jnp.where(alone, 1, 1 - alpha)


def _colour_weights(colours: Array, inside: Array, tau: ArrayLike, radius: int) -> Float[Array, "k k H W"]:
    """Of every pixel (last two axes) to each one around it; 0 to itself, and from and to what is no image."""
    side = 2 * radius + 1
    pad = [(radius, radius)] * 2
    around, there = jnp.pad(colours, (*pad, (0, 0))), jnp.pad(inside, pad)

    def offset(index: Array) -> Array:
        dy, dx = index // side, index % side
        other = jax.lax.dynamic_slice(around, (dy, dx, 0), colours.shape)
        exists = jax.lax.dynamic_slice(there, (dy, dx), inside.shape) & inside & (index != side**2 // 2)
        squared = jnp.square(colours - other).sum(axis=-1)
        return jnp.where(exists, jnp.exp(-_power(squared, 0.5) / tau), 0)

    return jax.lax.map(offset, jnp.arange(side**2)).reshape(side, side, *inside.shape)


def _spread_over_pixels(weights: Float[Array, "k k H W"], radius: int, x: Float[Array, "H W"]) -> Float[Array, "H W"]:
    """W x: a row of neighbours at a time, each neighbour a slice."""
    height, width = x.shape
    around = jnp.pad(x, radius)

    def row(dy: ArrayLike, total: Array) -> Array:
        strip = jax.lax.dynamic_slice(around, (dy, 0), (height, width + 2 * radius))
        w = jax.lax.dynamic_index_in_dim(weights, dy, keepdims=False)
        return total + sum(w[dx] * strip[:, dx : dx + width] for dx in range(2 * radius + 1))

    return jax.lax.fori_loop(0, 2 * radius + 1, row, jnp.zeros_like(x))


def _distances(shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "L L"]:
    """Between the cells of a grid, in cells. Made where it is used: as a constant it would be part of the program."""
    y, x = (jnp.square(jnp.arange(n)[:, None] - jnp.arange(n)).astype(dtype) for n in shape)
    return jnp.sqrt(y[:, None, :, None] + x[:, None]).reshape(2 * (shape[0] * shape[1],))


def _power(x: Array, exponent: ArrayLike) -> Array:
    """x^exponent of what is not negative, with a gradient at zero: 0, whatever the exponent. NaN stays."""
    return jnp.where(x <= 0, 0, jnp.where(x <= 0, 1, x) ** exponent)
