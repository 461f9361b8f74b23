"""Small image filters as pure functions of traced arguments: a Gaussian of any width, shifts, 3×3 kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

_TRUNCATE = 4.0  # deviations after which a Gaussian ends


def gaussian(x: Float[Array, "H W *C"], sigma: ArrayLike, largest: float) -> Float[Array, "H W *C"]:
    """Smooths by σ pixels; the Gaussian ends after 4σ, the border is repeated.

    Args:
      sigma: may be traced.
      largest: the largest σ that comes, a plain number: it decides the size of the arrays.
    """
    reach = int(_TRUNCATE * largest + 0.5)
    offsets = np.arange(-reach, reach + 1)
    inside = np.abs(offsets) <= jnp.floor(_TRUNCATE * jnp.asarray(sigma) + 0.5)
    weights = jnp.where(inside, jnp.exp(-0.5 * (offsets / sigma) ** 2), 0.0)
    weights = weights / weights.sum()
    for axis in (0, 1):
        size = x.shape[axis]
        # As a matrix: what reaches over the border falls on the border's own pixel.
        at = np.clip(np.arange(size)[:, None] + offsets, 0, size - 1)
        matrix = jnp.zeros((size, size)).at[np.arange(size)[:, None], at].add(weights[None])
        x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis), precision="highest"), 0, axis)
    return x


def shifted(
    plane: Shaped[Array, "H W"], rows: int, columns: int, mode: str = "reflect", **fill: float
) -> Shaped[Array, "H W"]:
    """`out[y, x] = plane[y + rows, x + columns]`; `mode` and `fill` are `numpy.pad`'s."""
    r, c = abs(rows), abs(columns)
    padded = jnp.pad(plane, ((r, r), (c, c)), mode=mode, **fill)
    height, width = plane.shape
    return padded[r + rows : r + rows + height, c + columns : c + columns + width]


def filtered(plane: Float[Array, "H W"], kernel: np.ndarray, mode: str = "reflect") -> Float[Array, "H W"]:
    """Correlation with a 3×3 kernel."""
    return sum(float(kernel[i, j]) * shifted(plane, i - 1, j - 1, mode) for i in range(3) for j in range(3))
