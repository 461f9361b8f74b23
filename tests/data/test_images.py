"""Files in and out: every kind of picture a person has, every way a file can be broken."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data import images
from maskclip_jax.errors import UserError


@pytest.fixture
def picture():
    """20×30, four different corners, smooth enough for JPEG."""
    y, x = np.mgrid[:20, :30]
    return np.stack([8 * x, 12 * y, 255 - 4 * x - 4 * y], -1).clip(0, 255).astype(np.uint8)


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


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_the_stored_indices(tmp_path, bits):
    stored = np.arange(16, dtype=np.uint8).reshape(2, 8) % 2**bits
    packed = np.packbits(np.unpackbits(stored[..., None], axis=-1)[..., 8 - bits :].reshape(2, -1), axis=-1)
    pieces = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in pieces]
    found = images.read_label_png("mask.png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    np.testing.assert_array_equal(found, stored)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_labels_under_a_false_name(tmp_path, kind):
    """A JPEG's values are near the indices, which is worse than none."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png", format=kind)
    with pytest.raises(UserError, match=f"a.png is {kind}"):
        images.read_label_png(tmp_path / "a.png")
