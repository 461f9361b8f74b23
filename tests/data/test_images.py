"""Files in and out: every kind of picture a person has, every way a file can be broken."""

import io
import json
import struct
import warnings
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


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "gif", "webp", "jpg"])
def test_formats(tmp_path, picture, suffix):
    path = tmp_path / f"a.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95, "subsampling": 0}}
    Image.fromarray(picture).save(path, **options.get(suffix, {}))
    tolerance = {"jpg": 12, "gif": 40}.get(suffix, 0)
    result = images.read_image(path)
    assert result.dtype == np.uint8
    assert result.shape == (20, 30, 3)
    assert np.abs(result.astype(int) - picture).max() <= tolerance


def test_grey_is_repeated(tmp_path, picture):
    Image.fromarray(picture[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), picture[..., :1].repeat(3, -1))


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0]


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png").tolist() == [[[1, 2, 3]]]


def test_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    assert images.read_image(tmp_path / "a.png")[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_palette_with_transparency_lies_on_white(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert images.read_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [0, 255, 0]]


def test_alpha_is_composited_on_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    half = round(255 + (200 - 255) * 128 / 255), round(255 - 255 * 128 / 255)  # 227, 127
    expected = [[200, 0, 0], [255, 255, 255], [half[0], half[1], half[1]]]
    np.testing.assert_allclose(images.read_image(tmp_path / "a.png")[0], expected, atol=1)
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "la.png")
    np.testing.assert_allclose(images.read_image(tmp_path / "la.png")[0, :, 0], [200, 255, half[0]], atol=1)


def test_transparent_colour_of_an_rgb_file_lies_on_white(tmp_path):
    Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8)).save(tmp_path / "a.png", transparency=(9, 9, 9))
    assert images.read_image(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [1, 2, 3]]


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


def _one_line(error, path):
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert "must" in message  # the rule
    assert ", but " in message  # what came
    assert ": " in message  # the remedy
    return message


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9])
def test_truncated_files_give_one_line(tmp_path, suffix, keep):
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(data, format={"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data.getvalue()[: int(keep * len(data.getvalue()))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as error:
            images.read_image(path)
    _one_line(error, path)


def test_bytes_are_read_as_a_file_is(tmp_path, picture):
    path = tmp_path / "photo.jpg"
    Image.fromarray(picture).save(path)
    data = path.read_bytes()
    np.testing.assert_array_equal(images.read_image("elsewhere.jpg", data), images.read_image(path))
    for broken, message in [(b"", "is empty"), (b"text", "is none of them"), (data[:-20], "is damaged or truncated")]:
        with pytest.raises(UserError, match=f"photo.jpg {message}"):
            images.read_image("photo.jpg", broken)


def test_unusable_paths_give_one_line_each(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello, I am no picture")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (tmp_path / "folder.png").mkdir()
    said = {}
    for name in ("empty.png", "text.png", "drawing.eps", "folder.png", "missing.png"):
        with pytest.raises(UserError) as error:
            images.read_image(tmp_path / name)
        said[name] = _one_line(error, tmp_path / name)
    assert "empty (0 bytes)" in said["empty.png"]
    assert "none of them" in said["text.png"]
    assert "folder" in said["folder.png"]
    assert "no " in said["missing.png"]
    assert len(set(said.values())) == 5


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


def test_label_png_holds_the_indices(tmp_path):
    labels = np.array([[0, 1, 2], [255, 2, 0]])
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]], np.uint8)
    images.write_label_png(tmp_path / "new" / "a.png", labels, palette)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.array(image), labels)
        np.testing.assert_array_equal(np.array(image.convert("RGB"))[0], palette)
    np.testing.assert_array_equal(images.read_label_png(tmp_path / "new" / "a.png"), labels)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]  # no temporary file is left


@pytest.mark.parametrize(("classes", "mode", "ignore"), [(256, "P", None), (255, "P", 255), (459, "I;16", 65535)])
def test_label_png_with_many_classes(tmp_path, classes, mode, ignore):
    labels = np.array([[0, classes - 1]] if ignore is None else [[0, classes - 1], [ignore, 7]])
    images.write_label_png(tmp_path / "a.png", labels, np.zeros((classes, 3), np.uint8))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
    np.testing.assert_array_equal(images.read_label_png(tmp_path / "a.png"), labels)


def test_256_classes_and_ignored_pixels_take_16_bits(tmp_path):
    labels = np.array([[0, 255, 65535]])
    images.write_label_png(tmp_path / "a.png", labels, np.zeros((256, 3), np.uint8))
    np.testing.assert_array_equal(images.read_label_png(tmp_path / "a.png"), labels)
    assert [images.ignored_label(classes) for classes in (1, 255, 256, 65535)] == [255, 255, 65535, 65535]


@pytest.mark.parametrize("bad", [3, 254, -1, 256])
def test_a_label_without_a_class_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match=f"one is {bad}"):
        images.write_label_png(tmp_path / "a.png", np.array([[0, bad]]), np.zeros((3, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_colour_picture_is_no_label_file(tmp_path, picture):
    images.write_image(tmp_path / "a.png", picture)
    with pytest.raises(UserError, match="indexed or grey"):
        images.read_label_png(tmp_path / "a.png")


def test_write_image_and_its_errors(tmp_path, picture):
    images.write_image(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), picture)
    with pytest.raises(UserError, match="suffix"):
        images.write_image(tmp_path / "a.txt", picture)
    with pytest.raises(UserError, match="writable"):
        images.write_image(tmp_path / "a.png" / "b.png", picture)  # its folder is a file


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    images.write_json(path, {"whole": 1})

    def half_written():
        with images.atomic_path(path) as temporary:
            temporary.write_text('{"ha')
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="power"):
        half_written()
    assert json.loads(path.read_text()) == {"whole": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_of_numpy_values(tmp_path):
    value = {"area": np.float32(0.5), "counts": np.arange(3), "nan": float("nan"), "name": "déjà vu", 3: (np.int64(4),)}
    images.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"area": 0.5, "counts": [0, 1, 2], "nan": None, "name": "déjà vu", "3": [4]}
    assert "déjà" in text


def test_temporary_names_are_short_in_bytes(tmp_path):
    path = tmp_path / ("\N{DOG}" * 60 + ".json")  # 245 bytes: the system takes it
    images.write_json(path, 1)
    assert json.loads(path.read_text()) == 1


def test_a_path_too_long_gives_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        images.read_image(tmp_path / ("a" * 300 + ".png"))
    _one_line(error, tmp_path)
