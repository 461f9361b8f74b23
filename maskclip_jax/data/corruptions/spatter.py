"""Spatter (ImageNet-C): drops of water, levels 1 to 3, or of mud, levels 4 and 5, on the lens.

Drops are where smoothed noise is high. Mud covers; water shines by its depth, seen as the distance to the drop's rim
(a Canny edge), equalised and lit from one corner: OpenCV's steps, written as array operations for `jit` and `vmap`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maskclip_jax.data.corruptions.filters import filtered, gaussian, shifted

# Level: mean and deviation of the noise, its smoothing in px, the drops' threshold, and water's opacity or mud's
# smoothing in px.
STRENGTHS = (
    (0.65, 0.3, 4.0, 0.69, 0.6),
    (0.65, 0.3, 3.0, 0.68, 0.6),
    (0.65, 0.3, 2.0, 0.68, 0.5),
    (0.65, 0.3, 1.0, 0.65, 1.5),
    (0.67, 0.4, 1.0, 0.65, 1.5),
)
_WATER = np.array([175, 238, 238], np.float32) / 255  # pale turquoise
_MUD = np.array([63, 42, 20], np.float32) / 255
_FARTHEST = 20.0  # px from a rim: deeper is not darker
_WEAK, _STRONG = 50.0, 150.0  # Canny's thresholds
_BOX = np.full((3, 3), 1 / 9, np.float32)
_LIGHT = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)


def spatter(x: Float[Array, "H W 3"], level: Array, normal: Float[Array, "H W"]) -> Float[Array, "H W 3"]:
    """An image in 0..1 with drops; `normal` is standard Gaussian noise, all the chance there is."""
    mean, deviation, smoothing, threshold, last = jnp.asarray(STRENGTHS, jnp.float32)[level - 1]
    liquid = gaussian(mean + deviation * normal, smoothing, max(strength[2] for strength in STRENGTHS))
    liquid = jnp.where(liquid < threshold, 0.0, liquid)
    muddy = level >= 4
    return jax.lax.cond(muddy, lambda: _mud(x, liquid > threshold), lambda: _water(x, liquid, last))


def _mud(x: Float[Array, "H W 3"], drops: Bool[Array, "H W"]) -> Float[Array, "H W 3"]:
    cover = gaussian(drops.astype(jnp.float32), 1.5, 1.5)[..., None]
    cover = jnp.where(cover < 0.8, 0.0, cover)
    return x * (1 - cover) + _MUD * cover


def _water(x: Float[Array, "H W 3"], liquid: Float[Array, "H W"], opacity: Array) -> Float[Array, "H W 3"]:
    depth = jnp.floor(liquid * 255)
    distance = jnp.minimum(_distance(_canny(depth)), _FARTHEST)
    shade = _equalised(jnp.floor(filtered(distance, _BOX)))
    shade = jnp.clip(filtered(shade, _LIGHT), 0, 255)
    shine = depth * jnp.round(filtered(shade, _BOX))
    shine = opacity * shine / jnp.maximum(shine.max(), 1e-12)
    return x + shine[..., None] * _WATER


def _canny(plane: Float[Array, "H W"]) -> Bool[Array, "H W"]:
    """Canny's edges: ridges of the Sobel gradient (|dx| + |dy|) above `_WEAK` that hang together with one above
    `_STRONG`."""
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    dx, dy = filtered(plane, sobel, "edge"), filtered(plane, sobel.T, "edge")
    size = jnp.abs(dx) + jnp.abs(dy)
    at = lambda r, c: shifted(size, r, c, "constant")  # noqa: E731
    flat, steep = jnp.abs(dy) < 0.41421356 * jnp.abs(dx), jnp.abs(dy) > 2.41421356 * jnp.abs(dx)
    same = (dx >= 0) == (dy >= 0)
    # Of two equal neighbours one is the ridge: hence > on one side and >= on the other, but not on the diagonals.
    ridge = jnp.where(
        flat,
        (size > at(0, -1)) & (size >= at(0, 1)),
        jnp.where(
            steep,
            (size > at(-1, 0)) & (size >= at(1, 0)),
            jnp.where(same, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1))),
        ),
    )
    weak = ridge & (size > _WEAK)

    def grow(state: tuple[Array, Array]) -> tuple[Array, Array]:
        edges, _ = state
        near = jnp.any(jnp.stack([shifted(edges, r, c, "constant") for r in (-1, 0, 1) for c in (-1, 0, 1)]), axis=0)
        grown = edges | (near & weak)
        return grown, (grown != edges).any()

    edges, _ = jax.lax.while_loop(lambda state: state[1], grow, (weak & (size > _STRONG), jnp.asarray(True)))
    return edges


def _distance(edges: Bool[Array, "H W"]) -> Float[Array, "H W"]:
    """Distance to the nearest edge, up to `_FARTHEST`, by steps of a 5×5 mask (Borgefors 1986; OpenCV's weights)."""

    def closer(_: Array, distance: Array) -> Array:
        from_neighbours = [shifted(distance, r, c, "constant", constant_values=1e4) + w for r, c, w in _STEPS]
        return jnp.minimum(distance, jnp.min(jnp.stack(from_neighbours), axis=0))

    return jax.lax.fori_loop(0, int(_FARTHEST) + 1, closer, jnp.where(edges, 0.0, 1e4))


_STEPS = [
    *((r, c, 1.0) for r, c in ((0, 1), (0, -1), (1, 0), (-1, 0))),
    *((r, c, 1.4) for r in (1, -1) for c in (1, -1)),
    *((r, c, 2.1969) for r in (1, -1, 2, -2) for c in (1, -1, 2, -2) if abs(r) != abs(c)),
]


def _equalised(plane: Float[Array, "H W"]) -> Float[Array, "H W"]:
    """Histogram equalisation of whole numbers 0..255: the darkest becomes 0, the brightest 255."""
    values = plane.astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[values.ravel()].add(1)
    first = counts[jnp.argmax(counts > 0)]
    rest = values.size - first
    table = jnp.round((jnp.cumsum(counts) - first) * (255.0 / jnp.maximum(rest, 1)))
    return jnp.where(rest > 0, table[values], plane)
