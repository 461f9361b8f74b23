"""What `label` writes for each image (PNG files or records), and how a stopped run goes on.

    label.json                       the settings, written first: another command is refused in this folder
    labels/NAME.png                  pixel = class; indexed (16-bit grey beyond 256 classes)
    confidence/NAME.png              8-bit grey: 255 is sure                                         (--confidence)
    cells/NAME.safetensors           per cell of the model's grid: `classes`, `probabilities` (--top-k), `features`
    records/labelled/1.0.0/          the same as a TFDS data set, instead of all of the above        (--format records)
    shards/00000-of-00012.json       every file of a shard with its SHA-256, once the shard is done
    manifest.json, skipped.json      when all shards are

Everything is written under a temporary name in .partial/ and renamed, so that what is there is whole, also when the
power fails. An image is done when its files are there and pass their own checksums; a shard, when its JSON is. Two
processes on one shard write the same bytes to the same names.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from maskclip_jax.data.images import label_png, read_label_png, stored_label
from maskclip_jax.data.sums import digest_of
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.data.whole_files import as_text, changed_at, is_count, parse_json, read_bytes
from maskclip_jax.errors import UserError
from maskclip_jax.label.folder import PARTIAL, write_made, write_whole
from maskclip_jax.label.records import DATASET, VERSION, tfds_features

MOST_FILE = 2**32  # bytes of what belongs to one image
_PNG = b"\x89PNG\r\n\x1a\n"
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
        """What an earlier run left of an image; None where that is not all there, or was damaged."""
        files, size, labels = {}, 0, None
        for kind in self.kinds:
            path = _path(kind, name)
            try:
                content = read_bytes(self.out / path, MOST_FILE)
                if kind == "cells":
                    _check_tensors(content)
                else:
                    found = _whole_png(self.out / path, content)
                    labels = found if kind == "labels" else labels
            except UserError:
                return None
            files[path], size = hashlib.sha256(content).hexdigest(), size + len(content)
        pixels = self._count(labels)
        return Entry(files, size, pixels) if len(pixels) == len(self.palette) else None

    def made_at(self, name: str) -> int:
        """When that was made, in ns."""
        return changed_at(self.out / _path("labels", name))

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


def _whole_png(path: Path, content: bytes) -> Integer[np.ndarray, "H W"]:
    """Pixels of a PNG of ours. Raises UserError unless it is whole: decoders pass over checksums of their own."""
    place, kind = len(_PNG), b""
    while content.startswith(_PNG) and len(head := content[place : place + 8]) == 8 and kind != b"IEND":
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        end = place + 8 + length
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            break
        place = end + 4
    if kind != b"IEND" or place != len(content):
        raise UserError(f"{path} is damaged or truncated: remove it")
    return read_label_png(path, content)


def _path(kind: str, name: str) -> str:
    return f"{kind}/{name}.{'safetensors' if kind == 'cells' else 'png'}"


def _tensors(found: Labelled) -> bytes:
    """A safetensors file. By hand: the library's NumPy side knows no bfloat16, and its order is not ours to say."""
    entries: dict[str, Any] = {}
    parts, end = [], 0
    for name, array in sorted(found.cells.items()):
        parts.append(np.ascontiguousarray(array).tobytes())
        start, end = end, end + len(parts[-1])
        entries[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [start, end]}
    return _with_header({"geometry": json.dumps(found.geometry)}, entries, b"".join(parts))


def _with_header(metadata: dict[str, str], entries: dict[str, Any], data: bytes) -> bytes:
    digest = hashlib.sha256(json.dumps([metadata, entries]).encode() + data).hexdigest()
    text = json.dumps({"__metadata__": metadata | {"sha256": digest}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _check_tensors(content: bytes) -> None:
    """Raises UserError unless `_tensors` wrote these very bytes."""
    start = 8 + int.from_bytes(content[:8], "little")
    entries = parse_json(content[8:start], "a file of cells")
    metadata = entries.pop("__metadata__", None)
    if isinstance(metadata, dict):
        metadata.pop("sha256", None)
        if _with_header(metadata, entries, content[start:]) == content:
            return
    raise UserError("a file of cells is damaged or truncated: remove it")


class PartGone(Exception):
    """A record that waited has gone: another worker has sealed the shard."""


class RecordStore:
    """Images wait in `scratch`/.partial until their shard is whole; then they become one array_record file."""

    def __init__(
        self, out: Path, scratch: Path, names: Sequence[str], shard: int, shards: int, features: dict[str, Any]
    ):
        if len(names) > 255:
            raise UserError(f"records hold at most 255 classes, got {len(names)}: use --format png")
        self.out, self.scratch, self.classes = out, scratch, len(names)
        self.shard, self.shards = shard, shards
        # Here and not in a writer's thread: while TFDS is imported, imports of other threads (JAX's) go wrong.
        from maskclip_jax.data.datasets import stable_record

        serializer = tfds_features(**features)
        self._serialize = lambda example: stable_record(serializer.serialize_example(example))
        self._parts = f"{PARTIAL}/shard-{shard:05d}"

    def recall(self, name: str) -> Entry | None:
        try:
            pixels, record = self._read_part(name)
        except (UserError, PartGone):
            return None
        return Entry({}, len(record), np.array(pixels, np.int64))

    def made_at(self, name: str) -> int:
        return changed_at(self.scratch / self._part(name))

    def save(self, found: Labelled) -> Entry:
        example = {"image": found.encoded, "label": stored_label(found.labels), "name": as_text(found.name)}
        if found.confidence is not None:
            example["confidence"] = stored_label(found.confidence)
        for name, array in found.cells.items():
            example[name] = array.view(np.uint16) if name == "features" else array
        record = self._serialize(example)
        pixels = np.bincount(found.labels.ravel(), minlength=self.classes).astype(np.int64)
        head = json.dumps(_part_head(pixels.tolist(), record)).encode()
        write_whole(self.scratch, self._part(found.name), head + b"\n" + record)
        return Entry({}, len(record), pixels)

    def _read_part(self, name: str) -> tuple[list[int], bytes]:
        """(pixels of each class, record) of what waits. Raises PartGone, or UserError where it was damaged."""
        path = self.scratch / self._part(name)
        if not path.exists():
            raise PartGone(name)
        head, _, record = read_bytes(path, MOST_FILE).partition(b"\n")
        pixels = parse_json(head, path).get("pixels")
        if not isinstance(pixels, list) or len(pixels) != self.classes or not all(map(is_count, pixels)):
            raise UserError(f"{path} is no record of ours: remove it")
        if json.dumps(_part_head(pixels, record)).encode() != head:
            raise UserError(f"{path} is damaged or truncated: remove it")
        return pixels, record

    def seal(self, names: Sequence[str]) -> dict[str, str]:
        from array_record.python.array_record_module import ArrayRecordWriter

        def write(temporary: Path) -> None:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for name in names:
                    writer.write(self._read_part(name)[1])
            finally:
                writer.close()

        path = f"records/{DATASET}/{VERSION}/{DATASET}-train.array_record-{self.shard:05d}-of-{self.shards:05d}"
        write_made(self.out, path, write)
        return {path: digest_of(self.out / path)}

    def clear(self) -> None:
        """Removes what waited, after the shard's JSON is written."""
        shutil.rmtree(self.scratch / self._parts, ignore_errors=True)

    def _part(self, name: str) -> str:
        return f"{self._parts}/{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()}"


def _part_head(pixels: list[int], record: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(pixels).encode() + record).hexdigest()
    return {"pixels": pixels, "bytes": len(record), "sha256": digest}


Store = FileStore | RecordStore
