"""How a training image is varied: scale, crop, flip, photometric distortion, padding (mmsegmentation's pipeline).

Every function is a pure NumPy function of its arguments and of a generator, which `example_rng` derives from (seed,
epoch, example): an example depends on neither hosts, threads nor what was read before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Integer, UInt8
from PIL import Image

from maskclip_jax.data.images import IGNORE
from maskclip_jax.data.preprocess import check_one_size, resize_as_opencv, resize_shape
from maskclip_jax.data.schema import check_choices, check_ranges
from maskclip_jax.errors import UserError

UNLABELLED = 254  # pixels without annotation: a class of their own where crops are counted, as in the released code

_RANGES = {
    **{"short_side": (1, 2**16), "long_side": (1, 2**16), "within": (1, 2**16), "scale": (1e-3, 100), "flip": (0, 1)},
    **{"category_max_ratio": (1e-9, 1), "least_classes": (0, 256), "crop_retries": (0, 10**4), "hue": (0, 360)},
    **{"brightness": (0, 255), "contrast": (1e-6, 100), "saturation": (1e-6, 100)},
}

Pixels = UInt8[np.ndarray, "H W 3"]
Labels = Integer[np.ndarray, "H W *maps"]  # one label map, or several (annotation first) that share the geometry
NewPixels = UInt8[np.ndarray, "h w 3"]
NewLabels = Integer[np.ndarray, "h w *maps"]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a training image is varied (mmsegmentation's pipeline for these data sets).

    Fields:
      short_side, long_side: resize to this short side first (long side at most that); None keeps the size.
      within: resize to the largest size that fits this height and width instead (Pascal Context: 520, 520).
      interpolation: of images, "bilinear" (Pillow's, antialiased) or "opencv" (not antialiased: the released code).
      scale: range of the random scale, uniform.
      flip: probability of a horizontal flip.
      category_max_ratio: a crop is drawn again while one class covers more than this of its pixels that are not 255 …
      least_classes: … or while there are fewer classes in it …
      crop_retries: … at most this often.
      count_unlabelled: unlabelled pixels (254) are one more class in this, as published; False leaves them out too.
      photometric: brightness, contrast, saturation and hue, each with probability ½.
      brightness: largest shift, in 0..255.   contrast, saturation: ranges of the factor.
      hue: largest turn, in degrees (mmsegmentation's 18 are half-degrees of OpenCV's).
    """

    short_side: int | None = None
    long_side: int | None = None
    within: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    category_max_ratio: float = 0.75
    least_classes: int = 2
    crop_retries: int = 10
    count_unlabelled: bool = True
    photometric: bool = True
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0

    def __post_init__(self):
        check_ranges(self, _RANGES, "augmentation.")
        check_choices(self, {"interpolation": ("bilinear", "opencv")}, "augmentation.")
        check_one_size(self.short_side, self.within)
        for name in ("scale", "contrast", "saturation"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"augmentation.{name} is a range (low, high), got {(low, high)}: order it")


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one example in one epoch: the same wherever and whenever it is drawn."""
    return np.random.default_rng([seed, epoch, index])


def augment(
    image: Pixels,
    labels: Labels,
    rng: np.random.Generator,
    config: AugmentConfig,
    *,
    crop_size: int,
    fill: Sequence[int] = (0, 0, 0),
) -> tuple[NewPixels, NewLabels]:
    """Scale, crop, flip, distort, pad: a square of `crop_size` pixels (S) and its labels.

    Args:
      image: uint8 RGB [H, W, 3].
      labels: integers [H, W], or [H, W, K] for K maps with the image's geometry; crops look at the first.
      rng: consumed.
      config: ranges.
      crop_size: S.
      fill: colour of the padding, 0..255 per channel (the mean colour is zero once normalised, as in mmsegmentation).

    Returns:
      uint8 [S, S, 3] and labels int32 [S, S] or [S, S, K]; padding, right and bottom, is labelled 255.
    """
    image, labels = random_scale(image, labels, rng, config)
    image, labels = random_crop(
        image,
        labels,
        rng,
        size=crop_size,
        category_max_ratio=config.category_max_ratio,
        least_classes=config.least_classes,
        retries=config.crop_retries,
        count_unlabelled=config.count_unlabelled,
    )
    if rng.random() < config.flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if config.photometric:
        image = photometric_distortion(
            image,
            rng,
            brightness=config.brightness,
            contrast=config.contrast,
            saturation=config.saturation,
            hue=config.hue,
        )
    return pad(image, labels, crop_size, fill)


def random_scale(
    image: Pixels, labels: Labels, rng: np.random.Generator, config: AugmentConfig
) -> tuple[NewPixels, NewLabels]:
    """A uniform factor r of `config.scale`: the short side becomes r·short_side (long side at most r·long_side), or the
    image the largest that fits r·within."""
    factor = rng.uniform(*config.scale)
    height, width = image.shape[:2]
    scaled = lambda side: None if side is None else max(1, int(side * factor + 0.5))  # noqa: E731
    if config.within is not None:
        height, width = resize_shape(height, width, within=tuple(map(scaled, config.within)))
    elif config.short_side is None:
        height, width = scaled(height), scaled(width)
    else:
        short, long = scaled(config.short_side), scaled(config.long_side)
        height, width = resize_shape(height, width, short_side=short, long_side=long)
    return resize(image, labels, (height, width), config.interpolation)


def resize(
    image: Pixels, labels: Labels, shape: tuple[int, int], interpolation: str = "bilinear"
) -> tuple[NewPixels, NewLabels]:
    """The image bilinearly (Pillow's, antialiased, or "opencv"), labels by the nearest pixel, to (height, width)."""
    if shape == image.shape[:2]:
        return image, labels
    rows, columns = (
        ((np.arange(n) + 0.5) * (size / n)).astype(int) for n, size in zip(shape, image.shape[:2], strict=True)
    )
    nearest = labels.take(rows, 0).take(columns, 1)  # one axis after the other: a tenth of the time of both at once
    if interpolation == "opencv":
        return resize_as_opencv(image, shape), nearest
    resized = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))
    return resized, nearest


