"""Image files in and out: any picture -> uint8 RGB; masks, pictures and tables -> files never half written."""

import contextlib
import io
import json
import os
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped, UInt8
from PIL import Image

from maskclip_jax.errors import UserError

# Only raster formats that Pillow decodes itself: EPS and the like would start an outside program on the user's file.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
IGNORE = 255  # the label that no class owns
IGNORE_16 = 65535  # the same where there are so many classes that one owns 255

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# `warnings.catch_warnings` swaps process-wide state, so two loader threads must not be inside it at once.
_quiet_lock = threading.Lock()


def read_image(path: str | os.PathLike, data: bytes | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Reads one picture as upright 8-bit RGB.

    Grey, palette and CMYK are converted, transparency is laid on white, 16-bit grey is scaled (65535 becomes 255), the
    EXIF orientation is applied, and of an animation the first frame is taken.

    Args:
      path: a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, TGA, JPEG 2000, AVIF or ICO file.
      data: its content, where that was read before (out of a zip file, say); `path` is then only its name.

    Raises:
      UserError: the file is missing, a folder, empty, not an image, truncated, too large, or has 32-bit samples.
    """
    path = _regular_file(path, data)
    with _open(path, data) as (image, orientation):
        image = _to_rgb(image, path)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return np.array(image)


def stored_image(path: str | os.PathLike, data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What a corpus keeps of a picture, and its height and width: whoever decodes it sees what `read_image` sees.

    An upright RGB JPEG or PNG is kept as it is; anything else (grey, CMYK, turned by EXIF …) becomes an RGB PNG.
    Raises UserError as `read_image` does; every pixel was decoded once.
    """
    path = _regular_file(path, data)
    with _open(path, data) as (image, orientation):
        plain = image.mode == "RGB" and image.format in ("JPEG", "PNG") and "transparency" not in image.info
        if plain and orientation not in _UPRIGHT:
            return data, (image.height, image.width)
    pixels = read_image(path, data)
    return _png(Image.fromarray(pixels)), pixels.shape[:2]


def ignored_label(classes: int) -> int:
    """The label that marks pixels of no class: 255, or 65535 where there are more than 255 classes."""
    return IGNORE if classes <= IGNORE else IGNORE_16


def stored_label(labels: UInt8[np.ndarray, "H W"]) -> bytes:
    """An 8-bit grey PNG: whatever decodes it, palettes looked up or not, its values are the labels."""
    return _png(Image.fromarray(labels))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def read_label_png(path: str | os.PathLike, data: bytes | None = None) -> Integer[np.ndarray, "H W"]:
    """Reads a label file (indexed, 8-bit grey or 16-bit grey PNG) as class indices; palettes are not looked up.

    Returns uint8, or uint16 for a 16-bit file. Raises UserError as `read_image` does, and for colour images.
    """
    path = _regular_file(path, data)
    with _open(path, data) as (image, _):
        if image.mode not in ("P", "L", "I;16"):
            raise UserError(
                f"a label file must be an indexed or grey PNG, but {path} has mode {image.mode}: save class indices"
            )
        return np.array(image)


def write_image(path: str | os.PathLike, rgb: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a picture in the format of the path's suffix (.png, .jpg, .webp …). Raises UserError if it cannot."""
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower(), None)
    if kind is None or kind not in Image.SAVE:
        raise UserError(f"an image's suffix names its format, but {path} ends in '{path.suffix}': use .png or .jpg")
    with atomic_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, format=kind)


