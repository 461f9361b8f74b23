"""S, how alike an image's patches are to a second, image-only backbone, and two ways to sharpen CLIP's features by it.

    proxyclip       softmax(γ (S − β S̄)), negatives left out, as the last attention   Lan et al., ECCV 2024, section 3.3
    clip_dinoiser   f′_i = Σ_j S_ij f_j / Σ_j S_ij over S_ij ≥ 0.2                    Wysoczańska et al., ECCV 2024

S_ij is the cosine of two patches' tokens. Both are matrices [B, L, L] whose rows sum to one, for `ops.matmul.mixed`:
ProxyCLIP's for the values of CLIP's last block (before its output projection, without residual and MLP),
CLIP-DINOiser's for the projected features before they are normalised. With a backbone to which every patch is like
itself alone, both are the identity. Pure functions, safe under `jit`, `vmap` and `grad`; `grid` says how many rows and
columns of each image in a padded batch are valid, and padding changes nothing (LPOSS spreads scores: `propagation.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.encoders.positions import linear_matrix, valid_mask
from maskclip_jax.ops.matmul import alike, in_full_precision, similarity

Arrays = Array | np.ndarray


def grid_similarity(
    tokens: Float[Arrays, "B h w D"], grid: Int[Arrays, "B 2"] | None = None
) -> tuple[Float[Array, "B L L"], Bool[Array, "B L"]]:
    """S, the cosine of every two patches (0 from and to padding), and which patches are image.

    Args:
      tokens: the backbone's patches, of any length.
      grid: valid rows and columns of each image; None: all are.
    """
    batch, h, w, width = tokens.shape
    mask = valid_mask(None if grid is None else jnp.asarray(grid), (h, w))
    valid = jnp.ones((batch, h * w), bool) if mask is None else mask.reshape(batch, h * w)
    return similarity(jnp.reshape(tokens, (batch, h * w, width)), valid), valid


@jax.jit
def proxy_attention(
    tokens: Float[Arrays, "B h w D"],
    grid: Int[Arrays, "B 2"] | None = None,
    *,
    beta: ArrayLike = 1.2,
    gamma: ArrayLike = 3.0,
) -> Float[Array, "B L L"]:
    """ProxyCLIP's attention: softmax over j of `γ (S_ij − β S̄)` where that is not negative (S̄: the image's mean).

    Where nothing is left, in an image whose patches are all alike, a patch looks at itself, which is what the mask
    leaves last (the authors' code divides by zero there). `beta` and `gamma` may be traced.
    """
    s, valid = grid_similarity(tokens, grid)
    count = valid.sum(axis=-1)[:, None, None]
    scores = gamma * (s - beta * s.sum(axis=(1, 2), keepdims=True) / count**2)
    keep = ((scores >= 0) & valid[:, None]) | jnp.eye(s.shape[-1], dtype=bool)
    return jax.nn.softmax(jnp.where(keep, scores, jnp.finfo(scores.dtype).min), axis=-1)


@jax.jit
def pooling_weights(
    tokens: Float[Arrays, "B h w D"], grid: Int[Arrays, "B 2"] | None = None, *, threshold: ArrayLike = 0.2
) -> Float[Array, "B L L"]:
    """CLIP-DINOiser's weights: S where it is at least `threshold`, divided by its sum over j.

    A patch is always like itself: padding alone has no weights. The learned variant is the same with `convolved` tokens
    of CLIP's own.
    """
    return alike(grid_similarity(tokens, grid)[0], threshold)


@jax.jit
def convolved(
    tokens: Float[Arrays, "B h w D"],
    kernel: Float[Arrays, "3 3 D F"],
    bias: Float[Arrays, " F"],
    grid: Int[Arrays, "B 2"] | None = None,
) -> Float[Array, "B h w F"]:
    """CLIP-DINOiser's learned tokens: a 3×3 convolution of CLIP's own, whose cosines were trained to be like DINO's S.

    Beyond an image's border stands its last patch, as in the authors' code. Their checkpoint ("model_state_dict") has
    `obj_proj.weight` [F, D, 3, 3] and `obj_proj.bias`, of a ViT-B/16; their tokens are the third last block's after its
    `ln_2` (D = 768, F = 256).
    """
    batch, h, w, _ = tokens.shape
    size = jnp.broadcast_to(jnp.array([h, w]), (batch, 2)) if grid is None else jnp.asarray(grid)
    steps = [jnp.clip(jnp.arange(-1, n + 1), 0, size[:, axis, None] - 1) for axis, n in enumerate((h, w))]
    around = jax.vmap(lambda x, rows, columns: x[rows][:, columns])(jnp.asarray(tokens), *steps)
    out = jax.lax.conv_general_dilated(
        around, jnp.asarray(kernel, around.dtype), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + jnp.asarray(bias, out.dtype)


def marked_background(
    probabilities: Float[Arrays, "B h w C"], foreground: Float[Arrays, "B h w"], *, sure: ArrayLike = 0.99
) -> Float[Array, "B h w C"]:
    """CLIP-DINOiser's background: cells that are no foreground, and of no class surer than `sure`, are class 0.

    Args:
      probabilities: class 0 is the background.
      foreground: its probability; FOUND's, or `sigmoid(u · bkg_decoder.weight + bkg_decoder.bias)` of the tokens that
        `convolved` takes, at length one.
      sure: the paper's δ.
    """
    p = jnp.asarray(probabilities)
    background = (p.max(axis=-1) < sure) & (jnp.asarray(foreground) <= 0.5)
    return p.at[..., 0].set(jnp.where(background, 1, p[..., 0]))


@functools.partial(jax.jit, static_argnames="shape")
def resampled(
    x: Float[Arrays, "B h w D"],
    shape: tuple[int, int],
    grid: Int[Arrays, "B 2"] | None = None,
    to: Int[Arrays, "B 2"] | None = None,
) -> Float[Array, "B H W D"]:
    """Tokens, values or pixels of one grid on another, bilinear (half-pixel centres), antialiased where it shrinks.

    ProxyCLIP brings values to a finer grid so.

    Args:
      shape: rows and columns of the padded result.
      grid, to: valid rows and columns of each image before and after; None: all are.
    """
    batch, *before, _ = x.shape
    sizes = [
        jnp.broadcast_to(jnp.array(full), (batch, 2)) if part is None else jnp.asarray(part)
        for full, part in ((before, grid), (shape, to))
    ]
    rows, columns = (
        jax.vmap(lambda n, m, i=axis: linear_matrix(n, m, shape[i], before[i]))(sizes[0][:, axis], sizes[1][:, axis])
        for axis in (0, 1)
    )
    return jnp.einsum("bHh,bWw,bhwd->bHWd", rows, columns, in_full_precision(jnp.asarray(x)), precision="highest")
