"""A zip file is read as the folder that was packed: the same names, pixels and masks; one line for any damage."""

import io
import pickle
import struct
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data.archives import Archive, Member
from maskclip_jax.data.sources import open_source
from maskclip_jax.data.walk import walk
from maskclip_jax.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def odd_files() -> dict[str, bytes]:
    """Pictures of the kinds that are easily read wrongly, hidden files, folders in folders; a mask for each."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray((PIXELS[..., 0].astype(np.uint16) * 257).astype(np.uint16))
    pictures = {
        "turned.jpg": encoded(Image.fromarray(PIXELS), "JPEG", exif=exif),
        "turned.tiff": encoded(Image.fromarray(PIXELS), "TIFF", tiffinfo={0x0112: 8}),
        "deep.png": encoded(deep),
        "clear.png": encoded(Image.fromarray(np.dstack([PIXELS, PIXELS[..., :1]]))),
        "cmyk.jpg": encoded(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
        "sub/moving.gif": encoded(Image.fromarray(PIXELS), "GIF"),
        "sub/new.avif": encoded(Image.fromarray(PIXELS), "AVIF"),
    }
    files = {"data/images/._clear.png": b"AppleDouble", "__MACOSX/data/images/._deep.png": b"AppleDouble"}
    for name, content in pictures.items():
        unique = name.replace(".", "-") + name[name.rindex(".") :]  # turned.jpg and turned.tiff are one name else
        mask = PIXELS[..., 0].T if "turned" in name else PIXELS[..., 0]
        files[f"data/images/{unique}"] = content
        files[f"data/labels/{Path(unique).with_suffix('.png')}"] = encoded(Image.fromarray(np.ascontiguousarray(mask)))
    return files


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_file_is_the_folder_in_it(tmp_path, method):
    archive = packed(tmp_path / "A.ZIP", odd_files(), method)
    with zipfile.ZipFile(archive) as unpacked:
        unpacked.extractall(tmp_path)
    folder = open_source(str(tmp_path / "data"))
    for inside in ("data", "/data/", "data/"):
        zipped = open_source(f"{archive}!{inside}")
        assert zipped.names == folder.names
    assert len(folder) == 7
    for index in range(len(folder)):
        for one, other in zip(folder[index], zipped[index], strict=True):
            np.testing.assert_array_equal(one, other)
    images = open_source(f"{archive}!data/images")
    assert images.names == folder.names
    assert images[0].labels is None
    assert open_source(f"{archive}[2:4]").source.names == [f"data/images/{name}" for name in folder.names]
    again = pickle.loads(pickle.dumps(zipped))
    np.testing.assert_array_equal(again[3].image, folder[3].image)
    with ThreadPoolExecutor(8) as threads:
        for found, index in zip(threads.map(again.__getitem__, [*range(7)] * 8), [*range(7)] * 8, strict=True):
            np.testing.assert_array_equal(found.image, folder[index].image)


def test_a_folder_whose_name_has_a_mark(tmp_path):
    (tmp_path / "wow!.zip").mkdir()
    (tmp_path / "wow!.zip" / "a.png").write_bytes(encoded(Image.fromarray(PIXELS)))
    assert open_source(str(tmp_path / "wow!.zip")).names == ["a"]
    archive = packed(tmp_path / "b!.zip", {"c/a.png": encoded(Image.fromarray(PIXELS))})
    assert open_source(f"{archive}!c").names == ["a"]


def refused(path: Path, words: str) -> None:
    """One line, which names the file; nothing else is raised."""
    with pytest.raises(UserError, match=words) as error:
        open_source(f"{path}!d")[0]
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_errors_name_the_member(tmp_path):
    good = encoded(Image.fromarray(PIXELS))
    for number, (content, words) in enumerate(
        [(b"", "is empty"), (b"text", "is none of them"), (good[:-30], "damaged or truncated"), (good[:20], "a.png")]
    ):
        refused(packed(tmp_path / f"{number}.zip", {"d/images/a.png": content}), rf"{number}\.zip!d/images/a\.png")
        refused(tmp_path / f"{number}.zip", words)
    masked = {"d/images/a.png": good, "d/labels/a.png": b"text"}
    refused(packed(tmp_path / "mask.zip", masked), r"mask\.zip!d/labels/a\.png is none of them")
    refused(packed(tmp_path / "lacking.zip", masked | {"d/images/b.png": good}), r"d/labels/b\.png is missing")
    refused(packed(tmp_path / "other.zip", {"e/a.png": good}), "has no folder 'd'")
    refused(packed(tmp_path / "none.zip", {"d/a.txt": good}), "has none")


@pytest.mark.parametrize(
    "name", ["../d/a.png", "/d/a.png", "d/../../a.png", "d//a.png", "..\\d\\a.png", "d/" * 4000 + "a.png"]
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    refused(packed(tmp_path / "a.zip", {"d/b.png": b"x", name: b"x"}), "names in a zip file stay inside it")


def test_names_that_windows_wrote(tmp_path):
    archive = packed(tmp_path / "a.zip", {"d\\images\\a.png": encoded(Image.fromarray(PIXELS))})
    assert open_source(f"{archive}!d").names == ["a"]


def test_many_folders_in_folders(tmp_path):
    packed(tmp_path / "a.zip", {"d/" * 2000 + "a.png": encoded(Image.fromarray(PIXELS))})
    assert len(list(walk(Member(Archive(tmp_path / "a.zip"))))) == 1


def test_bombs_are_refused_by_their_size(tmp_path, monkeypatch):
    """A member far larger than its picture is not unpacked; a picture that is large may be."""
    monkeypatch.setattr("maskclip_jax.data.archives._SMALL", 50_000)
    flat = encoded(Image.new("RGB", (400, 300)), "BMP")
    assert len(flat) > 50_000
    assert open_source(f"{packed(tmp_path / 'flat.zip', {'d/a.bmp': flat})}!d")[0].image.shape == (300, 400, 3)
    for name, content in (("a.png", bytes(10**6)), ("b.png", encoded(Image.fromarray(PIXELS)) + bytes(10**6))):
        archive = packed(tmp_path / f"{name}.zip", {f"d/{name}": content})
        refused(archive, r"has 1,000,\d\d\d bytes unpacked")


def flag_encrypted(data: bytes) -> bytes:
    """The same archive with the flag of encryption on every member, in both headers."""
    changed = bytearray(data)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            (flags,) = struct.unpack_from("<H", changed, at + place)
            struct.pack_into("<H", changed, at + place, flags | 1)
    return bytes(changed)


def test_encrypted_members_are_refused(tmp_path):
    path = packed(tmp_path / "a.zip", {"d/a.png": encoded(Image.fromarray(PIXELS))})
    path.write_bytes(flag_encrypted(path.read_bytes()))
    refused(path, r"a\.zip!d/a\.png is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_any_damage_is_one_line(tmp_path, method):
    """Bytes overturned and cut off anywhere: what can be read is, and everything else is a UserError."""
    whole = packed(tmp_path / "whole.zip", {f"d/{i}.png": encoded(Image.fromarray(PIXELS)) for i in range(3)}, method)
    content, path, said = whole.read_bytes(), tmp_path / "a.zip", []
    random = np.random.default_rng(method)
    for trial in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 1 + trial % 3):
            damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(bytes(damaged[: random.integers(0, len(content))] if trial % 5 == 0 else damaged))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile on names that come twice
            said.append("")
            try:
                source = open_source(f"{path}!d")
                for index in range(len(source)):
                    source[index]
            except UserError as error:
                said[-1] = str(error)
    failures = [text for text in said if text]
    assert len(failures) > 100
    assert all("\n" not in text and str(path) in text for text in failures)
