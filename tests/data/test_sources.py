"""Data sources: one text, the same example for the same index, one line for what cannot be read."""

import pickle
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data.sources import ArraySource, open_source
from maskclip_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 9, 3), np.uint8)
LABELS = RNG.integers(0, 4, (6, 8, 9)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        for kind, array in (("images", IMAGES[i]), ("labels", LABELS[i])):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / kind / f"p{i}.png")
    return tmp_path


def test_every_kind_gives_the_same_examples(folder):
    arrays = folder / "arrays"
    arrays.mkdir()
    np.save(arrays / "images.npy", IMAGES)
    np.save(arrays / "labels.npy", LABELS)
    np.savez(folder / "a.npz", images=IMAGES, labels=LABELS)
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for kind in ("images", "labels"):
            for path in (folder / kind).iterdir():
                archive.write(path, f"part/{kind}/{path.name}")
    shutil.copy(folder / "a.npz", folder / "A.NPZ")
    for text in (folder, arrays, folder / "a.npz", folder / "A.NPZ", f"{folder / 'a.zip'}!part"):
        source = open_source(str(text))
        assert len(source) == 6
        for i in (0, 5):
            np.testing.assert_array_equal(source[i].image, IMAGES[i])
            np.testing.assert_array_equal(source[i].labels, LABELS[i])
        again = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(again[3].image, IMAGES[3])


def test_parts(folder):
    source = open_source(f"{folder}[2:5]")
    assert len(source) == 3
    assert [source[i].name for i in range(3)] == ["p2", "p3", "p4"]
    assert len(open_source(f"{folder}[4:]")) == 2
    with pytest.raises(UserError, match="has none"):
        open_source(f"{folder}[6:]")


def test_images_alone_have_no_labels(folder):
    assert open_source(str(folder / "images"))[0].labels is None
    assert ArraySource(IMAGES)[0].labels is None


def test_folders_in_folders_are_part_of_the_name(tmp_path):
    for i, name in enumerate(("b/p", "a/p", "q")):
        for kind, array in (("images", IMAGES[i]), ("labels", LABELS[i])):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    source = open_source(str(tmp_path))
    assert [source[i].name for i in range(3)] == ["a/p", "b/p", "q"]
    np.testing.assert_array_equal(source[0].labels, LABELS[1])
    Image.fromarray(IMAGES[0]).save(tmp_path / "images" / "a" / "p.jpg")
    with pytest.raises(UserError, match="has two named 'a/p'"):
        open_source(str(tmp_path))


def test_the_shipped_scenes():
    source = open_source("scenes")
    assert len(source) == 64
    assert source[0].image.shape == (128, 128, 3)
    assert source[0].labels.max() < 66


def test_tfds(tmp_path):
    from maskclip_jax.data.datasets import EmojiScenes

    folder = tmp_path / "scenes"
    for kind, arrays in (("images", IMAGES), ("labels", LABELS)):
        (folder / kind).mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(folder / kind / f"p{i}.{'jpg' if kind == 'images' else 'png'}")
    EmojiScenes(folder, data_dir=tmp_path / "data").download_and_prepare()
    source = open_source(f"tfds:emoji_scenes?split=scenes&label=label&name=name&data_dir={tmp_path / 'data'}")
    assert len(source) == 6
    plain = open_source(str(folder))
    for i in range(6):
        np.testing.assert_array_equal(source[i].labels, LABELS[i])
        np.testing.assert_array_equal(source[i].image, plain[i].image)
    assert source[4].name == "p4"
    with pytest.raises(UserError, match="has the features image, label, name"):
        open_source(f"tfds:emoji_scenes?split=scenes&label=mask&data_dir={tmp_path / 'data'}")
    with pytest.raises(UserError, match=r"names its split.*add \?split="):
        open_source("tfds:nothing")
    with pytest.raises(UserError, match="cannot open no_such_set"):
        open_source(f"tfds:no_such_set?split=train&data_dir={tmp_path}")
    with pytest.raises(UserError, match="remove it"):
        open_source("tfds:x?split=train&shuffle=1")


def test_one_line_for_what_cannot_be_read(folder, tmp_path):
    (folder / "bad.npz").write_bytes(b"PK nothing")
    (folder / "bad.zip").write_bytes(b"PK nothing")
    (folder / "empty").mkdir()
    np.savez(folder / "other.npz", pictures=IMAGES)
    np.savez(folder / "float.npz", images=IMAGES.astype(np.float32))
    for text, why in (
        ("", "check the path"),
        (f"{folder}/nowhere", "check the path"),
        (f"{folder}/bad.npz", "not a readable .npz"),
        (f"{folder}/bad.zip!x", "not a readable zip"),
        (f"{folder}/empty", "has none"),
        (f"{folder}/other.npz", "must hold 'images'"),
        (f"{folder}/float.npz", "uint8"),
        (f"{folder}/images/p0.png", "another kind"),
    ):
        with pytest.raises(UserError, match=why) as error:
            open_source(text)
        assert "\n" not in str(error.value)


def test_a_missing_mask_and_a_mask_of_another_size(folder):
    Image.fromarray(LABELS[0][:4]).save(folder / "labels" / "p0.png")
    with pytest.raises(UserError, match="its image's size"):
        open_source(str(folder))[0]
    (folder / "labels" / "p1.png").unlink()
    with pytest.raises(UserError, match=r"p1\.png is missing"):
        open_source(str(folder))


def test_two_images_of_one_name(folder):
    Image.fromarray(IMAGES[0]).save(folder / "images" / "p0.jpg")
    with pytest.raises(UserError, match="two named 'p0'"):
        open_source(str(folder / "images"))
