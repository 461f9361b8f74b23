"""`segment` on files as people have them: right, or exit code 2 and one line for every problem."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_outputs import NAMES, TRAILS, WORDS, check, labels_of, written
from PIL import Image

from maskclip_jax import load_clip, segment_images
from maskclip_jax.data.images import read_image
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.segment.files import output_names

ROOT = Path(__file__).parents[2]


def ordinary_files(folder: Path, draw) -> dict[str, Path]:
    """Pictures of odd sizes in every mode that ordinary files come in."""
    alpha = np.dstack([draw(31, 47, 1), np.tile(np.linspace(0, 255, 47, dtype=np.uint8), (31, 1))])
    deep = (draw(20, 33, 2)[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    pictures = {
        "one.png": Image.fromarray(draw(1, 1)),
        "thin.jpg": Image.fromarray(draw(37, 501)),
        "tall.webp": Image.fromarray(draw(203, 19)),
        "grey.jpg": Image.fromarray(draw(45, 64)).convert("L"),
        "alpha.png": Image.fromarray(alpha),
        "alpha.webp": Image.fromarray(alpha),
        "deep.png": Image.fromarray(deep),
        "palette.png": Image.fromarray(draw(52, 40, 3)).convert("P"),
        "bits.png": Image.fromarray(draw(30, 30, 4)).convert("1"),
        "cmyk.jpg": Image.fromarray(draw(48, 41, 5)).convert("CMYK"),
    }
    for name, image in pictures.items():
        image.save(folder / name)
    return {name: folder / name for name in pictures}


def test_ordinary_files(segment, tmp_path, draw):
    folder = tmp_path / "in"
    folder.mkdir()
    files = ordinary_files(folder, draw)
    result = segment(*files.values())
    out = tmp_path / "out"
    assert (result.code, result.errors) == (0, [])
    assert result.lines[-1] == f"wrote {len(files)} of {len(files)} images to {out}"
    stems = {name: name.split(".")[0] for name in files} | {"alpha.webp": "alpha-2"}
    assert written(out) == {stem + trail for stem in stems.values() for trail in TRAILS} | {"segment.json"}
    kinds = [len(np.unique(check(out, stem, files[name], NAMES))) for name, stem in stems.items()]
    assert max(kinds) > 1
    record = json.loads((out / "segment.json").read_text())
    assert record["skipped"] == []
    assert record["settings"]["classes"] == WORDS
    assert set(record["versions"]) == {"jax", "flax", "device"}


def test_a_folder_is_its_images(segment, tmp_path, draw):
    """Subfolders too; what is no image by its name is not looked at, and folders named like images are not read."""
    folder = tmp_path / "in"
    (folder / "deeper" / "album.jpg").mkdir(parents=True)
    Image.fromarray(draw(20, 30)).save(folder / "b.JPG")
    Image.fromarray(draw(30, 20)).save(folder / "deeper" / "album.jpg" / "a.png")
    (folder / "notes.txt").write_text("no image")
    result = segment(folder)
    assert (result.code, result.errors) == (0, [])
    assert written(tmp_path / "out") == {n + t for n in "ab" for t in TRAILS} | {"segment.json"}


def test_masks_come_out_upright(segment, tmp_path, draw):
    """All eight EXIF orientations of one picture get its mask; the mask itself is neither mirrored nor turned."""
    upright = draw(40, 64, 7)
    turn = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),  # the camera was turned: shown turned clockwise, so stored counter-clockwise
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    files = []
    for orientation, stored in turn.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        files.append(tmp_path / f"o{orientation}.png")
        Image.fromarray(np.ascontiguousarray(stored(upright))).save(files[-1], exif=exif)
    assert segment(*files).code == 0
    expected = labels_of(tmp_path / "out", "o1")
    assert expected.shape == (40, 64)
    for turned in (expected[:, ::-1], expected[::-1], expected[::-1, ::-1]):
        assert (turned != expected).mean() > 0.02  # else this test could not fail
    for orientation in turn:
        np.testing.assert_array_equal(labels_of(tmp_path / "out", f"o{orientation}"), expected)


def bad_files(folder: Path, draw) -> dict[Path, str]:
    """Files that cannot be segmented, and words of the line that says so."""
    good = folder / "good.jpg"
    Image.fromarray(draw(60, 80)).save(good)
    content = good.read_bytes()
    broken = {
        "truncated.jpg": content[: len(content) // 2],
        "header.jpg": content[:20],
        "empty.jpg": b"",
        "text.jpg": b"I am not an image\n" * 20,
    }
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    return {
        folder / "truncated.jpg": "truncated",
        folder / "header.jpg": "header.jpg is",
        folder / "empty.jpg": "is empty (0 bytes)",
        folder / "text.jpg": "none of them",
        folder / "missing.jpg": "there is no",
        folder / ("x" * 300): "too long",
        folder / "two\nlines.jpg": "there is no",
    }


def test_good_images_among_bad_ones(segment, tmp_path, draw):
    folder = tmp_path / "in"
    folder.mkdir()
    bad = bad_files(folder, draw)
    order = list(bad)
    result = segment(*order[:4], folder / "good.jpg", *order[4:])
    assert result.code == 2
    assert len(result.errors) == len(bad)  # one line each
    for line, (path, words) in zip(result.errors, bad.items(), strict=True):
        assert line.startswith("error: ")
        assert words in line
        assert path.name.split("\n")[0] in line
    out = tmp_path / "out"
    assert result.lines[-1] == f"wrote 1 of {len(bad) + 1} images to {out}"
    assert written(out) == {"good" + trail for trail in TRAILS} | {"segment.json"}
    check(out, "good", folder / "good.jpg", NAMES)
    assert json.loads((out / "segment.json").read_text())["skipped"] == [str(path) for path in bad]


def test_only_bad_images(segment, tmp_path, draw):
    bad = list(bad_files(tmp_path, draw))
    result = segment(*bad)
    assert (result.code, result.lines, len(result.errors)) == (2, [], len(bad))
    assert written(tmp_path / "out") == {"segment.json"}


def test_what_is_written_is_what_the_library_says(segment, model, tmp_path, draw):
    photo = tmp_path / "photo.png"
    Image.fromarray(draw(40, 64, 7)).save(photo)
    assert segment(photo).code == 0
    (expected,) = segment_images([read_image(photo)], NAMES, load_clip(model))
    np.testing.assert_array_equal(check(tmp_path / "out", "photo", photo, NAMES), expected.labels)
    assert (expected.labels[:, ::-1] != expected.labels).mean() > 0.02  # else a mirrored file would pass
    for entry in json.loads((tmp_path / "out" / "photo.json").read_text())["classes"]:
        score = expected.scores[entry["class"]]
        assert entry["area"] == pytest.approx(score.area)
        assert entry["confidence"] == (None if np.isnan(score.confidence) else pytest.approx(score.confidence))


def test_one_colour_for_a_class_everywhere(segment, tmp_path, draw):
    """Palette, tint and legend: the same colour, over the right pixels of the right picture."""
    photo = tmp_path / "photo.png"
    Image.fromarray(draw(400, 600, 3)).save(photo)  # large enough not to be enlarged
    assert segment(photo).code == 0
    with Image.open(tmp_path / "out" / "photo_labels.png") as image:
        colours = np.array(image.getpalette()).reshape(-1, 3)[: len(NAMES)]
    np.testing.assert_array_equal(colours, class_palette(NAMES))
    labels, pixels = labels_of(tmp_path / "out", "photo"), read_image(photo)
    overlay = read_image(tmp_path / "out" / "photo_overlay.png")
    assert len(np.unique(labels)) > 1

    grey = pixels @ np.array([0.299, 0.587, 0.114])
    tinted = 0.2 * pixels + 0.2 * grey[..., None] + 0.6 * colours[labels]
    assert (np.abs(overlay[:400, :600] - tinted).max(-1) <= 1).mean() > 0.7  # the rest is borders
    legend = overlay[400:].reshape(-1, 3)
    for index, colour in enumerate(colours):
        swatch = (legend == colour).all(-1).sum() > 50
        assert swatch == (labels == index).any(), NAMES[index]


def test_names_of_outputs(tmp_path):
    paths = [
        Path(p) for p in ("a.jpg", "b/a.png", "a-2.jpg", "c/a.jpg", "segment.jpg", "é 日本.png", "x" * 251 + ".jpg")
    ]
    names = output_names(paths)
    assert list(names.values()) == ["a", "a-2", "a-2-2", "a-3", "segment-2", "é 日本", "x" * 200]
    assert output_names([Path("日" * 80 + ".jpg")])[Path("日" * 80 + ".jpg")] == "日" * 66


def test_names_of_any_kind(segment, tmp_path, draw):
    """Unicode, spaces, long names, and bytes that are not UTF-8; one image named twice is segmented once."""
    names = ["日本 größe 🐕.png", "x" * 250 + ".png", os.fsdecode(b"latin-\xe9.png")]
    files = [tmp_path / name for name in names]
    for file in files:
        Image.fromarray(draw(20, 30)).save(file, format="PNG")
    result = segment(*files, files[0])
    assert (result.code, result.errors) == (0, [])
    out = tmp_path / "out"
    stems = ["日本 größe 🐕", "x" * 200, os.fsdecode(b"latin-\xe9")]
    assert written(out) == {stem + trail for stem in stems for trail in TRAILS} | {"segment.json"}
    assert json.loads((out / f"{stems[2]}.json").read_text())["image"] == f"{tmp_path}/latin-\\xe9.png"
    assert any("latin-" in line for line in result.lines)


@pytest.mark.parametrize("moment", ["while writing", "between images"])
def test_interrupted(segment, tmp_path, draw, monkeypatch, moment):
    """Ctrl-C: exit code 130, one line, whole files only."""
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for file in files:
        Image.fromarray(draw(20, 30)).save(file)

    def stop(*_):
        raise KeyboardInterrupt

    if moment == "while writing":
        monkeypatch.setattr("maskclip_jax.data.images.os.replace", stop)
    else:
        monkeypatch.setattr("maskclip_jax.cli.segment.print_result", stop)
    result = segment(*files)
    whole = 0 if moment == "while writing" else 1  # of the second it is not known what came of it
    line = f"stopped: {whole} of 2 images are in {tmp_path / 'out'}; the same command starts with the first again"
    assert (result.code, result.errors) == (130, [line])
    assert written(tmp_path / "out") == (set() if moment == "while writing" else {"a" + trail for trail in TRAILS})


def test_nowhere_to_write(segment, photo, tmp_path, monkeypatch):
    """A full disk is one line, and nothing half-written stays."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskclip_jax.data.images.os.replace", full)
    result = segment(photo)
    assert (result.code, len(result.errors)) == (2, 1)
    assert "No space left on device" in result.errors[0]
    assert written(tmp_path / "out") == set()


