"""Exports read back by tools that are too heavy for the tests' environment -> exports_read.json, what they have read.

    python tests/golden/make_exports_read.py      (from the repository's root, PYTHONPATH=.:tests/helpers)

In an environment of its own with this project's packages and `label-studio-sdk label-studio-converter datumaro
ultralytics fiftyone panopticapi-lite opencv-python-headless`, installed with --no-deps as far as they allow.
FiftyOne's importer needs no database. Ultralytics' data/utils.py is loaded beside a stand-in for torch, which its
functions used here (check_det_dataset, img2label_paths, verify_image_label, polygon2mask) do not call.

Every mask is compared pixel by pixel; the file then holds the tools' versions and digests of what they were given.
`tests/export/test_formats.py` compares its exports with the digests.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import tempfile
import types
import zipfile
from importlib import metadata
from pathlib import Path
from unittest.mock import MagicMock

import exports
import numpy as np
from PIL import Image

from maskclip_jax.export.labels import open_labels
from maskclip_jax.export.run import export

GIVEN = ("label-studio", "cvat", "yolo", "fiftyone", "coco-panoptic")
READERS = "label-studio-sdk label-studio-converter datumaro ultralytics fiftyone panopticapi-lite".split()
MAPS = exports.label_maps()
ORIGINAL = {file: MAPS[file.rpartition(".")[0]] for file in exports.FILES}


def label_studio(out: Path) -> None:
    for module in ("label_studio_sdk.converter.brush", "label_studio_converter.brush"):
        decode, seen = importlib.import_module(module).decode_rle, 0
        for task, labels in zip(json.loads((out / "tasks.json").read_text()), MAPS.values(), strict=True):
            found = np.full(labels.shape, 255)
            for one in task["predictions"][0]["result"]:
                mask = decode(one["value"]["rle"]).reshape(one["original_height"], one["original_width"], 4)[:, :, 3]
                found[mask > 0] = exports.CLASSES.index(one["value"]["brushlabels"][0])
                seen += 1
            np.testing.assert_array_equal(found, labels)
        assert seen > 50


def cvat(out: Path) -> None:
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    zipfile.ZipFile(out / "annotations.zip").extractall(out / "unpacked")
    dataset = Dataset.import_from(str(out / "unpacked"), "voc_segmentation")
    names = [label.name for label in dataset.categories()[AnnotationType.label]]
    assert names == ["background", "dog", "wet_ grass, #2", "Küche 台所"]
    found = {}
    for item in dataset:
        found[item.id] = np.full(MAPS[item.id].shape, 255)
        for one in item.annotations:
            found[item.id][one.image.astype(bool)] = one.label - 1
    assert found.keys() == MAPS.keys()
    for name, labels in found.items():
        np.testing.assert_array_equal(labels, MAPS[name])


def fiftyone(out: Path) -> None:
    from fiftyone.utils.data.importers import ImageSegmentationDirectoryImporter

    seen = 0
    with ImageSegmentationDirectoryImporter(dataset_dir=str(out), load_masks=True) as importer:
        for path, _, label in importer:
            name = str(Path(path).relative_to(out.resolve() / "data").with_suffix(""))
            np.testing.assert_array_equal(label.mask, np.where(MAPS[name] == 255, 0, MAPS[name] + 1.0))
            seen += 1
    assert seen == len(MAPS)


def panoptic(out: Path) -> None:
    from panopticapi.utils import rgb2id

    content = json.loads((out / "panoptic.json").read_text())
    for image, one in zip(content["images"], content["annotations"], strict=True):
        assert one["file_name"].rsplit(".")[0] + ".png" == one["file_name"]  # as its converters cut names
        ids = rgb2id(np.array(Image.open(out / "panoptic" / one["file_name"]), dtype=np.uint32))
        found = np.full(ids.shape, 255)
        for segment in one["segments_info"]:
            found[ids == segment["id"]] = segment["category_id"] - 1
        np.testing.assert_array_equal(found, ORIGINAL[image["file_name"]])


class StandIn:
    """Finds torch and what of Ultralytics needs it."""

    NAMES = ("torch", "torchvision", "thop", "polars", "ultralytics.nn", "ultralytics.models", "ultralytics.engine")

    def find_spec(self, name, path=None, target=None):
        if any(name == one or name.startswith(f"{one}.") for one in self.NAMES):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="2.5.0")
        module.jit.TracerWarning = UserWarning
        for owner, name in ((module, "Tensor"), (module, "device"), (module.nn, "Module")):
            setattr(owner, name, type(name, (), {}))
        return module

    def exec_module(self, module):
        pass


def yolo(out: Path) -> None:
    version = metadata.version
    metadata.version = lambda name: "0.20.0" if name in ("torch", "torchvision") else version(name)
    sys.meta_path.insert(0, StandIn())
    package = types.ModuleType("ultralytics.data")
    package.__path__ = [str(Path(importlib.util.find_spec("ultralytics").origin).parent / "data")]
    sys.modules["ultralytics.data"] = package
    utils, seen = importlib.import_module("ultralytics.data.utils"), 0
    data = utils.check_det_dataset(str(out / "data.yaml"))
    images = sorted(Path(data["train"]).rglob("*.*"))
    for image, labels_file in zip(images, utils.img2label_paths(list(map(str, images))), strict=True):
        name = str(image.relative_to(out.resolve() / "images").with_suffix("")).replace("images_/", "images/")
        height, width = MAPS[name].shape
        if min(height, width) < 10:  # Ultralytics takes no such image
            continue
        found, *_ = [utils.verify_image_label((str(image), labels_file, "", False, data["nc"], 0, 0, False))]
        assert found[0] is not None, found[-1]
        labels = np.full((height, width), 255)
        for index, polygon in zip(found[1][:, 0], found[3], strict=True):
            points = (polygon * np.array([width, height], np.float32)).reshape(-1)
            labels[utils.polygon2mask((height, width), [points]) == 1] = int(index)
        np.testing.assert_array_equal(labels, MAPS[name])
        seen += 1
    assert seen == 3


if __name__ == "__main__":
    versions, given = {name: metadata.version(name) for name in READERS}, {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        exports.write_photos(place / "photos")
        labels = open_labels(exports.write_labels(place / "labels", place / "photos"), str(place / "photos"))
        for form, reader in zip(GIVEN, (label_studio, cvat, yolo, fiftyone, panoptic), strict=True):
            export(labels, form, place / form)
            given[form] = exports.digest(place / form)
            reader(place / form)
            print(form, "is read back")
    text = json.dumps({"readers": versions, "given": given}, indent=1) + "\n"
    Path(__file__).with_name("exports_read.json").write_text(text)
