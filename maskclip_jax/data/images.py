"""Image files in and out: any picture -> uint8 RGB; masks, pictures and tables -> files never half written."""

import io
import os
import stat
from pathlib import Path

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from maskclip_jax.data.archives import Member
from maskclip_jax.data.decode import decoded, to_rgb, turned
from maskclip_jax.data.whole_files import atomic_path, reason
from maskclip_jax.errors import UserError

IGNORE = 255  # the label of pixels without a class
IGNORE_16 = 65535  # the same where there are so many classes that 255 is one


def read_image(
    file: str | os.PathLike | Member, data: bytes | None = None, *, most_pixels: int | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Reads one picture as upright 8-bit RGB; files, members of zip files and uploads all come through here.

    Grey, palette and CMYK are converted, transparency is laid on white, 16-bit grey is scaled (65535 becomes 255), the
    orientation of EXIF or TIFF is applied, and of an animation the first frame is taken.

    Args:
      file: a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, TGA, JPEG 2000, AVIF or ICO file.
      data: its content, where that was read before; `file` is then only its name.
      most_pixels: that the image may have; None is Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
      UserError: the file is missing, a folder, empty, not an image, truncated, too large, or has 32-bit samples.
    """
    with decoded(str(file), _source(file, data), most_pixels) as (image, orientation):
        # copied: the array may be written to, and no decoder's buffer is held
        return np.array(turned(to_rgb(image, str(file)), orientation))


def read_content(file: str | os.PathLike | Member) -> bytes:
    """The bytes of a file that is not empty. Raises UserError, which names it."""
    source = _source(file, None)
    try:
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise UserError(f"an image must be readable, but {file} is not ({reason(error)}): check the path") from error
    except MemoryError as error:
        raise UserError(f"a file must fit into memory, but {file} does not: leave it out") from error


def stored_image(file: str | os.PathLike | Member, data: bytes) -> tuple[bytes, tuple[int, int]]:
    """What a corpus stores of a picture, which decodes to `read_image`'s pixels, and its height and width.

    An upright RGB JPEG or PNG is kept as it is; anything else (grey, CMYK, turned by EXIF …) becomes an RGB PNG.
    Raises UserError as `read_image` does; every pixel was decoded once.
    """
    with decoded(str(file), _source(file, data)) as (image, orientation):
        plain = image.mode == "RGB" and image.format in ("JPEG", "PNG") and "transparency" not in image.info
        if plain and orientation == 1:
            return data, (image.height, image.width)
    pixels = read_image(file, data)
    return encoded_png(Image.fromarray(pixels)), pixels.shape[:2]


def ignored_label(classes: int) -> int:
    """The label that marks pixels of no class: 255, or 65535 where there are more than 255 classes."""
    return IGNORE if classes <= IGNORE else IGNORE_16


def stored_label(labels: UInt8[np.ndarray, "H W"]) -> bytes:
    """An 8-bit grey PNG: whatever decodes it, palettes looked up or not, its values are the labels."""
    return encoded_png(Image.fromarray(labels))


def encoded_png(image: Image.Image, **options: int) -> bytes:
    """A PNG file's content; `options` are Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def read_label_png(file: str | os.PathLike | Member, data: bytes | None = None) -> Integer[np.ndarray, "H W"]:
    """Reads a label file (indexed or grey PNG) as class indices; palettes are not looked up.

    Returns uint8, or uint16 for a 16-bit file. Raises UserError as `read_image` does, and for colour images.
    """
    content = read_content(file) if data is None else data
    with decoded(str(file), content) as (image, _):
        if image.format != "PNG" or image.mode not in ("P", "L", "1", "I;16"):
            raise UserError(
                f"a label file must be an indexed or grey PNG, but {file} is {image.format} of mode {image.mode}: "
                "save class indices"
            )
        labels = np.array(image, np.uint8 if image.mode == "1" else None)
        # Of grey with 2 or 4 bits Pillow makes 8 (3 becomes 255), but the indices are what was stored.
        bits = content[24] if image.mode == "L" else 8  # IHDR, always the first chunk
        return labels // (255 // (2**bits - 1)) if bits < 8 else labels


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
    return encoded_png(image)


def _source(file: str | os.PathLike | Member, data: bytes | None) -> Path | bytes:
    """What to decode: the content, or the path of a regular file that is not empty."""
    empty = f"an image must hold data, but {file} is empty (0 bytes): download or export it again"
    if data is None and isinstance(file, Member):
        data = file.read_bytes()
    if data is not None:
        if not data:
            raise UserError(empty)
        return data
    path = Path(file)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"an image must exist, but there is no {path}: check the path") from error
    except (OSError, ValueError) as error:  # a name too long or with a NUL, a loop of links, a folder closed to us
        raise UserError(f"an image must be reachable, but {path} is not ({reason(error)}): check the path") from error
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"an image must be a file, but {path} is a folder: name the files in it")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"an image must be a regular file, but {path} is a device or a pipe: save it to a file first")
    if found.st_size == 0:
        raise UserError(empty)
    return path
