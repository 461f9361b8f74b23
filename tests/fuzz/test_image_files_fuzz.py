"""Over a thousand damaged pictures and archives, seeded: read, or a UserError on one line, in bounded memory."""

import io
import random
import zipfile
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from mutations import most_memory, mutated_bytes
from PIL import Image

from maskclip_jax.data.archives import Archive, Member
from maskclip_jax.data.decode import FORMATS, pixel_limit
from maskclip_jax.data.images import read_image, read_label_png, stored_image
from maskclip_jax.data.walk import files_below
from maskclip_jax.errors import UserError

ROUNDS = 70  # of every picture
MOST_PIXELS = 2**22
MEMORY = 2**29  # bytes that all mutations of one picture may take


def encoded(form: str, mode: str = "RGB", options: Mapping[str, Any] = MappingProxyType({})) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image, np.uint16) * 257)
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


KINDS = {
    "png": ("PNG",),
    "png-palette": ("PNG", "P", {"transparency": 3}),
    "png-16": ("PNG", "I;16"),
    "png-alpha": ("PNG", "LA", {"exif": exif(6)}),
    "jpeg": ("JPEG", "RGB", {"exif": exif(5)}),
    "jpeg-progressive": ("JPEG", "L", {"progressive": True}),
    "jpeg-cmyk": ("JPEG", "CMYK"),
    "mpo": ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (24, 20))]}),
    "tiff-deflate": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "tiff-lzw": ("TIFF", "P", {"compression": "tiff_lzw"}),
    "tiff-16": ("TIFF", "I;16"),
    "webp": ("WEBP", "RGBA", {"exif": exif(3)}),
    "webp-lossless": ("WEBP", "RGB", {"lossless": True}),
    "gif": ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (24, 20))]}),
    "bmp": ("BMP",),
    "ico": ("ICO", "RGBA", {"sizes": [(16, 16)]}),
    "tga": ("TGA", "RGB", {"compression": "tga_rle"}),
    "ppm": ("PPM",),
    "jp2": ("JPEG2000",),
    "avif": ("AVIF",),
}


def refused(content: bytes, read) -> int:
    """1 where the content is refused, in one short line; 0 where it gives a small enough picture."""
    message = refusal(content, read)
    assert message is None or ("\n" not in message and len(message) < 900), message
    return int(message is not None)


def refusal(content: bytes, read) -> str | None:
    try:
        found = read()
    except UserError as error:
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{content[:3000]!r}") from error
    assert found.shape[0] * found.shape[1] <= MOST_PIXELS
    return None


def kept(content: bytes) -> np.ndarray:
    """What a corpus would keep, read again."""
    return read_image("a", stored_image("a", content)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures(kind):
    form, *more = KINDS[kind]
    assert form in FORMATS
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    original, rng, before = encoded(form, *more), random.Random(kind), most_memory()
    assert read_image(f"a.{kind}", original).shape[2] == 3
    count = 0
    with pixel_limit(MOST_PIXELS):
        for _ in range(ROUNDS):
            content = mutated_bytes(original, rng)
            count += refused(content, partial(read_image, "a", content))
            refused(content, partial(read_label_png, "a", content))
            refused(content, partial(kept, content))
    assert count > 0  # the damage is damage
    assert most_memory() - before < MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives(tmp_path, packed):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packed) as archive:
        for name, kind in (("images/a.png", "PNG"), ("images/d/é.jpg", "JPEG"), ("images/c.bmp", "BMP")):
            archive.writestr(name, encoded(kind))
    rng, before, count, path = random.Random(packed), most_memory(), 0, tmp_path / "a.zip"

    def read():
        files = files_below(Member(Archive(path)), (".png", ".jpg", ".bmp"))
        return max((read_image(file) for _, file in files), key=np.size, default=np.zeros((1, 1, 3)))

    path.write_bytes(buffer.getvalue())
    assert read().shape == (20, 24, 3)
    with pixel_limit(MOST_PIXELS):
        for _ in range(ROUNDS):
            content = mutated_bytes(buffer.getvalue(), rng)
            path.write_bytes(content)
            count += refused(content, read)
    assert count > ROUNDS // 4
    assert most_memory() - before < MEMORY
