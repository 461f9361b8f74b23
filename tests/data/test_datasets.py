"""EmojiScenes: what goes in as files comes out of array_record, pixel for pixel, without TensorFlow."""

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data import datasets
from maskclip_jax.data.datasets import EmojiScenes, ImageCorpus
from maskclip_jax.data.scene_classes import SCENE_CLASSES
from maskclip_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(16, 20), (9, 31), (24, 8)]


def scene(index: int) -> tuple[bytes, bytes]:
    rng = np.random.default_rng(index)
    image, label = io.BytesIO(), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*SIZES[index], 3), dtype=np.uint8)).save(image, "JPEG", quality=92)
    labels = Image.fromarray(rng.integers(0, 66, SIZES[index], dtype=np.uint8))
    labels.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())  # shipped masks are palette PNGs
    labels.save(label, "PNG")
    return image.getvalue(), label.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "scenes"
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in (2, 0, 1):  # written out of order, so that sorting shows
        image, label = scene(i)
        (root / "images" / f"{i:04d}.jpg").write_bytes(image)
        (root / "labels" / f"{i:04d}.png").write_bytes(label)
    return root


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "scenes.zip"
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("classes.json", "[]")
        for split, indices in (("heldout", (1, 0)), ("heldout_twemoji", (2,))):
            for i in indices:
                for part, content in zip(("images/{:04d}.jpg", "labels/{:04d}.png"), scene(i), strict=True):
                    pack.writestr(f"{split}/{part.format(i)}", content)
    return path


def assert_is_scene(example: dict, index: int) -> None:
    image, label = (np.asarray(Image.open(io.BytesIO(content))) for content in scene(index))
    np.testing.assert_array_equal(example["image"], image)
    np.testing.assert_array_equal(example["label"], label[..., None])
    assert example["image"].dtype == example["label"].dtype == np.uint8
    assert example["name"] == f"{index:04d}".encode()


@pytest.mark.parametrize(("called", "split"), [("scenes", "scenes"), ("my scenes-2", "my_scenes_2"), ("all", "data")])
def test_a_folder_is_one_split_of_its_own_name_in_the_order_of_names(folder, tmp_path, called, split):
    folder = folder.rename(folder.with_name(called))
    builder = EmojiScenes(folder, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    sources = builder.as_data_source()
    assert set(sources) == {split}
    assert len(sources[split]) == 3
    for i in range(3):
        assert_is_scene(sources[split][i], i)


def test_png_images_are_scenes_too(folder, tmp_path):
    with Image.open(folder / "images" / "0001.jpg") as image:
        pixels = np.array(image)
    Image.fromarray(pixels).save(folder / "images" / "0001.png")
    (folder / "images" / "0001.jpg").unlink()
    builder = EmojiScenes(folder, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    source = builder.as_data_source("scenes")
    for i in range(3):
        assert_is_scene(source[i], i)


def empty_split(folder: Path) -> None:
    for file in (folder / "images").iterdir():
        file.unlink()


def wrong_label(folder: Path) -> None:
    Image.fromarray(np.full(SIZES[1], 66, np.uint8)).save(folder / "labels" / "0001.png")


def wrong_size(folder: Path) -> None:
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "labels" / "0001.png")


def training_arrays(folder: Path) -> None:
    """What `make_scenes --train` writes."""
    shutil.rmtree(folder)
    folder.mkdir()
    np.save(folder / "images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    (folder / "scenes.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (empty_split, "has none"),
        (lambda folder: (folder / "images" / "0001.jpg").write_bytes(b""), r"0001\.jpg is empty \(0 bytes\)"),
        (lambda folder: (folder / "labels" / "0001.png").write_bytes(b""), r"0001\.png is empty \(0 bytes\)"),
        (lambda folder: (folder / "images" / "0001.jpg").write_bytes(b"no image"), r"0001\.jpg is none of them"),
        (wrong_label, r"0001\.png has the value 66, which is no label here: masks hold 0\.\.65"),
        (wrong_size, r"its image's size \[9, 31\], but .*0001\.png has \[5, 5\]"),
        (lambda folder: (folder / "labels" / "0001.png").unlink(), r"0001\.png is missing"),
        (lambda folder: (folder / "images" / "0001.jpg").unlink(), r"0001\.jpg is missing"),
        (
            lambda folder: shutil.copy(folder / "images" / "0001.jpg", folder / "images" / "0001.jpeg"),
            "two named '0001'",
        ),
        (training_arrays, r"holds arrays \(images\.npy\), which need no preparing"),
    ],
)
def test_scenes_that_cannot_be(folder, tmp_path, spoil, words):
    """One line each, whether it shows in the names of the files or when they are read; nothing half-prepared stays."""
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        EmojiScenes(folder, data_dir=tmp_path / "tfds").download_and_prepare()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "tfds").rglob("*.json"))