def write_label_png(
    path: str | os.PathLike, labels: Integer[np.ndarray, "H W"], palette: UInt8[np.ndarray, "C 3"]
) -> None:
    """Writes `label_png(labels, palette)` to a file. Raises UserError as that does, or where it cannot be written."""
    content = label_png(labels, palette)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def label_png(labels: Integer[np.ndarray, "H W"], palette: UInt8[np.ndarray, "C 3"]) -> bytes:
    """Class indices as a PNG whose pixel values *are* the indices, coloured by its palette.

    Up to 255 classes make an indexed PNG in which 255 means "ignore"; with more, the file is 16-bit grey without a
    palette and 65535 means "ignore". (256 classes and nothing ignored fit an indexed PNG too.)

    Args:
      labels: class indices in 0..C-1, or the ignore value.
      palette: one colour per class; its length is the number of classes.

    Raises:
      UserError: a label is neither a class nor the ignore value.
    """
    classes = len(palette)
    ignore = ignored_label(classes)
    wrong = (labels < 0) | ((labels >= classes) & (labels != ignore))
    if wrong.any():
        raise UserError(
            f"labels must be class indices 0..{classes - 1} or {ignore} (ignore), "
            f"but one is {labels[wrong][0]}: pass a palette with one colour per class"
        )
    if classes <= IGNORE or (classes == IGNORE + 1 and not (labels == ignore).any()):
        image = Image.fromarray(labels.astype(np.uint8))
        colours = np.zeros((256, 3), np.uint8)
        colours[IGNORE] = 224  # ignored pixels: light grey
        colours[:classes] = palette
        image.putpalette(colours.tobytes())
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    return _png(image)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented UTF-8 JSON. NumPy scalars and arrays are written as numbers and lists; NaN as null."""
    text = json_text(obj)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(obj: Any) -> str:
    """The text of the file that `write_json` writes (see there)."""
    return json.dumps(_plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to; a clean exit renames it to `path`, an error removes it.

    The folder is created when it is missing. Raises UserError when the system refuses (no permission, disk full …).
    """
    path = Path(path)
    start = os.fsencode(path.name)[:64].decode(errors="ignore")  # systems count a name's bytes, not its characters
    temporary = path.with_name(f".{start}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"an output file must be writable, but {path} is not ({_line(error)}): choose another"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _regular_file(path: str | os.PathLike, data: bytes | None = None) -> Path:
    path = Path(path)
    if data is not None:
        if not data:
            raise UserError(f"an image must hold data, but {path} is empty (0 bytes): download or export it again")
        return path
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # told below
    except OSError as error:  # a name too long, a loop of links, a folder closed to us
        raise UserError(f"an image must be reachable, but {path} is not ({_line(error)}): check the path") from error
    if path.is_dir():
        raise UserError(f"an image must be a file, but {path} is a folder: name the files in it")
    if not path.exists():
        raise UserError(f"an image must exist, but there is no {path}: check the path")
    if not path.is_file():
        raise UserError(f"an image must be a regular file, but {path} is a device or a pipe: save it to a file first")
    if path.stat().st_size == 0:
        raise UserError(f"an image must hold data, but {path} is empty (0 bytes): download or export it again")
    return path


@contextlib.contextmanager
def _open(path: Path, data: bytes | None = None) -> Iterator[tuple[Image.Image, int]]:
    """The first frame, decoded, with its EXIF orientation (1: upright). Every decoder's failure becomes a UserError."""
    try:
        with _quiet_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no reason to talk while the pixels are fine
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path if data is None else io.BytesIO(data), formats=_formats())
            try:
                orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            except Exception:
                orientation = 1  # unreadable EXIF: the picture itself may still be whole
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(f"an image must have at most {limit:,} pixels, but {path} has more: scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"an image must be PNG, JPEG, WebP, GIF, BMP or TIFF, but {path} is none of them: convert it"
        ) from error
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error on a damaged file
        raise UserError(f"an image must be readable, but {path} is not ({_line(error)}): export it again") from error
    with image:
        try:
            image.load()
        except Exception as error:
            raise UserError(
                f"an image must be whole, but {path} is damaged or truncated ({_line(error)}): download it again"
            ) from error
        yield image, orientation


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF and would raise KeyError


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16-bit samples that this Pillow opens as int32
        return _eight_bits(np.asarray(image))
    if image.mode in ("I", "F"):
        raise UserError(f"an image must have 8 or 16 bits a sample, but {path} has 32 (mode {image.mode}): convert it")
    if image.mode.startswith("I;16"):
        return _eight_bits(np.asarray(image))
    try:
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            # tRNS chunks (grey, palette and RGB images with one transparent colour) become alpha here as well
            straight = image.convert("LA") if image.mode == "La" else image
            rgba = straight.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise UserError(
            f"an image must be grey, RGB, CMYK or indexed, but {path} has mode {image.mode}: convert it"
        ) from error


def _eight_bits(samples: Shaped[np.ndarray, "H W"]) -> Image.Image:
    """16-bit samples to 8-bit RGB: 65535 / 257 = 255, so white stays white; Pillow's own conversion clips at 255."""
    grey = (samples.astype(np.uint32) + 128) // 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _plain(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, np.ndarray):
        return _plain(obj.tolist())
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, np.generic):
        return _plain(obj.item())
    if isinstance(obj, float) and not np.isfinite(obj):
        return None  # JSON has no NaN: readers other than Python's would fail on it
    return obj


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
