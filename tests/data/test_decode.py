"""Decoding: depths, modes, orientations and metadata of every format, and the limits of pixels and memory."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from maskclip_jax.data import images
from maskclip_jax.data.decode import pixel_limit
from maskclip_jax.errors import UserError


@pytest.fixture
def picture():
    """20×30, four different corners, smooth enough for JPEG."""
    y, x = np.mgrid[:20, :30]
    return np.stack([8 * x, 12 * y, 255 - 4 * x - 4 * y], -1).clip(0, 255).astype(np.uint8)


def _png16(samples, colour_type=0):
    """A 16-bit PNG written by hand from the specification: Pillow must not be the judge of itself."""
    height, width = samples.shape[:2]

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    samples = np.array([[0, 257, 32768, 65535]])
    (tmp_path / "grey.png").write_bytes(_png16(samples))
    assert images.read_image(tmp_path / "grey.png")[0, :, 1].tolist() == [0, 1, 128, 255]
    (tmp_path / "rgb.png").write_bytes(_png16(samples[..., None].repeat(3, -1), colour_type=2))
    np.testing.assert_allclose(images.read_image(tmp_path / "rgb.png")[0, :, 1], [0, 1, 128, 255], atol=1)
    Image.fromarray(samples.astype(np.uint16)).save(tmp_path / "grey.tiff")
    assert images.read_image(tmp_path / "grey.tiff")[0, :, 1].tolist() == [0, 1, 128, 255]


def test_sixteen_bits_with_a_transparent_grey(tmp_path):
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.png", transparency=0)
    assert images.read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 1, 255]


def test_white_of_twelve_bits_is_white(tmp_path):
    """A TIFF written by hand: 2 pixels of 12 bits, 0 and 4095."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 12) + b"\x00\x0f\xff\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tiff").write_bytes(data)
    assert images.read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "many tEXt", "icc", "after the pixels"])
def test_a_png_may_hold_long_comments(tmp_path, picture, chunk):
    info, options = PngImagePlugin.PngInfo(), {}
    if chunk == "zTXt":
        info.add_text("workflow", "x" * 3_000_000, zip=True)
    elif chunk == "iTXt":
        info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    elif chunk == "many tEXt":
        for i in range(70):
            info.add_text(f"part {i}", "x" * 1_000_000)
    elif chunk == "icc":
        options["icc_profile"] = bytes(3_000_000)
    else:
        info.add(b"zTXt", b"late\0\0" + zlib.compress(b"x" * 3_000_000), after_idat=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path, pnginfo=info, exif=exif, compress_level=1, **options)
    np.testing.assert_array_equal(images.read_image(path), picture[::-1, ::-1])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "1", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_a_tiff(tmp_path, mode):
    black = {
        "LA": (0, 255),
        "RGBA": (0, 0, 0, 255),
        "CMYK": (0, 0, 0, 255),
        "YCbCr": (0, 128, 128),
        "LAB": (0, 128, 128),
    }
    image = (
        Image.new("LA", (4, 3), (0, 255)).convert("PA") if mode == "PA" else Image.new(mode, (4, 3), black.get(mode, 0))
    )
    image.save(tmp_path / "a.tiff")
    assert images.read_image(tmp_path / "a.tiff").max() <= 1


def test_32_bit_samples_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="8 or 16 bits"):
        images.read_image(tmp_path / "a.tiff")


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # magenta + yellow = red
    np.testing.assert_allclose(images.read_image(tmp_path / "a.jpg")[8, 8], [255, 0, 0], atol=6)


# What the EXIF standard says of each value, as where row 0 / column 0 of the stored picture belong: the upright picture
# of this stored one, in NumPy.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),  # 90° clockwise
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),  # 90° counter-clockwise
}


def _stored(pixels, kind, orientation, **options) -> bytes:
    """A file that says how it is to be turned, in the way of its format."""
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    if kind == "TIFF":
        options["tiffinfo"] = {0x0112: orientation}
    elif kind == "XMP":
        attribute = f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"'
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", f"<rdf:RDF><rdf:Description {attribute}/></rdf:RDF>")
    else:
        options["exif"] = exif
    if kind == "MPO":
        options |= {"save_all": True, "append_images": [Image.fromarray(pixels)]}
    Image.fromarray(pixels).save(data, "PNG" if kind == "XMP" else kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("XMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "jpeg", "quality": 95}, 12),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("MPO", {"quality": 95}, 24),
        ("AVIF", {"quality": 95}, 12),
    ],
    ids=lambda value: str(value) if value else "",
)
def test_every_orientation_of_every_format(picture, kind, options, tolerance):
    for orientation, upright in UPRIGHT.items():
        found = images.read_image("a", _stored(picture, kind, orientation, **options))
        expected = upright(picture)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= tolerance, orientation
        kept, size = images.stored_image("a", _stored(picture, kind, orientation, **options))
        assert size == expected.shape[:2]
        with Image.open(io.BytesIO(kept)) as again:  # whoever decodes it sees the same, EXIF looked at or not
            assert np.abs(np.asarray(again).astype(int) - expected).max() <= tolerance


def test_broken_exif_does_not_spoil_the_picture(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert images.read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(images.read_image(tmp_path / f"a.{suffix}")[4, 4], [255, 0, 0], atol=3)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    for limit in (3000, 1000):  # Pillow warns past the limit and raises past twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(
            UserError, match=rf"at most {limit:,} pixels, but .* has 4,096: scale it down, or .*--max-pix"
        ):
            images.read_image(tmp_path / "a.png")
        with pixel_limit(4096):
            assert images.read_image(tmp_path / "a.png").shape == (64, 64, 3)
        assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"at most 900 pixels here, but .* has 4,096: scale it down$"):
        images.read_image(tmp_path / "a.png", most_pixels=900)


def test_memory_that_is_too_small_is_said(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")

    def too_much(*_):
        raise MemoryError

    monkeypatch.setattr(images, "to_rgb", too_much)
    with pytest.raises(UserError, match=r"must fit into memory, but .*a\.png \(64×64\) does not"):
        images.read_image(tmp_path / "a.png")
