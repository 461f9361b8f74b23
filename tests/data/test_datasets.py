"""EmojiScenes: what goes in as files comes out of array_record, pixel for pixel, without TensorFlow."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data.datasets import EmojiScenes
from maskclip_jax.errors import UserError

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


def test_a_folder_is_one_split_in_the_order_of_names(folder, tmp_path):
    builder = EmojiScenes(folder, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    source = builder.as_data_source("heldout")
    assert len(source) == 3
    for i in range(3):
        assert_is_scene(source[i], i)


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
    with pytest.raises(UserError, match="has none"):
        EmojiScenes(tmp_path / "empty", data_dir=tmp_path)
    with pytest.raises(UserError, match="no source came"):
        EmojiScenes(data_dir=tmp_path).download_and_prepare()
    (folder / "labels" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"0001\.png is missing"):
        EmojiScenes(folder, data_dir=tmp_path)


def run(program: str) -> None:
    """In a process of its own, where nothing is imported yet."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_tensorflow_and_no_tfds_before_it_is_asked_for(archive, tmp_path):
    run(f"""
import sys, numpy as np, maskclip_jax.data
from maskclip_jax.data.sources import open_source
assert "tensorflow_datasets" not in sys.modules
from maskclip_jax.data.datasets import EmojiScenes
EmojiScenes({str(archive)!r}, data_dir={str(tmp_path)!r}).download_and_prepare()
prepared = open_source("tfds:emoji_scenes?split=heldout&label=label&data_dir=" + {str(tmp_path)!r})
direct = open_source({str(archive)!r} + "!heldout")
assert len(prepared) == len(direct) == 2
for i in range(2):
    np.testing.assert_array_equal(prepared[i].image, direct[i].image)
    np.testing.assert_array_equal(prepared[i].labels, direct[i].labels)
assert "tensorflow" not in sys.modules
""")
