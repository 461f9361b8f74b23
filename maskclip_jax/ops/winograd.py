"""A 3×3 convolution by 16 products where plain ones take 36: F(2×2, 3×3) of Lavin & Gray 2016, after Winograd 1980.

Along one axis, two neighbouring outputs of a 3-tap filter g come from four neighbouring inputs x by four products:

    y = Aᵀ [(G g) ⊙ (Bᵀ x)],   Bᵀ = [1 0 −1 0; 0 1 1 0; 0 −1 1 0; 0 1 0 −1],
    Aᵀ = [1 1 1 0; 0 1 −1 −1], G = [1 0 0; ½ ½ ½; ½ −½ ½; 0 0 1],

and over two axes by four times four. Every one of the sixteen is a product of matrices over all tiles of the image. At
dilation d a neighbour is d away, so that an axis is n blocks of 2·d: [n, 2, d], "even" and "odd" halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from maskclip_jax.ops import round_up

# Sub-images or matrices by their place along the two image axes: 2×2 halves, 3×3 of a kernel, 4×4 of a product.
Grid = list[list[Array]]
_ROWS, _COLUMNS = 1, 3  # axes of the blocks in a half, [B, n, d, m, d, c]


def arithmetic(height: int, width: int, dilation: int) -> int:
    """Multiplications for one pair of channels: 16 for four outputs, on the image filled up to whole tiles."""
    return 4 * round_up(height, 2 * dilation) * round_up(width, 2 * dilation)


@functools.partial(jax.checkpoint, static_argnums=2)
def winograd(x: Float[Array, "B h w i"], kernel: Float[Array, "3 3 i o"], dilation: int) -> Float[Array, "B h w o"]:
    """The 3×3 convolution of stride 1, padded by `dilation`; differs from the plain one by float32's rounding.

    The gradient makes the tiles again from the image instead of keeping them: they are four times as large.
    """
    products = [
        [tile @ weight for tile, weight in zip(*rows, strict=True)]
        for rows in zip(_tiles(x, dilation), _kernels(kernel), strict=True)
    ]
    n, m = (round_up(side, 2 * dilation) // (2 * dilation) for side in x.shape[1:3])
    shape = (x.shape[0], n, dilation, m, dilation, kernel.shape[-1])
    halves = _both(_outputs, [[part.reshape(shape) for part in row] for row in products])
    return _image(halves)[:, : x.shape[1], : x.shape[2]]


def _tiles(x: Array, dilation: int) -> Grid:
    """The 4×4 transformed inputs, each a matrix [tiles, channels]."""
    grid = _both(_inputs, _halves(x, dilation))
    return [[part.reshape(-1, part.shape[-1]) for part in row] for row in grid]


def _kernels(kernel: Array) -> Grid:
    return _both(_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])


def _inputs(even: Array, odd: Array, axis: int) -> tuple[Array, ...]:
    """Bᵀ: a tile is a block and the next one."""
    blocks = even.shape[axis]
    x0, x1 = (lax.slice_in_dim(half, 0, blocks - 1, axis=axis) for half in (even, odd))
    x2, x3 = (lax.slice_in_dim(half, 1, blocks, axis=axis) for half in (even, odd))
    return x0 - x2, x1 + x2, x2 - x1, x1 - x3


def _outputs(m0: Array, m1: Array, m2: Array, m3: Array, axis: int) -> tuple[Array, ...]:
    """Aᵀ."""
    return m0 + m1 + m2, m1 - m2 - m3


def _kernel(g0: Array, g1: Array, g2: Array, axis: int) -> tuple[Array, ...]:
    """G."""
    return g0, 0.5 * (g0 + g1 + g2), 0.5 * (g0 - g1 + g2), g2


def _both(line: Callable[..., Sequence[Array]], grid: Grid) -> Grid:
    """`line` along the rows, then along the columns."""
    down = zip(*(line(*column, _ROWS) for column in zip(*grid, strict=True)), strict=True)
    return [list(line(*row, _COLUMNS)) for row in down]


def _halves(x: Float[Array, "B h w c"], dilation: int) -> Grid:
    """Even and odd halves of both axes, each [B, n + 1, d, m + 1, d, c]: zeros before, and behind up to whole tiles."""
    filled = [round_up(side, 2 * dilation) + 2 * dilation for side in x.shape[1:3]]
    around = [(dilation, full - dilation - side) for full, side in zip(filled, x.shape[1:3], strict=True)]
    n, m = (full // (2 * dilation) for full in filled)
    x = jnp.pad(x, ((0, 0), *around, (0, 0))).reshape(x.shape[0], n, 2, dilation, m, 2, dilation, x.shape[3])
    return [[x[:, :, i, :, :, j] for j in range(2)] for i in range(2)]


def _image(halves: Grid) -> Float[Array, "B h w c"]:
    x = jnp.stack([jnp.stack(row, axis=4) for row in halves], axis=2)
    batch, n, _, dilation, m, *_, channels = x.shape
    return x.reshape(batch, 2 * n * dilation, 2 * m * dilation, channels)
