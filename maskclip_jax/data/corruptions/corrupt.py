"""The eight corruptions of the paper's robustness test, levels 1 to 5 (ImageNet-C: Hendrycks & Dietterich, 2019).

    corrupted = corrupt(image, "speckle_noise", 3, jax.random.key(0))                       # one image
    all_levels = jax.vmap(corrupt, (None, None, 0, None))(image, "jpeg", jnp.arange(1, 6), key)  # five at once

Pure functions of (image, level, key), for `jit` and `vmap`; the level may be traced, so one program serves all of them.
`LEVELS` has the published strengths. Results are truncated to 8 bits, not rounded, as those of the reference are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt8

from maskclip_jax.data.corruptions.filters import gaussian
from maskclip_jax.data.corruptions.jpeg import jpeg_roundtrip
from maskclip_jax.data.corruptions.spatter import spatter
from maskclip_jax.errors import UserError

LEVELS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # deviation, white being 1
    "shot_noise": (60, 25, 12, 5, 3),  # photons of a white pixel
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the samples
    "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),  # deviation, relative to the sample
    "gaussian_blur": (1, 2, 3, 4, 6),  # deviation in px
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # disk's radius, its softening, in px
    "spatter": ("water", "water", "water", "mud", "mud"),  # strengths in spatter.py
    "jpeg": (25, 18, 15, 10, 7),  # quality
}
CORRUPTIONS = tuple(LEVELS)

Unit = Float[Array, "H W 3"]  # 0..1


def corrupt(
    image: UInt8[Array | np.ndarray, "H W 3"], name: str, level: ArrayLike, key: PRNGKeyArray
) -> UInt8[Array, "H W 3"]:
    """A corrupted image, uint8 [H, W, 3].

    Args:
      image: RGB.
      name: one of `CORRUPTIONS`.
      level: 1 (weak) to 5 (strong); may be traced (then it is not checked).
      key: the only source of chance. Blurs and JPEG have none.

    Raises:
      UserError: an unknown name, or a level outside 1..5.
    """
    if name not in LEVELS:
        raise UserError(f"a corruption is one of {', '.join(CORRUPTIONS)}, got {name!r}: choose one")
    if isinstance(level, int | np.integer) and not 1 <= level <= 5:
        raise UserError(f"a corruption's level is 1 to 5, got {level}: choose one of these")
    shape = jnp.shape(image)
    unit = jnp.asarray(image).astype(jnp.float32) / 255
    drawn = _DRAWS[name](key, shape) if name in _DRAWS else None
    corrupted = _FUNCTIONS[name](unit, jnp.asarray(level), drawn)
    # The epsilon keeps what float32 rounds to 41.99999 at 42, where the reference computes in float64.
    return (jnp.clip(corrupted, 0, 1) * 255 + 1e-3).astype(jnp.uint8)


def corrupt_batch(
    images: UInt8[Array | np.ndarray, "B H W 3"], name: str, level: ArrayLike, key: PRNGKeyArray
) -> UInt8[Array, "B H W 3"]:
    """`corrupt` for images of one size, each with chance of its own."""
    keys = jax.random.split(key, len(images))
    return jax.vmap(lambda image, one: corrupt(image, name, level, one))(jnp.asarray(images), keys)


def gaussian_noise(x: Unit, level: Array, normal: Unit) -> Unit:
    """x + σ·n: electronic noise."""
    return x + _strength("gaussian_noise", level) * normal


def shot_noise(x: Unit, level: Array, key: PRNGKeyArray) -> Unit:
    """Poisson(c·x) / c: a white pixel counts c photons on average."""
    photons = _strength("shot_noise", level)
    return jax.random.poisson(key, x * photons, dtype=jnp.int32) / photons


def impulse_noise(x: Unit, level: Array, uniform: Unit) -> Unit:
    """A share of the samples (each channel for itself) becomes black or white, half and half."""
    share = _strength("impulse_noise", level)
    return jnp.where(uniform < share / 2, 0.0, jnp.where(uniform < share, 1.0, x))


def speckle_noise(x: Unit, level: Array, normal: Unit) -> Unit:
    """x + x·σ·n: noise in proportion to the light."""
    return x + x * _strength("speckle_noise", level) * normal


def gaussian_blur(x: Unit, level: Array, _: Any = None) -> Unit:
    """A Gaussian of σ pixels, cut after four σ; the border is repeated."""
    return gaussian(x, _strength("gaussian_blur", level), float(max(LEVELS["gaussian_blur"])))


def defocus_blur(x: Unit, level: Array, _: Any = None) -> Unit:
    """A disk, its edge softened; the image is mirrored at the border."""
    kernel = jnp.asarray(_DISKS)[level - 1]
    reach = kernel.shape[0] // 2
    padded = jnp.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    planes = padded.transpose(2, 0, 1)[:, None]  # each channel is an image of one channel
    out = jax.lax.conv(planes, kernel[None, None], (1, 1), "VALID", precision=jax.lax.Precision.HIGHEST)
    return out[:, 0].transpose(1, 2, 0)


def jpeg(x: Unit, level: Array, _: Any = None) -> Unit:
    """What baseline JPEG of a low quality, chroma at half the resolution, leaves of the image."""
    return jpeg_roundtrip(x * 255, level, LEVELS["jpeg"]) / 255


def _disk(radius: int, softening: float) -> Float32[np.ndarray, "n n"]:
    """A disk that sums to one, softened by a small Gaussian (mirrored at the array's border, as OpenCV's is)."""
    reach = max(8, radius)
    at = np.arange(-reach, reach + 1)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    taps = 1 if radius <= 8 else 2
    offsets = np.arange(-taps, taps + 1)
    weights = np.exp(-0.5 * (offsets / softening) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padded = np.pad(disk, [(taps, taps) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        size = disk.shape[axis]
        parts = (w * padded.take(np.arange(size) + taps + o, axis) for w, o in zip(weights, offsets, strict=True))
        disk = sum(parts, np.zeros_like(disk))
    return disk.astype(np.float32)


def _disks() -> Float32[np.ndarray, "5 n n"]:
    disks = [_disk(*strength) for strength in LEVELS["defocus_blur"]]
    largest = max(len(disk) for disk in disks)
    return np.stack([np.pad(disk, (largest - len(disk)) // 2) for disk in disks])


def _strength(name: str, level: Array) -> Array:
    return jnp.asarray(LEVELS[name], jnp.float32)[level - 1]


_DISKS = _disks()
_ALL = (gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, defocus_blur, spatter, jpeg)
_FUNCTIONS: dict[str, Callable] = {function.__name__: function for function in _ALL}
_DRAWS: dict[str, Callable] = {  # what is random in them; the others have no chance
    "gaussian_noise": jax.random.normal,
    "shot_noise": lambda key, shape: key,  # Poisson draws depend on the pixels
    "impulse_noise": jax.random.uniform,
    "speckle_noise": jax.random.normal,
    "spatter": lambda key, shape: jax.random.normal(key, shape[:2]),
}
