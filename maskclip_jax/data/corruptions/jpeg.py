"""What baseline JPEG (ITU-T T.81, JFIF, 4:2:0) does to pixels, as a pure function: everything but its lossless coding.

Colour transform, chroma at half the resolution, 8×8 DCT, quantisation, and back, with libjpeg's rounding and its
triangular upsampling of chroma. Entropy coding changes no pixel and is left out, so this runs under `jit` and `vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

# Annex K of T.81: luminance and chrominance, in natural order.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])
_MCU = 16  # pixels a side of what is coded together: two luminance blocks, one of each chroma


def jpeg_roundtrip(rgb: Float[Array, "H W 3"], level: Array, qualities: Sequence[int]) -> Float[Array, "H W 3"]:
    """The image after encoding with the quality `qualities[level - 1]` and decoding; whole numbers 0..255 both ways."""
    tables = jnp.asarray(np.stack([quantisation_tables(quality) for quality in qualities]))[level - 1]
    height, width = rgb.shape[:2]
    padded = jnp.pad(rgb, ((0, -height % _MCU), (0, -width % _MCU), (0, 0)), mode="edge")
    to_ycc = jnp.asarray(_TO_YCC, jnp.float32)
    ycc = jnp.round(jnp.einsum("hwc,yc->hwy", padded, to_ycc, precision="highest") + jnp.array([0.0, 128.0, 128.0]))
    luminance = _coded(ycc[..., 0], tables[0])[:height, :width]
    half = (-(-height // 2), -(-width // 2))
    chroma = [_coded(_halved(ycc[..., i]), tables[1])[: half[0], : half[1]] for i in (1, 2)]
    blue, red = (_doubled(plane)[:height, :width] - 128 for plane in chroma)
    pixels = jnp.stack(
        [luminance + 1.402 * red, luminance - 0.344136286 * blue - 0.714136286 * red, luminance + 1.772 * blue], -1
    )
    return jnp.clip(jnp.round(pixels), 0, 255)


def quantisation_tables(quality: int) -> Float32[np.ndarray, "2 8 8"]:
    """Annex K's tables scaled as the Independent JPEG Group does for a quality of 1 to 100."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = (np.array([_LUMINANCE, _CHROMINANCE]) * scale + 50) // 100
    return np.clip(tables, 1, 255).astype(np.float32)


def _dct_matrix() -> Float32[np.ndarray, "8 8"]:
    """Orthonormal DCT-II: `D @ block @ D.T` is T.81's transform."""
    u, x = np.arange(8)[:, None], np.arange(8)
    matrix = np.cos((2 * x + 1) * u * np.pi / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _coded(plane: Float[Array, "H W"], table: Float[Array, "8 8"]) -> Float[Array, "H W"]:
    """DCT, quantised, and back."""
    height, width = plane.shape
    dct = jnp.asarray(_dct_matrix())
    blocks = (plane - 128).reshape(height // 8, 8, width // 8, 8)
    coefficients = jnp.einsum("ux,axby,vy->aubv", dct, blocks, dct, precision="highest")
    scaled = coefficients / table[:, None]
    # libjpeg rounds halves away from zero
    coefficients = jnp.sign(scaled) * jnp.floor(jnp.abs(scaled) + 0.5) * table[:, None]
    decoded = jnp.einsum("ux,aubv,vy->axby", dct, coefficients, dct, precision="highest").reshape(plane.shape)
    return jnp.clip(jnp.round(decoded) + 128, 0, 255)


def _halved(plane: Float[Array, "H W"]) -> Float[Array, "h w"]:
    """Means of 2×2, rounded down and up in turn along a row, so that no bias adds up."""
    height, width = plane.shape
    sums = plane.reshape(height // 2, 2, width // 2, 2).sum((1, 3))
    return jnp.floor((sums + 1 + jnp.arange(width // 2) % 2) / 4)


def _doubled(plane: Float[Array, "h w"]) -> Float[Array, "H W"]:
    """Triangular upsampling: three parts of the nearer sample, one of the next, along both axes."""
    rows = jnp.pad(plane, ((1, 1), (0, 0)), mode="edge")
    rows = jnp.stack([3 * plane + rows[:-2], 3 * plane + rows[2:]], 1).reshape(-1, plane.shape[1])
    both = jnp.pad(rows, ((0, 0), (1, 1)), mode="edge")
    out = jnp.stack([jnp.floor((3 * rows + both[:, :-2] + 8) / 16), jnp.floor((3 * rows + both[:, 2:] + 7) / 16)], 2)
    return out.reshape(rows.shape[0], -1)