def test_every_shipped_mask_holds_scene_classes_and_has_its_image():
    with zipfile.ZipFile(ROOT / "experiments" / "toy_world" / "heldout.zip") as pack:
        files = {name: pack.read(name) for name in pack.namelist() if name.endswith((".jpg", ".png"))}
    assets = ROOT / "maskclip_jax" / "assets" / "scenes"
    files |= {str(path): path.read_bytes() for path in assets.rglob("*") if path.suffix in (".jpg", ".png")}
    masks = [name for name in files if name.endswith(".png")]
    assert len(masks) == 2 * 500 + 64
    assert len(files) == 2 * len(masks)
    for name in masks:
        image = name.replace("/labels/", "/images/").replace(".png", ".jpg")
        with Image.open(io.BytesIO(files[name])) as mask, Image.open(io.BytesIO(files[image])) as picture:
            assert mask.size == picture.size
            assert mask.mode == "P"
            assert mask.getextrema()[1] < len(SCENE_CLASSES), name


def test_a_zip_has_a_split_for_each_folder(archive, tmp_path):
    builder = EmojiScenes(archive, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    sources = builder.as_data_source()
    assert {split: len(source) for split, source in sources.items()} == {"heldout": 2, "heldout_twemoji": 1}
    assert_is_scene(sources["heldout"][0], 0)
    assert_is_scene(sources["heldout"][1], 1)
    assert_is_scene(sources["heldout_twemoji"][0], 2)


def test_bad_sources_are_told_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        EmojiScenes(tmp_path / "nowhere", data_dir=tmp_path)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(UserError, match="is neither"):
        EmojiScenes(tmp_path / "text.zip", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        EmojiScenes(tmp_path / "empty", data_dir=tmp_path)
    with pytest.raises(UserError, match="no source came"):
        EmojiScenes(data_dir=tmp_path).download_and_prepare()


def test_records_are_written_as_they_come(folder, tmp_path, monkeypatch):
    """None waits for the others: TFDS would sort 1 GB in memory, and more with TensorFlow. A shard may be empty."""
    monkeypatch.setattr(datasets, "SHARD", 1)
    (folder / "images" / "0001.jpg").write_bytes(b"")
    (tmp_path / "tfds" / "emoji_scenes" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)  # a run that was killed
    builder = EmojiScenes(folder, data_dir=tmp_path / "tfds", on_error="skip")
    made, builder.report = [], lambda done: made.append((done, len(list((tmp_path / "tfds").rglob("*-of-00003")))))
    builder.download_and_prepare()
    assert made == [(1, 1), (3, 3)]
    assert builder.info.splits["scenes"].shard_lengths == [1, 0, 1]
    source = builder.as_data_source("scenes")
    assert len(source) == 2
    assert_is_scene(source[1], 2)
    assert [path.name for path in (tmp_path / "tfds" / "emoji_scenes").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize("name", ["Images", "Labels", "split/Images"])
def test_folders_of_other_case_are_told(folder, tmp_path, name):
    folder.rename(tmp_path / "of")
    (tmp_path / "of" / "split").mkdir()
    for part in ("images", "labels"):
        (tmp_path / "of" / part).rename(tmp_path / "of" / "split" / part) if "/" in name else None
    (tmp_path / "of" / name.lower()).rename(tmp_path / "of" / name)
    with pytest.raises(UserError, match="images and masks lie in images/ and labels/"):
        ImageCorpus(tmp_path / "of", data_dir=tmp_path)


def test_masks_of_another_kind_are_no_corpus_without_masks(folder, tmp_path):
    for mask in (folder / "labels").iterdir():
        mask.rename(mask.with_suffix(".tif"))
    with pytest.raises(UserError, match=r"0000\.png is missing"):
        ImageCorpus(folder, data_dir=tmp_path)


def run(program: str) -> None:
    """In a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_tensorflow_and_no_tfds_before_it_is_asked_for(archive, tmp_path):
    run(f"""
import sys, numpy as np, maskclip_jax.data
from maskclip_jax.data.sources import open_source
assert "tensorflow_datasets" not in sys.modules
from maskclip_jax.data.datasets import EmojiScenes
from maskclip_jax.data.scene_classes import SCENE_CLASSES
EmojiScenes({str(archive)!r}, data_dir={str(tmp_path)!r}).download_and_prepare()
prepared = open_source("tfds:emoji_scenes?split=heldout&label=label&data_dir=" + {str(tmp_path)!r})
direct = open_source({str(archive)!r} + "!heldout")
assert len(prepared) == len(direct) == 2
for i in range(2):
    np.testing.assert_array_equal(prepared[i].image, direct[i].image)
    np.testing.assert_array_equal(prepared[i].labels, direct[i].labels)
assert "tensorflow" not in sys.modules
""")
