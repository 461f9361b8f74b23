"""Every data set's builder on a small made-up copy: file names, palettes, depths and odd values as downloaded."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from image_files import H, W, image_bytes, mask_bytes, write
from PIL import Image
from scipy.io import savemat

from maskclip_jax.data.datasets import BUILDERS, SKIPPED, Voc2012
from maskclip_jax.data.masks import value_table
from maskclip_jax.data.sources import open_source
from maskclip_jax.data.vocabulary import class_set, unseen_classes
from maskclip_jax.errors import UserError


def mat_bytes(values) -> bytes:
    labels = np.full((H, W), values[-1], np.uint16)
    labels.ravel()[: len(values)] = values
    buffer = io.BytesIO()
    savemat(buffer, {"LabelMap": labels}, format="5", do_compression=True)
    return buffer.getvalue()


def voc(root: Path) -> Path:
    base = "VOCdevkit/VOC2012"
    files = {f"{base}/JPEGImages/2007_00000{i}.jpg": image_bytes(i) for i in range(4)}
    files |= {
        f"{base}/SegmentationClass/2007_000000.png": mask_bytes([0, 1, 20, 255], "P"),
        f"{base}/SegmentationClass/2007_000001.png": mask_bytes([15], "P"),
        f"{base}/SegmentationClassAug/2007_000000.png": mask_bytes([9]),  # the official mask goes first
        f"{base}/SegmentationClassAug/2007_000002.png": mask_bytes([0, 7]),
        f"{base}/ImageSets/Segmentation/train.txt": "2007_000000\n",
        f"{base}/ImageSets/Segmentation/val.txt": "2007_000001\n",
        f"{base}/ImageSets/SegmentationAug/train_aug.txt": "/JPEGImages/2007_000002.jpg /SegmentationClassAug/"
        "2007_000002.png\n/JPEGImages/2007_000000.jpg /SegmentationClassAug/2007_000000.png \n",
    }
    return write(root, files)


def context(root: Path, form: str) -> Path:
    files = {f"VOC2010/JPEGImages/2008_00000{i}.jpg": image_bytes(i) for i in range(2)}
    lists = "Main" if form != "60" else "SegmentationContext"
    files |= {f"VOC2010/ImageSets/{lists}/{s}.txt": f"2008_00000{i}\n" for i, s in enumerate(("train", "val"))}
    for i in range(2):
        values = [1, 2, 458, 0]  # accordion (none of the 59), aeroplane, wood, unlabelled
        if form == "mat":
            files[f"VOC2010/trainval/2008_00000{i}.mat"] = mat_bytes(values)
        elif form == "16 bit":
            files[f"VOC2010/trainval/2008_00000{i}.png"] = mask_bytes(values, "I;16")
        else:
            files[f"VOC2010/SegmentationClassContext/2008_00000{i}.png"] = mask_bytes([0, 1, 59, 0], "P")
    return write(root, files)


def coco(root: Path, form: str) -> Path:
    images = "images/val2017" if form != "flat" else "val2017"
    files = {f"{images}/000000000{i}.jpg": image_bytes(i) for i in (139, 285)}
    for i in (139, 285):
        masks = {"raw": "stuffthingmaps/val2017", "flat": "val2017"}.get(form, "annotations/val2017")
        if form != "train ids":
            files[f"{masks}/000000000{i}.png"] = mask_bytes([0, 12, 181, 255])
        else:
            files[f"{masks}/000000000{i}.png"] = mask_bytes([0])  # the raw ones lie beside them
            files[f"{masks}/000000000{i}_labelTrainIds.png"] = mask_bytes([0, 11, 170, 255])
    return write(root, files)


def ade(root: Path) -> Path:
    files = {}
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        files[f"ADEChallengeData2016/images/{part}/{name}.jpg"] = image_bytes(len(part))
        files[f"ADEChallengeData2016/annotations/{part}/{name}.png"] = mask_bytes([0, 1, 150])
    return write(root, files)


def cityscapes(root: Path, form: str) -> Path:
    files = {}
    for part, city in (("train", "aachen"), ("val", "lindau")):
        name = f"{part}/{city}/{city}_000000_000019"
        files[f"leftImg8bit/{name}_leftImg8bit.png"] = image_bytes(len(part), "PNG")
        files[f"gtFine/{name}_gtFine_labelIds.png"] = mask_bytes([7, 26, 33, 0] if form == "ids" else [3])
        files[f"gtFine/{name}_gtFine_color.png"] = image_bytes(0, "PNG")
        if form == "train ids":
            files[f"gtFine/{name}_gtFine_labelTrainIds.png"] = mask_bytes([0, 13, 18, 255])
    return write(root, files)


# What the first pixels of the first example of a split must become.
CASES = {
    "voc2012/voc20": (voc, {"train": [255, 0, 19, 255], "val": [14], "trainaug": [255, 6]}),
    "voc2012/voc21": (voc, {"train": [0, 1, 20, 255], "val": [15], "trainaug": [0, 7]}),
    "pascal_context/context59 mat": (lambda r: context(r, "mat"), {s: [255, 0, 58, 255] for s in ("train", "val")}),
    "pascal_context/context60 mat": (lambda r: context(r, "mat"), {s: [0, 1, 59, 0] for s in ("train", "val")}),
    "pascal_context/context59 16 bit": (
        lambda r: context(r, "16 bit"),
        {s: [255, 0, 58, 255] for s in ("train", "val")},
    ),
    "pascal_context/context59 60": (lambda r: context(r, "60"), {s: [255, 0, 58, 255] for s in ("train", "val")}),
    "coco_stuff164k/coco-stuff171 raw": (lambda r: coco(r, "raw"), {"val": [0, 11, 170, 255]}),
    "coco_stuff164k/coco-stuff171 flat": (lambda r: coco(r, "flat"), {"val": [0, 11, 170, 255]}),
    "coco_stuff164k/coco-stuff171 train ids": (lambda r: coco(r, "train ids"), {"val": [0, 11, 170, 255]}),
    "ade20k/ade20k150": (ade, {"train": [255, 0, 149], "val": [255, 0, 149]}),
    "cityscapes_fine/cityscapes19 ids": (
        lambda r: cityscapes(r, "ids"),
        {s: [0, 13, 18, 255] for s in ("train", "val")},
    ),
    "cityscapes_fine/cityscapes19 train ids": (
        lambda r: cityscapes(r, "train ids"),
        {s: [0, 13, 18, 255] for s in ("train", "val")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_files_become_classes(tmp_path, case):
    make, expected = CASES[case]
    name, config = case.split()[0].split("/")
    builder = BUILDERS[name](make(tmp_path / "files"), config=config, data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    metadata = builder.info.metadata
    base = {"voc21": "voc20", "context60": "context59"}.get(config, config)
    assert metadata["classes"] == [*(["background"] if base != config else []), *map(str, class_set(base))]
    assert len(metadata["palette"]) == len(metadata["classes"])
    if base in ("voc20", "context59", "coco-stuff171"):
        assert metadata["unseen"] == list(unseen_classes(base))
    assert set(builder.info.splits) == set(expected)
    for split, first in expected.items():
        query = f"split={split}&label=label&name=name&data_dir={tmp_path / 'tfds'}"
        example = open_source(f"tfds:{name}/{config}?{query}")[0]
        assert example.image.shape == (H, W, 3)
        assert example.labels.ravel()[: len(first)].tolist() == first, split
        assert set(np.unique(example.labels)) == set(first)


def test_examples_keep_the_order_and_names_of_the_list(tmp_path):
    builder = Voc2012(voc(tmp_path / "files"), config="voc20", data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    names = [example["name"].decode() for example in builder.as_data_source("trainaug")]
    assert names == ["2007_000002", "2007_000000"]
    image = np.asarray(Image.open(tmp_path / "files/VOCdevkit/VOC2012/JPEGImages/2007_000000.jpg"))
    np.testing.assert_array_equal(builder.as_data_source("train")[0]["image"], image)


def test_only_the_splits_asked_for(tmp_path):
    builder = Voc2012(voc(tmp_path / "files"), splits=("val",), config="voc20", data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    assert set(builder.info.splits) == {"val"}
    with pytest.raises(UserError, match="has the splits train, val"):
        Voc2012(tmp_path / "files", splits=("test",), config="voc20", data_dir=tmp_path / "tfds")


MISSING = {
    "nowhere": ("voc2012", {}, r"is a folder, but .*files is none: get it from http://host\.robots"),
    "empty": (
        "coco_stuff164k",
        {"readme": ""},
        r"needs images/train2017/\*\.jpg or train2017/\*\.jpg, but .*files has none",
    ),
    "no list": ("voc2012", {"JPEGImages/a.jpg": ""}, r"needs ImageSets/Segmentation/train\.txt or JPEGImages/\*\.jpg"),
    "no mask": (
        "voc2012",
        {
            "ImageSets/Segmentation/val.txt": "a\nb\n",
            "JPEGImages/a.jpg": "",
            "JPEGImages/b.jpg": "",
            "SegmentationClass/a.png": "",
        },
        r"1 of 2 lack the mask, the first: SegmentationClass/b\.png in .*get it from",
    ),
    "no image": (
        "ade20k",
        {"images/training/a.jpg": "", "annotations/training/a.png": "", "annotations/training/b.png": ""},
        r"1 of 1 lack the image, the first: images/training/b\.jpg",
    ),
    "no masks at all": (
        "cityscapes_fine",
        {"leftImg8bit/train/aachen/a_leftImg8bit.png": ""},
        r"the mask, the first: gtFine/train/aachen/a_gtFine_labelTrainIds\.png, gtFine/train/aachen/a_gtFine_labelIds",
    ),
    "an empty list": ("voc2012", {"ImageSets/Segmentation/val.txt": "\n"}, "a list names its images"),
    "a name twice": (
        "voc2012",
        {"ImageSets/Segmentation/val.txt": "\ufeffa\na\n"},
        "each image once, but .* has 'a' twice",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, case):
    name, files, words = MISSING[case]
    write(tmp_path / "files", files)
    with pytest.raises(UserError, match=words):
        BUILDERS[name](tmp_path / "files", data_dir=tmp_path / "tfds")


def test_train_ids_under_the_name_of_raw_ids_are_found_out(tmp_path):
    root = coco(tmp_path / "files", "raw")
    write(root, {"stuffthingmaps/val2017/000000000285.png": mask_bytes([11])})
    builder = BUILDERS["coco_stuff164k"](root, data_dir=tmp_path / "tfds")
    with pytest.raises(UserError, match=r"285\.png has the value 11, .*call masks of train ids"):
        builder.download_and_prepare()


def test_damaged_examples_are_skipped_when_told_and_listed(tmp_path):
    root = voc(tmp_path / "files")
    base = "VOCdevkit/VOC2012"
    whole = image_bytes(5)
    more = {
        f"{base}/ImageSets/Segmentation/train.txt": "2007_000003\n2007_000000\n2007_000002\n",
        f"{base}/JPEGImages/2007_000003.jpg": whole[: len(whole) - 40],
        f"{base}/SegmentationClass/2007_000003.png": mask_bytes([1], "P"),
        f"{base}/SegmentationClass/2007_000002.png": mask_bytes([21], "P"),
    }
    write(root, more)
    with pytest.raises(UserError, match=r"2007_000003\.jpg is damaged or truncated"):
        Voc2012(root, config="voc20", data_dir=tmp_path / "stop").download_and_prepare()
    builder = Voc2012(root, on_error="skip", splits=("train",), config="voc20", data_dir=tmp_path / "skip")
    builder.download_and_prepare()
    assert [example["name"] for example in builder.as_data_source("train")] == [b"2007_000000"]
    skipped = json.loads((Path(builder.data_dir) / SKIPPED).read_text())
    assert [(entry["split"], entry["name"]) for entry in skipped] == [
        ("train", "2007_000003"),
        ("train", "2007_000002"),
    ]
    assert "has the value 21" in skipped[1]["reason"]


def test_a_mat_file_that_is_none_names_itself(tmp_path):
    root = write(context(tmp_path / "files", "mat"), {"VOC2010/trainval/2008_000000.mat": "no matlab"})
    with pytest.raises(UserError, match=r"2008_000000\.mat is not readable"):
        BUILDERS["pascal_context"](root, config="context59", data_dir=tmp_path / "tfds").download_and_prepare()


def test_masks_reduced_already_are_not_reduced_again(tmp_path):
    """Those with the sign of it say it of all: to skip them would leave the others shifted."""
    root = ade(tmp_path / "files")
    write(root, {"ADEChallengeData2016/annotations/validation/ADE_val_00000001.png": mask_bytes([255, 0, 149])})
    for on_error in ("stop", "skip"):
        builder = BUILDERS["ade20k"](root, data_dir=tmp_path / on_error, on_error=on_error)
        with pytest.raises(UserError, match=r"ADE_val_00000001\.png has it, as reduced masks do"):
            builder.download_and_prepare()


def test_every_class_of_every_table_is_reached():
    """No class is lost or doubled on the way from pixel values to indices."""
    for values, count in (
        ("coco-stuff", 171),
        ("context459", 59),
        ("cityscapes", 19),
        ("background+20", 20),
        ("other+150", 150),
    ):
        table = value_table(values)
        assert sorted(table[(table >= 0) & (table != 255)]) == list(range(count)), values
    assert sorted(set(value_table("context459", background=True)) - {-1}) == list(range(60))
