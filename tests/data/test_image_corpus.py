"""`prepare image_corpus`: a folder of one's own, with masks and without."""

import io
from pathlib import Path

import numpy as np
import pytest
from image_files import H, W, image_bytes, mask_bytes, write
from PIL import Image

from maskclip_jax.data.datasets import BUILDERS
from maskclip_jax.data.sources import open_source, tfds_source
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.engine import known_labels


def grey_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((H, W), 77, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def turned_jpeg() -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def test_a_folder_of_images_as_they_come(tmp_path):
    """No masks, folders in folders, grey and turned pictures: what is stored is what `read_image` sees."""
    root = write(
        tmp_path / "photos", {"a/x.jpg": grey_jpeg(), "a/b/x.JPG": turned_jpeg(), "z.png": image_bytes(1, "PNG")}
    )
    builder = BUILDERS["image_corpus"](root, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert "label" not in builder.info.features
    source = open_source(f"tfds:image_corpus?split=photos&name=name&data_dir={tmp_path / 'tfds'}")
    examples = [source[i] for i in range(3)]
    assert [example.name for example in examples] == ["a/b/x", "a/x", "z"]
    assert [example.image.shape for example in examples] == [(W, H, 3), (H, W, 3), (H, W, 3)]
    assert (examples[1].image == 77).all()


def test_a_folder_with_masks_of_named_classes(tmp_path):
    files = {f"{split}/images/q.jpg": image_bytes(1) for split in ("train", "val")}
    files |= {f"{split}/labels/q.png": mask_bytes([0, 1, 255]) for split in ("train", "val")}
    root = write(tmp_path / "files", files)
    builder = BUILDERS["image_corpus"](root, classes=("cat", "dog"), data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert builder.info.metadata["classes"] == ["cat", "dog"]
    assert set(np.unique(builder.as_data_source("val")[0]["label"])) == {0, 1, 255}
    few = BUILDERS["image_corpus"](root, classes=("cat",), data_dir=tmp_path / "few")
    with pytest.raises(UserError, match=r"has the value 1, .*name all classes"):
        few.download_and_prepare()


@pytest.mark.parametrize(
    ("classes", "values"), [(300, [0, 43, 255, 299, 65535]), (256, [0, 255]), (255, [0, 254, 255])]
)
def test_masks_of_more_classes_than_a_byte_holds(tmp_path, classes, values):
    """299 stays 299, and 255 is a class where there are more; the folder's name is none of an address's business."""
    ignored = 255 if classes == 255 else 65535
    deep = "I;16" if max(values) > 255 else "L"
    write(tmp_path / "q", {"images/a.jpg": image_bytes(1), "labels/a.png": mask_bytes(values, deep)})
    write(tmp_path / "q", {"images/b.jpg": image_bytes(1), "labels/b.png": mask_bytes([7])})
    data = tmp_path / "c++ & 50%20 [1:2]é"
    builder = BUILDERS["image_corpus"](tmp_path / "q", classes=[f"c{i}" for i in range(classes)], data_dir=data)
    builder.download_and_prepare()
    assert builder.info.metadata["ignore"] == ignored
    text = tfds_source("image_corpus", data, split="q", label="label")
    source = open_source(text)
    assert [set(np.unique(source[i].labels)) for i in range(2)] == [set(values), {7}]
    assert set(np.unique(known_labels(source[0], classes))) == set(values)
    few = BUILDERS["image_corpus"](tmp_path / "q", classes=[f"c{i}" for i in range(7)], data_dir=tmp_path / "few")
    with pytest.raises(UserError, match="which is no label here: name all classes"):
        few.download_and_prepare()
    (records,) = Path(builder.data_dir).glob("*.array_record*")
    records.write_bytes(records.read_bytes()[: 2**15])
    with pytest.raises(UserError, match=r"number 0 of image_corpus, split q is not readable .*prepare it again"):
        open_source(text)[0]
