"""RGB picture -> normalised, padded array for the image tower, and the matrices that bring its grid back to pixels.

Everything here is NumPy on the host. Resampling is linear and separable, so it is a matrix per axis: given to a
compiled program as an argument, one program serves every image size of a bucket.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from PIL import Image

from maskclip_jax.errors import UserError
from maskclip_jax.ops import round_up

_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
INTERPOLATIONS = (*_PIL_FILTERS, "opencv")
SHORT_SIDE, LONG_SIDE = 512, 2048  # VOC and COCO-Stuff, the paper's protocol
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_SIDE = 2**14  # pixels of a resized image's side, at most: a square of them is 800 MB


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How pixels become the tower's input. Sides in pixels; mean and std per RGB channel in units of 0..1.

    Exactly one of three sizes: `short_side` (with `long_side` as its cap), `within` (the largest that fits this height
    and width), or neither (the original size).
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"  # or "bilinear", both antialiased; or "opencv" (`resize_as_opencv`)
    short_side: int | None = SHORT_SIDE
    long_side: int | None = LONG_SIDE
    within: tuple[int, int] | None = None
    multiple: int = 1
    image_size: int | None = None  # the side the checkpoint was trained at, of its config; for information

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise UserError(f"an image {name} has three finite numbers, got {values}: check the checkpoint")
        if min(self.std) <= 0 or max(self.mean) > 1.5:
            raise UserError(
                f"image mean and std are fractions of white (0..1), got {self.mean} / {self.std}: divide by 255"
            )
        if self.interpolation not in INTERPOLATIONS:
            choices = ", ".join(INTERPOLATIONS)
            raise UserError(f"interpolation is one of {choices}, got {self.interpolation!r}: choose one of them")
        check_one_size(self.short_side, self.within)
        sides = (self.short_side, self.long_side, self.multiple, *(self.within or ()))
        if any(side is not None and side < 1 for side in sides):
            raise UserError(f"sides are at least one pixel, got {sides}: use positive numbers")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> "Preprocess":
        """From the dict of a Hugging Face `preprocessor_config.json`.

        The crop and size written there are those of classification and become `image_size` only; `overrides` are
        fields of this class. Raises UserError when a needed key is missing or asks for something else than CLIP does.
        """
        from maskclip_jax.data.preprocess_rules import hf_fields  # here, as below: of checkpoints' files alone

        return cls(**(hf_fields(config) | overrides))

    @classmethod
    def from_open_clip(cls, preprocess_cfg: Mapping[str, Any], **overrides: Any) -> "Preprocess":
        """From the `preprocess_cfg` of an `open_clip_config.json`. Raises UserError on unknown or missing keys."""
        from maskclip_jax.data.preprocess_rules import open_clip_fields

        return cls(**(open_clip_fields(preprocess_cfg) | overrides))

    @classmethod
    def from_json(cls, content: Any, where: str) -> "Preprocess":
        """What `dataclasses.asdict` made of one, back from JSON. Raises UserError for anything else."""
        from maskclip_jax.data.preprocess_rules import own_fields

        return cls(**own_fields(content, where))

    def scaled(self, times: float) -> "Preprocess":
        """The same with its sides `times` as long."""

        def longer(side: int | None) -> int | None:
            return None if side is None else max(1, round(times * side))

        within = None if self.within is None else tuple(map(longer, self.within))
        sides = {"short_side": longer(self.short_side), "long_side": longer(self.long_side), "within": within}
        return self if times == 1 else dataclasses.replace(self, **sides)

    def resized(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """Height and width in pixels of an image of that size after the resize, `scale` times as large."""
        p, (height, width) = self.scaled(scale), size
        if self.short_side is None and self.within is None:
            height, width = (max(1, round(scale * side)) for side in size)
        return resize_shape(height, width, short_side=p.short_side, long_side=p.long_side, within=p.within)


class ResizedImage(NamedTuple):
    """An image at the size it is read at, a quarter as large in memory as when it is prepared."""

    pixels: UInt8[np.ndarray, "h w 3"]
    original: tuple[int, int]  # height and width of the picture that came in

    @property
    def valid(self) -> tuple[int, int]:
        """Its height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


class PreparedImage(NamedTuple):
    """An image ready for the tower, and what is needed to bring its masks back."""

    pixels: Float32[np.ndarray, "Hp Wp 3"]  # normalised, padded right and bottom with zeros
    valid: tuple[int, int]  # height and width in pixels before padding
    original: tuple[int, int]  # height and width of the picture that came in


