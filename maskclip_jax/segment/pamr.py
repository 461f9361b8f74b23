"""PAMR: scores that follow the image's own edges (Araslanov and Roth, CVPR 2020), as NACLIP and SCLIP use it.

Every step replaces a pixel's scores by a mean over its neighbours', weighted by how alike their colours are. A pure
function, jitted. A number of steps that is traced is the same program for any, without reverse-mode gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

DILATIONS = (8, 16)  # pixels to the neighbours: SCLIP's and NACLIP's


def pamr(
    scores: Float[Array | np.ndarray, "H W C"],
    image: Float[Array | np.ndarray, "H W 3"],
    *,
    steps: ArrayLike = 10,
    dilations: tuple[int, ...] = DILATIONS,
    size: Int[Array | np.ndarray, " 2"] | None = None,
) -> Float[Array, "H W C"]:
    """`m_i ← Σ_j a_ij m_j`, `a_i = softmax_j(−mean_c |x_ic − x_jc| / (0.1 σ_ic + 1e-8))`, `steps` times.

    j runs over the eight neighbours at each dilation (never i itself), σ is the standard deviation of the neighbours
    and i; what lies beyond the border is the border's pixel. Shifting or scaling a channel changes nothing.

    Args:
      scores: logits or probabilities of every pixel; classes do not mix.
      image: colours of the same pixels.
      steps: 0 changes nothing. An array may be traced, but only an int lets `jax.grad` through.
      dilations: distances of the neighbours, in pixels.
      size: rows and columns that are image, where arrays are padded; the rest comes out meaningless.
    """
    program = _BY_STEPS if isinstance(steps, int) else _FOR_ANY
    return program(scores, image, steps=steps, dilations=dilations, size=size)


def _pamr(scores: ArrayLike, image: ArrayLike, *, steps: ArrayLike, dilations: tuple[int, ...], size) -> Array:
    x, m = jnp.asarray(image, jnp.float32), jnp.asarray(scores, jnp.float32)
    height, width = x.shape[:2] if size is None else size
    near = functools.partial(_neighbours, height=height, width=width, dilations=dilations)
    around = jnp.stack([y for y, _ in near(x)])
    others = np.array([other for _, other in near(x)])
    # PyTorch's std, divided by n − 1; the pixel itself counts once at each dilation
    variance = around.var(axis=0, ddof=1)
    sigma = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)  # has a gradient at zero
    likeness = -(jnp.abs(x - around[others]) / (1e-8 + 0.1 * sigma)).mean(axis=-1)
    weights = jax.nn.softmax(likeness, axis=0)

    def step(_, m: Array) -> Array:
        neighbours = (y for y, other in near(m) if other)
        return sum(weight[..., None] * y for weight, y in zip(weights, neighbours, strict=True))

    return jax.lax.fori_loop(0, steps, step, m)


_FOR_ANY = jax.jit(_pamr, static_argnames="dilations")
_BY_STEPS = jax.jit(_pamr, static_argnames=("dilations", "steps"))


def _neighbours(
    x: Float[Array, "H W K"], height: ArrayLike, width: ArrayLike, dilations: tuple[int, ...]
) -> Iterator[tuple[Float[Array, "H W K"], bool]]:
    """`x` moved to each of the nine places at each dilation, and whether that is another pixel than the own."""
    far = max(dilations)
    rows, columns = (jnp.arange(-far, n + far) for n in x.shape[:2])
    # The border is repeated once, by a gather; every neighbour is then a slice, which is fused into what it is used in.
    around = x[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
    for d in dilations:
        for dy in (-d, 0, d):
            for dx in (-d, 0, d):
                yield (
                    around[far + dy : far + dy + x.shape[0], far + dx : far + dx + x.shape[1]],
                    bool(dy or dx),
                )