def random_crop(
    image: Pixels,
    labels: Labels,
    rng: np.random.Generator,
    *,
    size: int,
    category_max_ratio: float = 1.0,
    least_classes: int = 2,
    retries: int = 10,
    count_unlabelled: bool = True,
) -> tuple[NewPixels, NewLabels]:
    """A window of at most `size` × `size`, drawn again (up to `retries` times, the last one stays) while one class
    covers more than `category_max_ratio` of its pixels, or fewer than `least_classes` classes are in it.

    Ignored pixels (255) do not count; unlabelled ones (254) are one class, unless `count_unlabelled` is False. A ratio
    of 1 keeps the first window, whatever is in it."""
    room = [max(side - size, 0) for side in image.shape[:2]]

    def draw() -> tuple[slice, slice]:
        top, left = (int(rng.integers(r + 1)) for r in room)
        return slice(top, top + size), slice(left, left + size)

    window = draw()
    if any(room) and category_max_ratio < 1:
        annotation = labels if labels.ndim == 2 else labels[..., 0]
        for _ in range(retries):
            counts = np.bincount(annotation[window].ravel(), minlength=IGNORE + 1)
            counts[IGNORE], counts[UNLABELLED] = 0, counts[UNLABELLED] * count_unlabelled
            share = counts.max() / max(counts.sum(), 1)
            if share <= category_max_ratio and np.count_nonzero(counts) >= least_classes:
                break
            window = draw()
    return image[window], labels[window]


def photometric_distortion(
    image: Pixels,
    rng: np.random.Generator,
    *,
    brightness: float,
    contrast: tuple[float, float],
    saturation: tuple[float, float],
    hue: float,
) -> Pixels:
    """Brightness, contrast, saturation and hue, each with probability ½; contrast before or after the other two.

    Args:
      brightness: largest shift either way, in 0..255.   contrast, saturation: ranges of the factor.
      hue: largest turn either way, in degrees of the colour circle.
    """
    draws = rng.random(5) < 0.5
    shift, gain = rng.uniform(-brightness, brightness), rng.uniform(*contrast)
    colour, turn = rng.uniform(*saturation), rng.uniform(-hue, hue)
    pixels = image.astype(np.float32)
    if draws[0]:
        pixels = np.clip(pixels + np.float32(shift), 0, 255)
    if draws[1] and draws[2]:
        pixels = np.clip(pixels * np.float32(gain), 0, 255)
    if draws[3]:
        pixels = scale_saturation(pixels, colour)
    if draws[4]:
        pixels = turn_hue(pixels, turn)
    if draws[1] and not draws[2]:
        pixels = np.clip(pixels * np.float32(gain), 0, 255)
    return (pixels + np.float32(0.5)).astype(np.uint8)


def scale_saturation(pixels: Float32[np.ndarray, "H W 3"], factor: float) -> Float32[np.ndarray, "H W 3"]:
    """HSV's saturation times `factor`, at most 1; hue and value stay. In RGB: distances to the largest channel grow."""
    value = pixels.max(-1, keepdims=True)
    spread = value - pixels.min(-1, keepdims=True)
    factor = np.minimum(np.float32(factor), value / np.maximum(spread, np.float32(1e-6)))
    return value + (pixels - value) * factor


def turn_hue(pixels: Float32[np.ndarray, "H W 3"], degrees: float) -> Float32[np.ndarray, "H W 3"]:
    """HSV's hue turned by `degrees`; saturation and value stay."""
    red, green, blue = np.moveaxis(pixels, -1, 0)
    value = pixels.max(-1)
    spread = value - pixels.min(-1)
    divisor = np.maximum(spread, np.float32(1e-6))
    sector = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = sector + np.float32(degrees / 60)
    turned = []
    for offset in (5, 3, 1):  # red, green, blue: V − C·max(0, min(k, 4 − k, 1)), k = (offset + H/60°) mod 6
        k = np.mod(offset + sector, 6)
        turned.append(value - spread * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(turned, -1).astype(np.float32)


def pad(image: Pixels, labels: Labels, size: int, fill: Sequence[int] = (0, 0, 0)) -> tuple[NewPixels, NewLabels]:
    """`image` and `labels` in the upper left of a `size` square of colour `fill` and label 255; labels become int32."""
    height, width = image.shape[:2]
    square = np.empty((size, size, 3), np.uint8)
    square[:] = np.asarray(fill, np.uint8)
    square[:height, :width] = image
    padded = np.full((size, size, *labels.shape[2:]), IGNORE, np.int32)
    padded[:height, :width] = labels
    return square, padded
