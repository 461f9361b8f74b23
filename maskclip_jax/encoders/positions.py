"""Where a token stands: position embeddings at other sizes, sinusoids, and which tokens are image at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float64, Int

from maskclip_jax.ops.matmul import full_precision


def resize_positions(
    table: Float[Array, "n D"],
    trained: int,
    grid: Int[Array, "B 2"] | None,
    shape: tuple[int, int],
    position_filter: str = "bicubic",
) -> Float[Array, "#B h w D"]:
    """Position embeddings of a `trained × trained` grid at another size, by a filter of `ViTConfig.position_filter`.

    The interpolation is separable and linear, so two small matrices do it. They are made from `grid`, the *traced*
    valid size `(h, w)` of every image inside a padded batch of static `shape`: one compiled program serves them all.
    Beyond an image's valid size the result is meaningless (those tokens are masked).
    """
    h, w = shape
    grid = jnp.asarray([[h, w]] if grid is None else grid, full_precision(table.dtype))
    matrix = {"bicubic": cubic_matrix, "bicubic_antialias": keys_matrix, "bilinear": linear_matrix}[position_filter]
    rows = jax.vmap(lambda n: matrix(trained, n, h))(grid[:, 0])
    columns = jax.vmap(lambda n: matrix(trained, n, w))(grid[:, 1])
    square = table.reshape(trained, trained, -1)
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("bhi,bwj,ijd->bhwd", rows, columns, square)


def cubic_matrix(n_in: int, n_out: Float[Array, ""], rows: int) -> Float[Array, "rows n_in"]:
    """`rows` rows of the matrix that interpolates `n_in` samples at `n_out` centres, as `F.interpolate(bicubic)` does:
    a = -0.75, no antialias.

    `maskclip_jax.data.preprocess.interpolation_matrix` makes the same matrix on the host; here `n_out` is traced.
    """
    x = (jnp.arange(rows) + 0.5) * (n_in / n_out) - 0.5
    base = jnp.floor(x)
    matrix = jnp.zeros((rows, n_in))
    for tap in (-1, 0, 1, 2):
        source = jnp.clip(base + tap, 0, n_in - 1).astype(jnp.int32)
        matrix += _keys(jnp.abs(x - (base + tap)), -0.75)[:, None] * jax.nn.one_hot(source, n_in)
    return matrix


def linear_matrix(n_in: ArrayLike, n_out: Array, rows: int, cells: int | None = None) -> Float[Array, "rows cells"]:
    """The same as `jax.image.resize(…, "bilinear")` does it: a triangle. `n_in` may be traced, of `cells` there are."""
    return _antialiased(lambda d: jnp.maximum(1 - d, 0), n_in, n_out, rows, cells)


def keys_matrix(n_in: int, n_out: Float[Array, ""], rows: int) -> Float[Array, "rows n_in"]:
    """What `F.interpolate(bicubic, antialias=True)` and `jax.image.resize(…, "bicubic")` do: Keys' cubic, a = -0.5."""
    return _antialiased(lambda d: _keys(d, -0.5), n_in, n_out, rows)


def _keys(d: Array, a: float) -> Array:
    """Keys' cubic convolution kernel (1981) at distances from 0 on."""
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, a * (((d - 5) * d + 8) * d - 4)
    return jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))


def _antialiased(
    kernel: Callable[[Array], Array], n_in: ArrayLike, n_out: Array, rows: int, cells: int | None = None
) -> Float[Array, "rows cells"]:
    """A filter that is widened where it shrinks, and renormalised at the border; with `cells`, `n_in` may be traced."""
    x, places = (jnp.arange(rows) + 0.5) * (n_in / n_out) - 0.5, jnp.arange(n_in if cells is None else cells)
    weight = kernel(jnp.abs(x[:, None] - places) / jnp.maximum(n_in / n_out, 1))
    weight = weight if cells is None else jnp.where(places < n_in, weight, 0)
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(jnp.abs(total) < 1e-6, 1, total)  # no weight at all: a row beyond the image


class Rotation(NamedTuple):
    """Cosines and sines that queries and keys are turned by (RoPE; Su et al., 2021): [B or 1, T, 1, d] each."""

    cos: Float[Array, "#B T 1 d"]
    sin: Float[Array, "#B T 1 d"]


def axial_rotation(
    grid: Int[Array, "B 2"] | None, shape: tuple[int, int], first: int, width: int, period: float
) -> Rotation:
    """DINOv3's: patches by their row and column in -1..1, half of the `width` of a head each; `first` tokens are not
    turned. `grid` and `shape` as in `resize_positions`."""
    sizes = jnp.asarray([shape] if grid is None else grid, jnp.float32)
    frequency = 2 * np.pi / np.float32(period) ** np.arange(0, 1, 4 / width, dtype=np.float32)
    angles = []
    for axis, n in enumerate(shape):
        place = 2 * (jnp.arange(n) + 0.5) / sizes[:, axis, None] - 1
        angles.append(jnp.expand_dims(place[..., None] * frequency, 2 - axis))
    both = jnp.concatenate(jnp.broadcast_arrays(*angles), axis=-1).reshape(len(sizes), -1, width // 2)
    both = jnp.pad(jnp.tile(both, 2), ((0, 0), (first, 0), (0, 0)))[:, :, None]
    return Rotation(jnp.cos(both), jnp.sin(both))


def rotated(x: Float[Array, "B T N d"], rotation: Rotation) -> Float[Array, "B T N d"]:
    """`x`, whose first and second half are the planes' two axes, turned."""
    one, two = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-two, one], axis=-1)
    return (x * rotation.cos + turned * rotation.sin).astype(x.dtype)


def sinusoids(length: int, width: int) -> Float64[np.ndarray, "T D"]:
    """Sines, then cosines, of positions over time scales from 1 to 10⁴ (Vaswani et al., 2017). Made on the host."""
    scales = 1e4 ** (np.arange(width // 2) / max(width // 2 - 1, 1))
    angles = np.arange(length)[:, None] / scales
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), ((0, 0), (0, width % 2)))


def valid_mask(grid: Array | None, shape: tuple[int, int]) -> Bool[Array, "B h w"] | None:
    """True on the part of a padded `shape` that each image's `grid` (h, w) covers; None when nothing is padded."""
    if grid is None:
        return None
    rows = jnp.arange(shape[0])[None, :, None] < grid[:, 0, None, None]
    columns = jnp.arange(shape[1])[None, None, :] < grid[:, 1, None, None]
    return rows & columns


def token_mask(mask: Bool[Array, "B h w"] | None, first: int) -> Bool[Array, "B 1 1 T"] | None:
    """`valid_mask` of tokens: the `first` ones, of no patch, see and are seen by every valid patch."""
    if mask is None:
        return None
    return jnp.pad(mask.reshape(len(mask), -1), ((0, 0), (first, 0)), constant_values=True)[:, None, None]
