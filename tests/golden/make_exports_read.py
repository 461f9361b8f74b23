"""Exports read back by tools that are too heavy for the tests' environment -> exports_read.json, what they have read.

    python tests/golden/make_exports_read.py      (from the repository's root, PYTHONPATH=.:tests/helpers)

In an environment of its own with this project's packages and `label-studio-sdk label-studio-converter datumaro
ultralytics fiftyone panopticapi-lite opencv-python-headless`, installed with --no-deps as far as they allow.
FiftyOne's importer needs no database. Ultralytics' data/utils.py is loaded beside a stand-in for torch, which its
functions used here (check_det_dataset, img2label_paths, verify_image_label, polygon2mask) do not call.

Every mask is compared pixel by pixel; the file then holds the tools' versions and digests of what they were given:
the labels of `tests/helpers/exports.py`, and "many": 300 classes, most of them nowhere, an image of none, odd names.
(The shipped scenes are read too.) `tests/export/test_formats.py` compares its exports with the digests.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest.mock import MagicMock

import exports
import numpy as np
from PIL import Image

from maskclip_jax.data.images import ignored_label
from maskclip_jax.export.labels import open_labels
from maskclip_jax.export.run import export

ROOT = Path(__file__).parents[2]
PACKAGES = "label-studio-sdk label-studio-converter datumaro ultralytics fiftyone panopticapi-lite".split()


class Case(NamedTuple):
    """Maps by file, −1 where there is no class."""

    maps: dict[str, np.ndarray]
    classes: tuple[str, ...]

    def check(self, found: dict[str, np.ndarray], *, suffix: bool = False) -> None:
        wanted = {file if suffix else os.path.splitext(file)[0]: labels for file, labels in self.maps.items()}
        assert sorted(found) == sorted(wanted)
        for name, labels in wanted.items():
            np.testing.assert_array_equal(found[name], labels, err_msg=name)


def label_studio(out: Path, case: Case) -> None:
    from label_studio_sdk.label_interface import LabelInterface

    interface, tasks = (
        LabelInterface((out / "label_config.xml").read_text()),
        json.loads((out / "tasks.json").read_text()),
    )
    for module in ("label_studio_sdk.converter.brush", "label_studio_converter.brush"):
        decode, maps = importlib.import_module(module).decode_rle, {}
        for task, (file, wanted) in zip(tasks, case.maps.items(), strict=True):
            maps[file] = found = np.full(wanted.shape, -1)
            (prediction,) = task["predictions"]
            assert not interface.validate_prediction(prediction, return_errors=True)
            for one in prediction["result"]:
                mask = decode(one["value"]["rle"]).reshape(one["original_height"], one["original_width"], 4)[:, :, 3]
                found[mask > 0] = case.classes.index(one["value"]["brushlabels"][0])
        case.check(maps, suffix=True)


def from_datumaro(folder: Path, form: str, case: Case, names: list[str], first: int) -> None:
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    dataset, found = Dataset.import_from(str(folder), form), {}
    shapes = {os.path.splitext(file)[0]: labels.shape for file, labels in case.maps.items()}
    assert [label.name for label in dataset.categories()[AnnotationType.label]] == names
    for item in dataset:
        found[item.id] = np.full(shapes[item.id], -1)
        for one in (one for one in item.annotations if one.type == AnnotationType.mask):
            found[item.id][one.image.astype(bool)] = one.label - first
    case.check(found)


def cvat(out: Path, case: Case) -> None:
    from maskclip_jax.export.maps import cvat_labels

    zipfile.ZipFile(out / "annotations.zip").extractall(out / "unpacked")
    from_datumaro(out / "unpacked", "voc_segmentation", case, cvat_labels(case.classes), 1)


def coco(out: Path, case: Case) -> None:
    for folder in ("annotations", "images"):  # where Datumaro looks
        (out / folder).mkdir()
    shutil.copy(out / "instances.json", out / "annotations" / "instances_default.json")
    from_datumaro(out, "coco_instances", case, list(case.classes), 0)


def fiftyone(out: Path, case: Case) -> None:
    from fiftyone.utils.data.importers import ImageSegmentationDirectoryImporter

    found = {}
    with ImageSegmentationDirectoryImporter(dataset_dir=str(out), load_masks=True) as importer:
        for path, _, label in importer:
            found[str(Path(path).relative_to(out.resolve() / "data").with_suffix(""))] = label.mask - 1.0
    case.check(found)


def panoptic(out: Path, case: Case) -> None:
    from panopticapi.utils import rgb2id

    content, maps = json.loads((out / "panoptic.json").read_text()), {}
    for image, one in zip(content["images"], content["annotations"], strict=True):
        assert one["file_name"].rsplit(".")[0] + ".png" == one["file_name"]  # as its converters cut names
        ids = rgb2id(np.array(Image.open(out / "panoptic" / one["file_name"]), dtype=np.uint32))
        maps[image["file_name"]] = found = np.full(ids.shape, -1)
        for segment in one["segments_info"]:
            found[ids == segment["id"]] = segment["category_id"] - 1
    case.check(maps, suffix=True)


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


def yolo(out: Path, case: Case) -> None:
    version = metadata.version
    metadata.version = lambda name: "0.20.0" if name in ("torch", "torchvision") else version(name)
    sys.meta_path.insert(0, StandIn())
    package = types.ModuleType("ultralytics.data")
    package.__path__ = [str(Path(importlib.util.find_spec("ultralytics").origin).parent / "data")]
    sys.modules["ultralytics.data"] = package
    utils, maps = importlib.import_module("ultralytics.data.utils"), {}
    utils.check_class_names = lambda names: names  # that module needs torch
    data = utils.check_det_dataset(str(out / "data.yaml"))
    assert list(data["names"].values()) == list(case.classes)
    images, small = sorted(Path(data["train"]).rglob("*.*")), {}
    for image, labels_file in zip(images, utils.img2label_paths(list(map(str, images))), strict=True):
        name = str(image.relative_to(out.resolve() / "images").with_suffix("")).replace("images_/", "images/")
        (wanted,) = (labels for file, labels in case.maps.items() if os.path.splitext(file)[0] == name)
        height, width = wanted.shape
        if min(height, width) < 10:  # Ultralytics takes no such image
            small[name] = wanted
            continue
        found = utils.verify_image_label((str(image), labels_file, "", False, data["nc"], 0, 0, False))
        assert found[0] is not None, found[-1]
        maps[name] = labels = np.full((height, width), -1)
        for index, polygon in zip(found[1][:, 0], found[3], strict=True):
            points = (polygon * np.array([width, height], np.float32)).reshape(-1)
            labels[utils.polygon2mask((height, width), [points]) == 1] = int(index)
    case.check(maps | small)


def cases() -> dict[str, Case]:
    """−1 for no class."""
    scenes = ROOT / "maskclip_jax" / "assets" / "scenes"
    given = {"given": (dict(zip(exports.FILES, exports.label_maps().values(), strict=True)), exports.CLASSES)}
    given["many"] = exports.maps_of_many(), exports.MANY
    files = sorted((scenes / "labels").iterdir())[:10]
    maps = {f"{file.stem}.jpg": np.array(Image.open(file)) for file in files}
    given["scenes"] = maps, tuple(json.loads((scenes / "classes.json").read_text()))
    return given


READERS = {"label-studio": label_studio, "cvat": cvat, "yolo": yolo, "fiftyone": fiftyone}
READERS |= {"coco-panoptic": panoptic, "coco": coco}

if __name__ == "__main__":
    versions, given = {name: metadata.version(name) for name in PACKAGES}, {}
    for name, (stored, classes) in cases().items():
        maps = {f: np.where(m == ignored_label(len(classes)), -1, m.astype(int)) for f, m in stored.items()}
        with tempfile.TemporaryDirectory() as scratch:
            place, given[name] = Path(scratch), {}
            exports.write_photos(place / "photos", {file: labels.shape for file, labels in maps.items()})
            exports.write_labels(place / "labels", place / "photos", classes=classes, maps=stored)
            labels = open_labels(place / "labels", str(place / "photos"))
            for form, reader in READERS.items():
                if (name, form) == ("many", "cvat"):  # it takes no more than 255
                    continue
                export(labels, form, place / form)
                given[name][form] = exports.digest(place / form)
                reader(place / form, Case(maps, classes))
                print(name, form, "is read back")
    del given["scenes"]
    text = json.dumps({"readers": versions, "given": given}, indent=1) + "\n"
    Path(__file__).with_name("exports_read.json").write_text(text)
