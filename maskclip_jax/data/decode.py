"""Decoding pictures: whatever Pillow opens by itself -> its first frame, upright; one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from maskclip_jax.data.whole_files import reason
from maskclip_jax.errors import UserError

# Only raster formats that Pillow decodes itself: EPS and the like would start an outside program on the user's file.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
# Their suffixes, but that of float pictures: what every command takes for an image when it looks through a folder.
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".jpf"),
    *(".jpx", ".j2c", ".jpc", ".jfif", ".jpe", ".mpo", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".pam"),
    *(".tga", ".icb", ".vda", ".vst", ".ico"),
)
SOME_SUFFIXES = ", ".join(SUFFIXES[:5]) + " …"  # for messages

_ORIENTATION = 0x0112  # of EXIF and TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # a TIFF tag
# `warnings.catch_warnings` swaps process-wide state, so two loader threads must not be inside it at once.
_quiet_lock = threading.Lock()


@contextlib.contextmanager
def pixel_limit(most: int | None) -> Iterator[None]:
    """Images may have up to `most` pixels meanwhile, in the whole process; None leaves Pillow's limit as it is."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = before if most is None else most
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextlib.contextmanager
def decoded(name: str, source: Path | bytes, most: int | None = None) -> Iterator[tuple[Image.Image, int]]:
    """The first frame as it is stored, and the orientation that it still needs (see `turned`).

    Args:
      name: what messages call the file.
      source: the file, or its content.
      most: pixels that the image may have; None is `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
      UserError: it is no image, damaged, empty, or too large for `most` or for the memory.
    """
    try:
        image = _loaded(name, source, most)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):  # Pillow's limit on the comments of a PNG
            raise
        image = _loaded(name, _without_text(source if isinstance(source, bytes) else source.read_bytes()), most)
    with image, _fits(name, image):
        # Read now: Pillow has turned a TIFF by itself, which shows here; a PNG's may come after its pixels.
        try:
            with _quietly():
                orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:
            orientation = 1  # unreadable EXIF: the picture itself is whole
        yield image, orientation if orientation in _UPRIGHT else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture upright, as its orientation asks."""
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def pixels_of(file: io.BufferedIOBase) -> int:
    """Pixels that an image's header promises; 0 where it is no image. Nothing is decoded."""
    with contextlib.suppress(Exception), _quietly():
        return int(np.prod(Image.open(file, formats=_formats()).size))
    return 0


def upright_size(file: Path) -> tuple[tuple[int, int], bool]:
    """Height and width of an image upright, from its header, and whether it is stored turned. Raises UserError."""
    try:
        with _quietly(), Image.open(file, formats=_formats()) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            width, height = image.size
            swapped = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # whose size Pillow gives upright
    except Exception as error:  # decoders raise anything
        raise UserError(f"an image must be readable, but {file} is not ({reason(error)}): check it") from error
    return ((width, height) if swapped else (height, width)), orientation != 1 and orientation in _UPRIGHT


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode as 8-bit RGB: transparency laid on white, 16 bits scaled. Raises UserError for 32-bit samples."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16-bit samples that this Pillow opens as int32
        return _eight_bits(image, np.asarray(image))
    if image.mode in ("I", "F"):
        raise UserError(f"an image must have 8 or 16 bits a sample, but {name} has 32 (mode {image.mode}): convert it")
    if image.mode.startswith("I;16"):
        return _eight_bits(image, np.asarray(image))
    try:
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            # tRNS chunks (grey, palette and RGB images with one transparent colour) become alpha here as well
            straight = image.convert("LA") if image.mode == "La" else image
            rgba = straight.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(
            f"an image must be grey, RGB, CMYK or indexed, but {name} has mode {image.mode}: convert it"
        ) from error


def _loaded(name: str, source: Path | bytes, most: int | None) -> Image.Image:
    """Opened and decoded. Every decoder's failure becomes a UserError, but `ValueError` for a PNG's long comments."""
    try:
        with _quietly():  # no warnings of damaged metadata while the pixels are fine
            image = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_formats())
    except Image.DecompressionBombError as error:
        raise _too_large(name, int(re.findall(r"\d+", str(error))[0]), most) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"an image must be PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or JPEG 2000, but {name} is none of them: "
            "convert it"
        ) from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on a damaged file
        if "MAX_TEXT" in str(error):
            raise
        raise UserError(f"an image must be readable, but {name} is not ({reason(error)}): export it again") from error
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS if most is None else most
    if pixels == 0 or (limit is not None and pixels > limit):
        image.close()
        if pixels == 0:
            raise UserError(f"an image must have pixels, but {name} is {image.width}×{image.height}: export it again")
        raise _too_large(name, pixels, most)
    try:
        with _fits(name, image):
            image.load()
    except UserError:
        image.close()
        raise
    except Exception as error:
        image.close()
        if "MAX_TEXT" in str(error):
            raise
        raise UserError(
            f"an image must be whole, but {name} is damaged or truncated ({reason(error)}): download it again"
        ) from error
    return image


def _too_large(name: str, pixels: int, most: int | None) -> UserError:
    limit, remedy = (Image.MAX_IMAGE_PIXELS, ", or allow more (--max-pixels)") if most is None else (most, "")
    here = "" if most is None else " here"
    return UserError(
        f"an image must have at most {limit:,} pixels{here}, but {name} has {pixels:,}: scale it down{remedy}"
    )


@contextlib.contextmanager
def _fits(name: str, image: Image.Image) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"an image must fit into memory, but {name} ({image.width}×{image.height}) does not: scale it down"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF and would raise KeyError


def _without_text(data: bytes) -> bytes:
    """A PNG without comments and colour profile: Pillow refuses those over 1 MB, and the pixels need neither.

    XMP is kept, which may hold the orientation, as it may be: not compressed, and short.
    """
    kept, start = [data[:8]], 8
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        chunk = data[start : start + 12 + length]
        start += 12 + length
        xmp = chunk[8:].startswith(b"XML:com.adobe.xmp\0\0") and length < 2**20
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or xmp:
            kept.append(chunk)
    return b"".join(kept)


def _eight_bits(image: Image.Image, samples: Shaped[np.ndarray, "H W"]) -> Image.Image:
    """16-bit samples to 8-bit RGB: 65535 / 257 = 255, so white stays white; Pillow's own conversion clips at 255."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))  # a TIFF of 12 bits has 4095 for white
    most = 2 ** min(16, max(8, int(np.max(bits)))) - 1
    samples = samples.astype(np.uint32)
    grey = (255 * np.minimum(samples, most) + most // 2) // most
    if isinstance(clear := image.info.get("transparency"), int):
        grey[samples == clear] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
