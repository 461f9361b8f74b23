"""`segment` on files as people have them: right, or exit code 2 and one line for every problem."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.commands.segment import output_names
from maskclip_jax.data.images import read_image
from maskclip_jax.data.vocabulary import class_palette, class_set

ROOT = Path(__file__).parents[2]
WORDS = "dog, cat, grass, sky"
NAMES = ["dog", "cat", "grass", "sky"]
TRAILS = ("_overlay.png", "_labels.png", ".json")


@pytest.fixture
def segment(call, model, tmp_path):
    """`segment(images, classes=…, …)` with the tiny model into `tmp_path/out`."""

    def run(*images, classes=WORDS, out=None, options=()):
        return call(
            "segment", *images, "--classes", classes, "--model", model, "--out", out or tmp_path / "out", *options
        )

    return run


def written(out: Path) -> set[str]:
    """Every file in the output folder, hidden ones too."""
    return {str(p.relative_to(out)) for p in out.rglob("*")}


def labels_of(out: Path, name: str) -> np.ndarray:
    with Image.open(out / f"{name}_labels.png") as image:
        assert image.mode == "P"
        return np.array(image)


def check(out: Path, name: str, source: Path, names: list[str]) -> np.ndarray:
    """The three files of one image agree with each other and with the image; returns the labels."""
    labels, pixels = labels_of(out, name), read_image(source)
    assert labels.shape == pixels.shape[:2]
    assert labels.max() < len(names)
    content = json.loads((out / f"{name}.json").read_text())
    assert [content["height"], content["width"]] == list(labels.shape)
    assert [entry["class"] for entry in content["classes"]] == names
    for index, entry in enumerate(content["classes"]):
        assert entry["index"] == index
        assert entry["area"] == pytest.approx((labels == index).mean(), abs=1e-9)
        assert (entry["confidence"] is None) == (entry["area"] == 0)
        assert entry["confidence"] is None or 0 < entry["confidence"] <= 1
    assert sum(entry["area"] for entry in content["classes"]) == pytest.approx(1)
    return labels


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


REFUSED = {
    "a folder without images": ({"images": ["{tmp}/none"]}, "a folder of images holds"),
    "no such model": ({"options": ["--model", "nonsense"]}, "a model is embedded"),
    "no such model path": ({"options": ["--model", "/no/such/model"]}, "a model is embedded"),
    "model that is no checkpoint": ({"options": ["--model", "{tmp}/none"]}, "config.json"),
    "model that is an image": ({"options": ["--model", "{photo}"]}, "weights are a file"),
    "model of an endless name": ({"options": ["--model", "m" * 300]}, "m" * 300),
    "a hub id without network": ({"options": ["--model", "no-such/model"]}, "no-such/model"),
    "no such tokenizer": ({"options": ["--tokenizer", "nonsense"]}, "tokenizer"),
    "ViTs have one stride": ({"options": ["--dense-stride", "16"]}, "patch size"),
    "no class": ({"classes": ""}, "a class needs a name"),
    "an empty class": ({"classes": "dog,,cat"}, "a class needs a name"),
    "duplicate classes": ({"classes": "dog, cat, Dog"}, "one class only"),
    "duplicate synonyms": ({"classes": "dog, Dog; cat"}, "must differ"),
    "missing class file": ({"classes": "{tmp}/words.txt"}, "class file must exist"),
    "empty class file": ({"classes": "{tmp}/empty.txt"}, "at least one class"),
    "binary class file": ({"classes": "{tmp}/binary.txt"}, "UTF-8"),
    "out is a file": ({"out": "{photo}"}, "--out is a folder"),
    "out lies in a file": ({"out": "{photo}/out"}, "--out is a folder"),
    "threshold above 1": ({"options": ["--prompt-denoising", "1.5"]}, "above 0 and up to 1"),
    "threshold 0": ({"options": ["--prompt-denoising", "0"]}, "above 0 and up to 1"),
    "threshold nan": ({"options": ["--key-smoothing", "nan"]}, "above 0 and up to 1"),
    "threshold of words": ({"options": ["--background-threshold", "half"]}, "above 0 and up to 1, not 'half'"),
    "no window": ({"options": ["--window", "0"]}, "at least 1"),
    "half a pixel": ({"options": ["--window", "22.5"]}, "whole number of at least 1, not '22.5'"),
    "stride without window": ({"options": ["--stride", "16"]}, "no window came"),
    "stride beyond window": ({"options": ["--window", "16", "--stride", "32"]}, "at most the window"),
    "stride too small": ({"options": ["--window", "320", "--stride", "1"]}, "larger stride"),
    "no batch": ({"options": ["--batch-size", "0"]}, "at least 1"),
    "background is a class": ({"options": ["--background", "sky, wall"]}, "one class only"),
    "a class named background": ({"classes": "dog, Background", "options": ["--background", "wall"]}, "by itself"),
    "empty background": ({"options": ["--background", ""]}, "a class needs a name"),
    "no such templates": ({"options": ["--templates", "haiku"]}, "templates must be"),
    "a template without a place": ({"options": ["--templates", "a {photo"]}, "one {}"),
    "no such option": ({"options": ["--colour", "red"]}, "--colour"),
    "no such dtype": ({"options": ["--dtype", "int8"]}, "int8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(segment, photo, tmp_path, case):
    """Exit code 2, one line, and no output folder."""
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00dog")
    before = written(tmp_path)
    arguments, words = REFUSED[case]
    fill = lambda text: text.replace("{tmp}", str(tmp_path)).replace("{photo}", str(photo))  # noqa: E731
    options = [fill(text) if case != "a template without a place" else text for text in arguments.get("options", ())]
    result = segment(
        *map(fill, arguments.get("images", ["{photo}"])),
        classes=fill(arguments.get("classes", WORDS)),
        out=fill(arguments["out"]) if "out" in arguments else None,
        options=options,
    )
    assert result.code == 2
    assert result.lines == []
    assert len(result.errors) == 1
    assert result.errors[0].startswith("error: ")
    assert words in result.errors[0]
    assert written(tmp_path) == before


def class_names(out: Path) -> list[str]:
    return [entry["class"] for entry in json.loads((out / "photo.json").read_text())["classes"]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("dog", ["dog"]),
        (" dog ,cat, ", ["dog", "cat"]),
        ("sofa, couch; dog", ["sofa", "dog"]),
        ("{file}", ["sofa", "größter Hund", "red car"]),
        ("voc20", [str(entry) for entry in class_set("voc20")]),
    ],
)
def test_forms_of_classes(segment, photo, tmp_path, text, names):
    file = tmp_path / "words.txt"
    file.write_text("# furniture\nsofa, couch\n\ngrößter Hund\nred car\n", encoding="utf-8")
    assert segment(photo, classes=text.replace("{file}", str(file))).code == 0
    assert class_names(tmp_path / "out") == names
    check(tmp_path / "out", "photo", photo, names)


def test_many_classes_make_a_deep_label_file(segment, photo, tmp_path):
    """Beyond 256 classes a palette is too small: 16-bit grey."""
    assert segment(photo, classes="context459").code == 0
    with Image.open(tmp_path / "out" / "photo_labels.png") as image:
        assert image.mode == "I;16"
        assert np.array(image).max() < 459


@pytest.mark.parametrize(
    ("options", "names", "changes"),
    [
        (["--naive"], NAMES, True),
        (["--key-smoothing"], NAMES, True),
        (["--key-smoothing", "0.5"], NAMES, None),
        (["--prompt-denoising", "0.9"], NAMES, None),
        (["--window", "32", "--stride", "16"], NAMES, True),
        (["--window", "24"], NAMES, True),
        (["--background", "tree, person"], ["background", *NAMES], True),
        (["--background-threshold", "1"], ["background", *NAMES], True),
        (["--short-side", "32"], NAMES, True),
        (["--templates", "the red {}"], NAMES, True),
        (["--fidelity", "released"], NAMES, True),
        (["--dtype", "bfloat16"], NAMES, None),
        (["--batch-size", "1"], NAMES, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_options_reach_the_prediction(segment, photo, tmp_path, options, names, changes):
    """Each runs, and those that must change something do (None: on this random model it need not)."""
    assert segment(photo, out=tmp_path / "plain").code == 0
    result = segment(photo, options=options)
    assert (result.code, result.errors) == (0, [])
    check(tmp_path / "out", "photo", photo, names)
    plain, other = ((tmp_path / f / "photo.json").read_text() for f in ("plain", "out"))
    assert changes is None or (plain != other) == changes
    if "--background-threshold" in options:
        assert (labels_of(tmp_path / "out", "photo") == 0).all()  # nothing is entirely sure


def test_smoothing_without_a_number_is_smoothing_by_1(segment, photo, tmp_path):
    for out, options in (("a", ["--key-smoothing"]), ("b", ["--key-smoothing", "1"])):
        assert segment(photo, out=tmp_path / out, options=options).code == 0
    assert (tmp_path / "a" / "photo.json").read_bytes() == (tmp_path / "b" / "photo.json").read_bytes()


def test_colours_of_palette_and_legend_agree(segment, photo, tmp_path):
    assert segment(photo).code == 0
    with Image.open(tmp_path / "out" / "photo_labels.png") as image:
        colours = np.array(image.getpalette()).reshape(-1, 3)[: len(NAMES)]
    np.testing.assert_array_equal(colours, class_palette(NAMES))
    labels = labels_of(tmp_path / "out", "photo")
    overlay = read_image(tmp_path / "out" / "photo_overlay.png")
    enlarged = 512 // 60 * 40  # rows of the picture; the legend lies below
    legend = overlay[enlarged:].reshape(-1, 3)
    assert len(np.unique(labels)) > 1
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
        monkeypatch.setattr("maskclip_jax.commands.segment.print_result", stop)
    result = segment(*files)
    assert (result.code, len(result.errors)) == (130, 1)
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