def resize_shape(
    height: int,
    width: int,
    *,
    short_side: int | None = None,
    long_side: int | None = None,
    within: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Height and width after the resize, aspect ratio kept, each at least 1 (method of mmsegmentation's `Resize`).

    `short_side` scales the short side to it unless the long side would pass `long_side`; `within=(h, w)` gives the
    largest size that fits; with neither, the size stays, except that `long_side` still caps it.
    """
    if within is not None:
        scale = min(within[0] / height, within[1] / width)
    elif short_side is not None:
        scale = short_side / min(height, width)
    else:
        scale = 1.0
    if long_side is not None:
        scale = min(scale, long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def sized(preprocess: Preprocess, short_side: int | None = None, within: Sequence[int] | None = None) -> Preprocess:
    """`preprocess` with another size: `short_side` (its `long_side` still caps it) or `within` (height, width).

    Neither leaves it. Raises UserError for both, and for what is no size.
    """
    check_size(short_side, within)
    if short_side is not None:
        return dataclasses.replace(preprocess, short_side=int(short_side), within=None)
    if within is not None:
        return dataclasses.replace(preprocess, short_side=None, long_side=None, within=(int(within[0]), int(within[1])))
    return preprocess


def check_size(short_side: Any, within: Any) -> None:
    """Raises UserError for a size and a frame that came together, and for what is neither."""
    check_one_size(short_side, within)
    if short_side is not None and not _is_side(short_side):
        raise UserError(f"the short side is at least one pixel, a whole number, got {short_side!r}: try 512")
    if within is not None and not (
        isinstance(within, list | tuple | np.ndarray) and len(within) == 2 and all(map(_is_side, within))
    ):
        raise UserError(f"within is a height and a width in whole pixels, got {within!r}: try (520, 520)")


def check_one_size(short_side: Any, within: Any) -> None:
    """Raises UserError for a size and a frame that came together."""
    if short_side is not None and within is not None:
        raise UserError(
            f"an image is sized by short_side or within a frame, got both ({short_side!r}, {within!r}): leave one out"
        )


def _is_side(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 < value <= MOST_SIDE


def resize(rgb: UInt8[np.ndarray, "H W 3"], preprocess: Preprocess, scale: float = 1.0) -> ResizedImage:
    """By Pillow's antialiased filter as CLIP's own preprocessing, or as OpenCV; `scale` as in `prepare`."""
    original = (rgb.shape[0], rgb.shape[1])
    valid = preprocess.resized(original, scale)
    if valid == original:
        return ResizedImage(rgb, original)
    if preprocess.interpolation == "opencv":
        return ResizedImage(resize_as_opencv(rgb, valid), original)
    filtered = Image.fromarray(rgb).resize(valid[::-1], _PIL_FILTERS[preprocess.interpolation])
    return ResizedImage(np.asarray(filtered), original)


def prepare(
    rgb: UInt8[np.ndarray, "H W 3"] | ResizedImage,
    preprocess: Preprocess,
    multiple: int | None = None,
    least: int = 1,
    scale: float = 1.0,
) -> PreparedImage:
    """Resizes 8-bit pixels (`resize`), normalises, pads.

    Args:
      rgb: the picture, or what `resize` made of it.
      preprocess: sizes and statistics.
      multiple: pad to a multiple of this many pixels; `preprocess.multiple` when None.
      least: pad to at least this many pixels.
      scale: times the size that `preprocess` gives.
    """
    resized = rgb if isinstance(rgb, ResizedImage) else resize(rgb, preprocess, scale)
    multiple = preprocess.multiple if multiple is None else multiple
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    pixels = resized.pixels.astype(np.float32)
    pixels /= np.float32(255)  # in place, but otherwise as written: `(rgb / 255 - mean) / std`
    pixels -= mean
    pixels /= std
    image = PreparedImage(pixels, resized.valid, resized.original)
    return pad_image(image, tuple(max(round_up(side, multiple), least) for side in resized.valid))


def pad_image(image: PreparedImage, shape: tuple[int, int]) -> PreparedImage:
    """Pads with zeros (the mean colour: it is after normalisation) on the right and bottom to `shape` in pixels."""
    height, width = image.pixels.shape[:2]
    if shape[0] < height or shape[1] < width:
        raise ValueError(f"an image is padded to a shape at least its own, {height}x{width}, got {shape}")
    return image._replace(pixels=np.pad(image.pixels, ((0, shape[0] - height), (0, shape[1] - width), (0, 0))))


def resize_as_opencv(rgb: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear as OpenCV's `INTER_LINEAR` on uint8: half-pixel centres, no antialias, fixed point; equal to the bit.

    Weights are rounded to 11 bits. Along the width a sample outside the image is the border's; along the height both
    taps are clipped to it, and each is shifted down before the two are added.
    """
    (top, bottom, down), (left, right, across) = (_opencv_taps(n, m) for n, m in zip(rgb.shape[:2], size, strict=True))
    outside = left == right  # both taps on the border pixel: OpenCV gives the first all the weight
    across = np.where(outside, np.array([[2048], [0]], np.int32), across)[:, :, None]

    def row_sums(rows: np.ndarray) -> np.ndarray:
        part = rgb[rows].astype(np.int32)
        return (part[:, left] * across[0] + part[:, right] * across[1]) >> 4

    down = down[:, :, None, None]
    mixed = ((down[0] * row_sums(top)) >> 16) + ((down[1] * row_sums(bottom)) >> 16)
    return ((mixed + 2) >> 2).astype(np.uint8)


def _opencv_taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two samples of every output pixel, and their weights in 2048ths [2, n_out]."""
    x = ((np.arange(n_out) + 0.5) * (1 / (n_out / n_in)) - 0.5).astype(np.float32)
    first = np.floor(x).astype(int)
    t = x - first.astype(np.float32)
    weights = np.rint(np.stack([np.float32(1) - t, t]) * np.float32(2048)).astype(np.int32)
    return np.clip(first, 0, n_in - 1), np.clip(first + 1, 0, n_in - 1), weights


def interpolation_matrix(
    n_in: int, n_out: int, *, method: Literal["bilinear", "bicubic"] = "bilinear"
) -> Float32[np.ndarray, "n_out n_in"]:
    """The matrix of `torch.nn.functional.interpolate(align_corners=False, antialias=False)` along one axis.

    `W_h @ image @ W_w.T` resizes. "bicubic" is Keys' kernel with a = −0.75 and the border repeated, which CLIP's
    position embeddings need; `jax.image.resize(..., "cubic")` has a = −0.5 and antialiases: another function.
    """
    coordinates = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    return _sampling_matrix(coordinates, n_in, method)


def upsample_matrix(
    grid: int,
    patch: int,
    valid: int,
    original: int,
    *,
    aligned: bool = True,
    steps: int = 1,
    partial: bool = False,
    columns: int | None = None,
) -> Float32[np.ndarray, "original columns"]:
    """Patch grid -> pixels of the original image along one axis, bilinear, the padding cropped away.

    Pixel y of the original lies at (y + ½)·valid/original − ½ in the resized image and at (that + ½)/patch − ½ in the
    grid. Where original == valid this is "upsample the padded grid to padded pixels and crop".

    Args:
      grid: cells that hold image, ⌈valid / patch⌉ (or more: cells of padding then blend in at the border).
      patch: pixels a cell spans, the patch size or the output stride.
      valid: pixels of the resized image before padding.
      original: pixels of the picture that came in.
      aligned: False stretches the padded grid over the unpadded image, as the released code does: masks are off by up
        to half a patch (a 520 px image has 33 cells = 528 px).
      steps: 1, or 2: cells -> pixels of the resized image -> pixels of the original, each bilinear, as the released
        code does.
      partial: the last cell may be missing, where a ResNet reads images unpadded: the one before reaches to the border.
      columns: cells of the array that the matrix multiplies, when a bucket holds more than `grid`; they weigh zero.
    """
    if (grid + partial) * patch < valid:
        raise ValueError(f"a grid must cover the image, but {grid} cells of {patch} px are less than {valid} px")
    if steps == 2 and valid != original:
        matrix = upsample_matrix(grid, patch, valid, valid, aligned=aligned, partial=partial, columns=columns)
        return interpolation_matrix(valid, original) @ matrix
    if aligned:
        matrix = _sampling_matrix((np.arange(original) + 0.5) * (valid / original) / patch - 0.5, grid, "bilinear")
    else:
        matrix = interpolation_matrix(grid, original)
    if columns is None:
        return matrix
    if columns < grid:
        raise ValueError(f"the array must hold the grid, but {columns} columns are fewer than {grid} cells")
    return np.pad(matrix, ((0, 0), (0, columns - grid)))


def _sampling_matrix(
    coordinates: Float64[np.ndarray, " n_out"], n_in: int, method: Literal["bilinear", "bicubic"]
) -> Float32[np.ndarray, "n_out n_in"]:
    """Rows that sample a signal of `n_in` cells at `coordinates` (cell centres at 0, 1, …), its border repeated."""
    first = np.floor(coordinates).astype(int)
    t = coordinates - first
    if method == "bilinear":
        offsets, weights = (0, 1), (1 - t, t)
    elif method == "bicubic":
        offsets, weights = (-1, 0, 1, 2), (_keys(1 + t), _keys(t), _keys(1 - t), _keys(2 - t))
    else:
        raise ValueError(f"method must be 'bilinear' or 'bicubic', got {method!r}")
    matrix = np.zeros((len(coordinates), n_in))
    for offset, weight in zip(offsets, weights, strict=True):
        np.add.at(matrix, (np.arange(len(coordinates)), np.clip(first + offset, 0, n_in - 1)), weight)
    return matrix.astype(np.float32)


def _keys(distance: Float64[np.ndarray, " n"], a: float = -0.75) -> Float64[np.ndarray, " n"]:
    """Keys' cubic convolution kernel (1981) at distances 0..2."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
