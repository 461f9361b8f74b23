"""Formats that list objects: COCO instances and panoptic, Label Studio's predictions, YOLO's polygons.

A writer takes (folder, part, pictures, options) and writes the part whole; `finish` what all parts share. Pictures come
one at a time, and what is said of them waits on disk, not in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image

from maskclip_jax.data.images import encoded_png
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.data.whole_files import atomic_path, write_bytes
from maskclip_jax.export.picture import ExportOptions, Picture
from maskclip_jax.export.polygons import polygon
from maskclip_jax.export.rle import brush, coco_counts
from maskclip_jax.segment.regions import Region, first_object


def write_coco(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """instances.json (instances_PART.json): compressed RLE. A category's id is its class's index + 1."""
    numbers = itertools.count(1)
    with _lists(out / f"{_with_part('instances', part)}.json", "images", "annotations", "categories") as add:
        for image, picture in enumerate(pictures, 1):
            height, width = picture.shape
            add("images", {"id": image, "file_name": picture.place(out / "images"), "width": width, "height": height})
            for region in picture.regions:
                mask = {"size": [height, width], "counts": coco_counts(region, height, width)}
                add("annotations", {"id": next(numbers), "image_id": image, "segmentation": mask, **_segment(region)})
        for index, name in _named(picture.classes):
            add("categories", {"id": index + 1, "name": name, "supercategory": ""})


def write_panoptic(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """panoptic.json and panoptic/NAME.png: R + 256 G + 65,536 B is a segment's id, black is nothing."""
    folder = out / _with_part("panoptic", part)
    with _lists(folder.with_name(f"{folder.name}.json"), "images", "annotations", "categories") as add:
        for image, picture in enumerate(pictures, 1):
            height, width = picture.shape
            ids = np.zeros((height, width), "<u4")
            segments = []
            for number, region in enumerate(picture.regions, 1):
                ids[region.box][region.mask] = number
                segments.append({"id": number, **_segment(region)})
            pixels = ids.view(np.uint8).reshape(height, width, 4)[:, :, :3]
            write_bytes(folder / f"{picture.name}.png", encoded_png(Image.fromarray(np.ascontiguousarray(pixels))))
            add("images", {"id": image, "file_name": picture.place(out / "images"), "width": width, "height": height})
            add("annotations", {"image_id": image, "file_name": f"{picture.name}.png", "segments_info": segments})
        thing = int(options.per == "region")
        colours = class_palette(picture.classes).tolist()
        for index, name in _named(picture.classes):
            about = {"name": name, "supercategory": "", "isthing": thing, "color": colours[index]}
            add("categories", {"id": index + 1, **about})


def write_label_studio(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """tasks.json: a task for each image, with one prediction of brushes, scored where confidences are known."""
    with _lists(out / f"{_with_part('tasks', part)}.json", "") as add:
        for picture in pictures:
            height, width = picture.shape
            place = "" if options.media == "none" else "images/"
            url = options.url + urllib.parse.quote(place + picture.place(out / "images"))
            results = []
            for number, region in enumerate(picture.regions, 1):
                value = {"format": "rle", "rle": brush(region, height, width)}
                value["brushlabels"] = [picture.classes[region.index]]
                size = {"original_width": width, "original_height": height, "image_rotation": 0}
                names = {"id": f"r{number}", "type": "brushlabels", "from_name": "mask", "to_name": "image"}
                results.append(names | size | {"value": value} | _score(region))
            known = [r.confidence for r in picture.regions if r.confidence is not None]
            mean = {"score": round(float(np.mean(known)), 6)} if known else {}
            add("", {"data": {"image": url}, "predictions": [{"model_version": "maskclip", "result": results, **mean}]})


def finish_label_studio(out: Path, parts: Sequence[str], classes: Sequence[str]) -> None:
    """label_config.xml: the labelling interface that the tasks' brushes belong to."""
    colours = class_palette(classes)
    labels = [
        f'    <Label value={quoteattr(name)} background="#{bytes(colours[index]).hex()}"/>'
        for index, name in _named(classes)
    ]
    head = [
        "<View>",
        '  <Image name="image" value="$image" zoom="true"/>',
        '  <BrushLabels name="mask" toName="image">',
    ]
    write_bytes(out / "label_config.xml", "\n".join([*head, *labels, "  </BrushLabels>", "</View>", ""]).encode())


def write_yolo(out: Path, part: str, pictures: Iterable[Picture], options: ExportOptions) -> None:
    """images/PART/NAME.jpg, labels/PART/NAME.txt: a row "class x y x y …" for each region, in shares of the image."""
    for picture in pictures:
        picture.place(out / "images" / part)
        height, width = picture.shape
        rows = []
        for region in picture.regions:
            points = (polygon(region) / [width, height]).ravel()
            index = region.index - first_object(picture.classes)
            rows.append(f"{index} " + " ".join(f"{value:.7f}" for value in points) + "\n")
        write_bytes(out / "labels" / part / f"{picture.name}.txt", "".join(rows).encode())


def finish_yolo(out: Path, parts: Sequence[str], classes: Sequence[str]) -> None:
    """data.yaml: where the parts are, and the names. Without a split all images are for both."""
    places = {part: f"images/{part}" for part in parts if part} or {"train": "images", "val": "images"}
    lines = [f"{part}: {json.dumps(place)}" for part, place in places.items()] + ["names:"]
    lines += [f"  {index - first_object(classes)}: {_yaml(name)}" for index, name in _named(classes)]
    write_bytes(out / "data.yaml", ("\n".join(lines) + "\n").encode())


def _yaml(name: str) -> str:
    """In double quotes, as JSON, but that YAML knows no pairs of surrogates: an emoji came out as two of them."""
    return '"' + "".join(json.dumps(c)[1:-1] if c < "\U00010000" else f"\\U{ord(c):08x}" for c in name) + '"'


def _named(classes: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((index, name) for index, name in enumerate(classes) if index >= first_object(classes))


def _with_part(name: str, part: str) -> str:
    return f"{name}_{part}" if part else name


def _score(region: Region) -> dict[str, float]:
    return {} if region.confidence is None else {"score": round(region.confidence, 6)}


def _segment(region: Region) -> dict[str, Any]:
    about = {"category_id": region.index + 1, "bbox": region.xywh, "area": region.area, "iscrowd": 0}
    return about | _score(region)


@contextlib.contextmanager
def _lists(path: Path, *names: str) -> Iterator[Callable[[str, Any], None]]:
    """Yields `add(list, value)` of a JSON file with these lists, a value a line; one called "" is the file itself.

    The lists wait in files without a name, so that any number of values fits.
    """
    with atomic_path(path) as temporary, contextlib.ExitStack() as open_files:
        spools = {name: open_files.enter_context(tempfile.TemporaryFile(dir=path.parent)) for name in names}

        def add(name: str, value: Any) -> None:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            spools[name].write((b",\n" if spools[name].tell() else b"\n") + text.encode(errors="backslashreplace"))

        yield add
        with temporary.open("wb") as file:
            for number, (name, spool) in enumerate(spools.items()):
                file.write(
                    (b", " if number else b"{" if name else b"") + (f'"{name}": ' if name else "").encode() + b"["
                )
                spool.seek(0)
                while piece := spool.read(2**20):
                    file.write(piece)
                file.write(b"\n]")
            file.write(b"}\n" if "" not in spools else b"\n")
