"""Formats of a label map for each image: VOC folders, CVAT's zip, FiftyOne's data set, WebDataset shards.

Writers are as in `objects.py`.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from maskclip_jax.data.images import encoded_png, ignored_label, label_png
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.data.whole_files import atomic_path, write_bytes, write_json
from maskclip_jax.errors import UserError
from maskclip_jax.export.labels import suffix_of
from maskclip_jax.export.picture import ExportOptions, Picture
from maskclip_jax.segment.regions import first_object

OBJECTS = 255  # that a mask of objects can tell apart: colours of VOC's map less black


def write_voc(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """SegmentationClass/NAME.png (indexed, 255 is ignored), ImageSets/Segmentation/PART.txt, JPEGImages/NAME.jpg."""
    names = []
    for picture in pictures:
        content = label_png(picture.labels, class_palette(picture.classes))
        write_bytes(out / "SegmentationClass" / f"{picture.name}.png", content)
        if options.media == "copy":
            write_bytes(out / "JPEGImages" / f"{picture.name}.jpg", picture.jpeg())
        names.append(f"{picture.name}\n")
    write_bytes(out / "ImageSets" / "Segmentation" / f"{part or 'all'}.txt", "".join(names).encode())


def check_voc(classes: Sequence[str]) -> None:
    """Raises UserError where readers of 8-bit masks would take one class for another."""
    if len(classes) > 255:
        raise UserError(f"a VOC mask tells 255 classes apart, but these are {len(classes)}: take another format")


def finish_classes(out: Path, parts: Sequence[str], classes: Sequence[str]) -> None:
    """classes.txt: a line for each class, the first is 0."""
    write_bytes(out / "classes.txt", "".join(f"{name}\n" for name in classes).encode())


def write_cvat(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """annotations.zip (PART.zip), "Segmentation mask 1.1": masks in the colours of its labelmap.txt.

    What is no class is background, the colour that every such file declares (CVAT refuses others). Objects are told
    apart by colours of VOC's map: in an image of more than `OBJECTS` regions, all of a class are one object.
    """
    with atomic_path(out / f"{part or 'annotations'}.zip") as temporary, zipfile.ZipFile(temporary, "w") as archive:

        def add(path: str, content: bytes) -> None:
            packed = zipfile.ZIP_STORED if path.endswith(("png", "jpg")) else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(path), content, packed)

        names = []
        for picture in pictures:
            labels, start = picture.labels, first_object(picture.classes)
            numbers = labels.astype(np.int64) + 1 - start
            numbers[labels == ignored_label(len(picture.classes))] = 0
            objects, parts = np.zeros(picture.shape, np.int64), picture.regions
            if len(parts) > OBJECTS:
                picture.seen["crowded"] += 1
                objects = np.unique(numbers, return_inverse=True)[1].reshape(picture.shape) + (numbers.min() > 0)
            else:
                for number, region in enumerate(parts, 1):
                    objects[region.box][region.mask] = number
            add(f"SegmentationClass/{picture.name}.png", _painted(numbers))
            add(f"SegmentationObject/{picture.name}.png", _painted(objects))
            if options.media == "copy":
                add(f"JPEGImages/{picture.name}.jpg", picture.jpeg())
            names.append(f"{picture.name}\n")
        add(f"ImageSets/Segmentation/{part or 'default'}.txt", "".join(names).encode())
        lines = ["# label:color_rgb:parts:actions"]
        labels = cvat_labels(picture.classes)
        for name, colour in zip(labels, voc_colours(len(labels)), strict=True):
            lines.append(f"{name}:{','.join(map(str, colour.tolist()))}::")
        add("labelmap.txt", ("\n".join(lines) + "\n").encode())


def cvat_labels(classes: Sequence[str]) -> list[str]:
    """Names as labelmap.txt can hold them, "background" first. Raises UserError where two become one, or past 255.

    CVAT's reader counts labels in 8 bits where an image has fewer than 256 colours (Datumaro, mask_tools.unpaint_mask).
    """
    labels = ["background", *(re.sub(r":|^#", "_", name).strip() for name in classes[first_object(classes) :])]
    if len(labels) > 256:
        raise UserError(f"a mask of CVAT tells 255 classes apart, but these are {len(labels) - 1}: take another format")
    if twice := next((name for i, name in enumerate(labels) if name in labels[:i]), None):
        raise UserError(f"CVAT's labels have different names without ':' and '#', but two become {twice!r}: rename one")
    return labels


def voc_colours(count: int) -> UInt8[np.ndarray, "count 3"]:
    """VOC's colour map, of any length: bit 3 i + c of a number is bit 7 − i of its colour's channel c; 0 is black."""
    numbers = np.arange(count)[:, None]
    bits = [((numbers >> (3 * i + np.arange(3))) & 1) << (7 - i) for i in range(8)]
    return np.sum(bits, 0).astype(np.uint8)


def _painted(numbers: np.ndarray) -> bytes:
    return encoded_png(Image.fromarray(voc_colours(int(numbers.max()) + 1)[numbers]))


def write_fiftyone(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """data/NAME.jpg and labels/NAME.png (below PART/), an ImageSegmentationDirectory.

    FiftyOne draws nothing where a mask is 0: that is background or no class, and classes begin at 1.
    """
    for picture in pictures:
        picture.place(out / part / "data")
        labels, shift = picture.labels, 1 - first_object(picture.classes)
        values = labels.astype(np.uint16) + shift
        values[labels == ignored_label(len(picture.classes))] = 0
        small = len(picture.classes) + shift <= 256
        content = encoded_png(Image.fromarray(values.astype(np.uint8) if small else values))
        write_bytes(out / part / "labels" / f"{picture.name}.png", content)


def finish_fiftyone(out: Path, parts: Sequence[str], classes: Sequence[str]) -> None:
    """mask_targets.json: names by mask value, for `dataset.default_mask_targets`."""
    start = first_object(classes)
    write_json(out / "mask_targets.json", {str(i): name for i, name in enumerate(classes[start:], 1)})


def write_webdataset(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """PART-000000.tar …: NAME.jpg (.png), NAME.seg.png (grey: the class, 255 ignored), NAME.json. Shards stay."""
    pictures = iter(pictures)
    for number in itertools.count():
        shard = itertools.islice(pictures, min(options.shard_size, sys.maxsize))
        if (first := next(shard, None)) is None:
            return
        path = out / f"{part or 'all'}-{number:06d}.tar"
        if path.exists():  # a run that was stopped has written it
            for _ in shard:
                pass
            continue
        with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for picture in itertools.chain([first], shard):
                image, _ = picture.content()
                about = {"name": picture.name, "height": picture.shape[0], "width": picture.shape[1]}
                regions = [(picture.classes[r.index], r.xywh, r.area, r.confidence) for r in picture.regions]
                keys = ("class", "bbox", "area", "confidence")
                about["objects"] = [dict(zip(keys, values, strict=True)) for values in regions]
                contents = {suffix_of(image): image, ".seg.png": encoded_png(Image.fromarray(picture.labels))}
                contents[".json"] = json.dumps(about, ensure_ascii=False).encode()
                for suffix, content in contents.items():
                    member = tarfile.TarInfo(picture.name + suffix)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
