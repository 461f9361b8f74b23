"""What labelling a corpus leaves on disk, and how it goes on where it stopped.

    label.json                       the settings, written first: another command is refused in this folder
    labels/NAME.png                  pixel = class; indexed (16-bit grey beyond 256 classes)
    confidence/NAME.png              8-bit grey: 255 is sure                                         (--confidence)
    cells/NAME.safetensors           per cell of the model's grid: `classes`, `probabilities` (--top-k), `features`
    records/labelled/1.0.0/          the same as a TFDS data set, instead of all of the above        (--format records)
    shards/00000-of-00012.json       every file of a shard with its SHA-256, once the shard is done
    manifest.json, skipped.json      when all shards are

Everything is written under a temporary name in .partial/ and renamed, so that what is there is whole. An image is done
when its files are there; a shard, when its JSON is. Two processes on one shard write the same bytes to the same names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from maskclip_jax.data.images import label_png, read_label_png, stored_label
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.errors import UserError
from maskclip_jax.segment.label_files import PARTIAL, write_whole
from maskclip_jax.segment.label_records import DATASET, VERSION, tfds_features

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "uint8": "U8", "uint16": "U16"}  # as safetensors calls them


class Labelled(NamedTuple):
    """What was found for one image."""

    name: str
    encoded: bytes | None  # the image itself, for records
    labels: Integer[np.ndarray, "H W"]
    confidence: UInt8[np.ndarray, "H W"] | None
    cells: dict[str, np.ndarray]  # "classes", "probabilities" [h, w, k], "features" [h, w, E]
    geometry: dict[str, Any]  # how cells become pixels again


class Entry(NamedTuple):
    """What the manifest says of one image."""

    files: dict[str, str]  # path below --out -> SHA-256
    size: int  # bytes
    pixels: Int64[np.ndarray, " C"]  # of each class


class FileStore:
    """A file for each image and kind, the tree of the images mirrored."""

    def __init__(self, out: Path, names: Sequence[str], *, confidence: bool, cells: bool):
        self.out, self.palette = out, class_palette(names)
        self.kinds = ["labels"] + ["confidence"] * confidence + ["cells"] * cells

    def recall(self, name: str) -> Entry | None:
        """What an earlier run left of an image; None where that is not all there."""
        files, size = {}, 0
        for kind in self.kinds:
            path = _path(kind, name)
            try:
                content = (self.out / path).read_bytes()
            except FileNotFoundError:
                return None
            files[path], size = hashlib.sha256(content).hexdigest(), size + len(content)
        return Entry(files, size, self._count(read_label_png(self.out / _path("labels", name))))

    def save(self, found: Labelled) -> Entry:
        contents = {"labels": label_png(found.labels, self.palette)}
        if found.confidence is not None:
            contents["confidence"] = stored_label(found.confidence)
        if found.cells:
            contents["cells"] = _tensors(found)
        paths = {_path(kind, found.name): contents[kind] for kind in self.kinds}
        files = {path: write_whole(self.out, path, content) for path, content in paths.items()}
        return Entry(files, sum(map(len, contents.values())), self._count(found.labels))

    def seal(self, names: Sequence[str]) -> dict[str, str]:
        """Called when all of a shard's images are saved; files of the shard as a whole and their SHA-256."""
        return {}

    def clear(self) -> None:
        """Called after the shard's JSON is written."""

    def _count(self, labels: Integer[np.ndarray, "H W"]) -> Int64[np.ndarray, " C"]:
        return np.bincount(labels.ravel(), minlength=len(self.palette)).astype(np.int64)


def _path(kind: str, name: str) -> str:
    return f"{kind}/{name}.{'safetensors' if kind == 'cells' else 'png'}"


def _tensors(found: Labelled) -> bytes:
    """A safetensors file. By hand: the library's NumPy side knows no bfloat16, and its order is not ours to say."""
    header: dict[str, Any] = {"__metadata__": {"geometry": json.dumps(found.geometry)}}
    parts, end = [], 0
    for name, array in sorted(found.cells.items()):
        parts.append(np.ascontiguousarray(array).tobytes())
        start, end = end, end + len(parts[-1])
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


class RecordStore:
    """Images wait in `scratch`/.partial until their shard is whole; then they become one array_record file."""

    def __init__(
        self, out: Path, scratch: Path, names: Sequence[str], shard: int, shards: int, features: dict[str, Any]
    ):
        if len(names) > 255:
            raise UserError(f"records hold at most 255 classes, but {len(names)} came: use --format png")
        self.out, self.scratch, self.classes = out, scratch, len(names)
        self.shard, self.shards = shard, shards
        self._features = features
        self._parts = f"{PARTIAL}/shard-{shard:05d}"

    @functools.cached_property
    def serializer(self):
        """The TFDS features, made when they are needed: importing TFDS takes seconds."""
        return tfds_features(**self._features)

    def recall(self, name: str) -> Entry | None:
        try:
            head, _, record = (self.scratch / self._part(name)).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        return Entry({}, len(record), np.array(json.loads(head), np.int64))

    def save(self, found: Labelled) -> Entry:
        example = {"image": found.encoded, "label": stored_label(found.labels), "name": found.name}
        if found.confidence is not None:
            example["confidence"] = stored_label(found.confidence)
        for name, array in found.cells.items():
            example[name] = array.view(np.uint16) if name == "features" else array
        record = self.serializer.serialize_example(example)
        pixels = np.bincount(found.labels.ravel(), minlength=self.classes).astype(np.int64)
        write_whole(self.scratch, self._part(found.name), json.dumps(pixels.tolist()).encode() + b"\n" + record)
        return Entry({}, len(record), pixels)

    def seal(self, names: Sequence[str]) -> dict[str, str]:
        from array_record.python.array_record_module import ArrayRecordWriter

        path = f"records/{DATASET}/{VERSION}/{DATASET}-train.array_record-{self.shard:05d}-of-{self.shards:05d}"
        temporary, target = self.out / PARTIAL / uuid.uuid4().hex, self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for name in names:
                writer.write((self.scratch / self._part(name)).read_bytes().partition(b"\n")[2])
        finally:
            writer.close()
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, target)
        return {path: digest}

    def clear(self) -> None:
        """Removes what waited, after the shard's JSON is written."""
        shutil.rmtree(self.scratch / self._parts, ignore_errors=True)

    def _part(self, name: str) -> str:
        return f"{self._parts}/{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()}"


Store = FileStore | RecordStore