@pytest.mark.filterwarnings("always")
def test_a_cache_that_cannot_be_written(segment, photo, tmp_path, monkeypatch):
    """A read-only home is one line, and no reason to stop."""
    monkeypatch.setenv("MASKCLIP_JAX_CACHE", str(photo / "cache"))
    result = segment(photo)
    assert (result.code, len(result.errors)) == (0, 1)
    assert result.errors[0].startswith("warning: the text classifier is not cached: ")
    check(tmp_path / "out", "photo", photo, NAMES)


def test_as_a_program(model, photo, tmp_path, cache):
    """`python run.py segment`: nothing but results on stdout, nothing on stderr, the working directory left alone."""
    (tmp_path / "cwd").mkdir()
    command = [sys.executable, ROOT / "run.py", "segment", photo, "--classes", WORDS, "--model", model, "--out", "o/p"]
    environment = {**os.environ, "MASKCLIP_JAX_CACHE": str(cache)}
    result = subprocess.run(
        command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == str(photo)
    assert lines[-1] == f"wrote 1 of 1 images to {Path('o/p')}"
    assert all("% of the image   confidence 0." in line for line in lines[1:-1])
    assert written(tmp_path / "cwd") == {
        "o",
        "o/p",
        *(f"o/p/{n}" for n in ("segment.json", *("photo" + t for t in TRAILS))),
    }
