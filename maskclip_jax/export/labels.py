"""Masks that `label` or `segment` wrote, read one image at a time: label maps, confidences, and the images they are of.

Each source has `classes`, `names` (paths without suffix, "/" between folders), `sure` (whether confidences are there),
`identity` (a text that differs when the masks do), `read(i)` and `image(i)`: the image's file, or its content.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Integer

from maskclip_jax.data.images import read_content, read_label_png
from maskclip_jax.data.sources import FolderSource
from maskclip_jax.data.walk import File
from maskclip_jax.data.whole_files import as_text, cut, read_json, reason
from maskclip_jax.errors import UserError
from maskclip_jax.label.corpus import FileCorpus, open_corpus
from maskclip_jax.label.folder import MANIFEST, SETTINGS, read_shard
from maskclip_jax.label.records import DATASET, VERSION
from maskclip_jax.segment.files import TRAILS, is_own

Masks = tuple[Integer[np.ndarray, "H W"], Float32[np.ndarray, "H W"] | None]
_AGAIN = "run the same `label` command again"


class LabelFolder:
    """What `label` wrote as PNG files; the images are those of `images`, by name."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], classes: tuple[str, ...], images: str | None):
        self.folder, self.classes = folder, classes
        self.digests = {path: digest for shard in shards for path, digest in shard["files"].items()}
        self.names = [path[7:-4] for path in self.digests if path.startswith("labels/")]
        self.sure = any(path.startswith("confidence/") for path in self.digests)
        self.identity = hashlib.sha256(repr(self.digests).encode()).hexdigest()
        self.files = {} if images is None else image_files(images)
        if self.files and (lacking := next((name for name in self.names if name not in self.files), None)):
            raise UserError(f"every mask has an image, but {images} has none called {lacking!r}: name those labelled")

    def read(self, index: int) -> Masks:
        labels, name = self._read("labels", index), self.names[index]
        if not self.sure:
            return labels, None
        confidence = self._read("confidence", index)
        if confidence.shape != labels.shape:
            raise UserError(f"confidences have their mask's size, but those of {name} do not: {_AGAIN}")
        return labels, confidence.astype(np.float32) / 255

    def _read(self, kind: str, index: int) -> Integer[np.ndarray, "H W"]:
        name = f"{kind}/{self.names[index]}.png"
        path = self.folder / name
        content = read_content(path) if path.is_file() and path.stat().st_size else b""
        if hashlib.sha256(content).hexdigest() != self.digests.get(name):
            raise UserError(f"masks are as they were written, but {path} is not: {_AGAIN}")
        return read_label_png(path, content)

    def image(self, index: int) -> File | None:
        return self.files.get(self.names[index])

    def original(self, index: int) -> str:
        """The image's path as it was labelled, with its suffix."""
        name = self.names[index]
        return name + Path(self.files[name].name).suffix


class SegmentFolder:
    """What `segment` wrote; an image is where it was, or below `images` with the longest end of its path there."""

    def __init__(self, folder: Path, images: str | None):
        self.folder, self.moved = folder, None if images is None else Path(images)
        self.records, self.files, self.identity = [], [], hashlib.sha256()
        classes: set[tuple[str, ...]] = set()
        for file in sorted(folder.glob("*.json")):
            if file.name == "segment.json":
                continue
            own = is_own(file, {"image", "height", "width", "classes"})
            if not own and not file.with_name(file.stem + TRAILS[1]).is_file():
                continue  # somebody else's
            try:
                record = read_json(file)
                classes.add(tuple(entry["class"] for entry in record["classes"]))
                sure = [np.nan if entry["confidence"] is None else entry["confidence"] for entry in record["classes"]]
                self.records.append((file.stem, (int(record["height"]), int(record["width"])), np.float32(sure)))
                self.files.append(Path(os.path.abspath(_path_of(record["image"]))))
            except (TypeError, KeyError, ValueError) as error:
                raise UserError(f"{file} is not as `segment` writes it: segment that image again") from error
            self.identity.update(file.read_bytes())
        if len(classes) != 1:
            what = "several lists of them" if classes else "no masks"
            raise UserError(f"masks that are exported together have the same classes, but {folder} has {what}")
        (self.classes,), self.sure, self.identity = classes, True, self.identity.hexdigest()
        root = os.path.commonpath([file.parent for file in self.files])
        self.paths = [file.relative_to(root) for file in self.files]
        self.names = [path.with_suffix("").as_posix() for path in self.paths]

    def read(self, index: int) -> Masks:
        name, shape, sure = self.records[index]
        labels = read_label_png(path := self.folder / f"{name}{TRAILS[1]}")
        if labels.shape != shape:
            raise UserError(f"{path} and {name}.json are of one run, but have two sizes: segment that image again")
        table = np.full(65536, np.nan, np.float32)
        table[: len(sure)] = sure
        return labels, table[labels]

    def image(self, index: int) -> File | None:
        parts = self.files[index].parts[1:]
        ends = [] if self.moved is None else [self.moved.joinpath(*parts[i:]) for i in range(len(parts))]
        return next((path for path in [*ends, self.files[index]] if path.is_file()), None)

    def original(self, index: int) -> str:
        """The image's path below the folder that all were in, with its suffix."""
        return self.paths[index].as_posix()


class LabelRecords:
    """What `label --format records` wrote: the images are in the records."""

    def __init__(self, folder: Path, classes: tuple[str, ...], identity: str):
        import tensorflow_datasets as tfds

        self.classes, self.identity, self.place = classes, identity, folder / "records" / DATASET / VERSION
        try:
            builder = tfds.builder_from_directory(self.place)
            self.sure = "confidence" in list(builder.info.features)
            decoders = {"image": tfds.decode.SkipDecoding()}
            self.source = builder.as_data_source("train", decoders=decoders)
            undecoded = dict.fromkeys(builder.info.features, tfds.decode.SkipDecoding())
            names = (record["name"] for record in builder.as_data_source("train", decoders=undecoded))
            self.names = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        except Exception as error:  # TFDS and array_record raise whatever a damaged file makes them
            raise UserError(
                f"records are whole, but those in {self.place} are not ({reason(error)}): {_AGAIN}"
            ) from error

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return self.source[index]
        except Exception as error:  # as above
            what = f"record {index} of {self.place}"
            raise UserError(f"records are whole, but {what} is not ({reason(error)}): {_AGAIN}") from error

    def read(self, index: int) -> Masks:
        record = self._record(index)
        sure = record["confidence"][..., 0].astype(np.float32) / 255 if self.sure else None
        return record["label"][..., 0], sure

    def image(self, index: int) -> bytes:
        return self._record(index)["image"]

    def original(self, index: int) -> str:
        """The image's name with the suffix of what is stored."""
        return self.names[index] + suffix_of(self.image(index))


@runtime_checkable
class Labels(Protocol):
    """Masks that `export` reads: `LabelFolder`, `SegmentFolder`, `LabelRecords`, or one image of the page.

    Fields:
      classes, names, sure, identity: as above.
    """

    classes: tuple[str, ...]
    names: list[str]
    sure: bool
    identity: Any

    def read(self, index: int) -> Masks: ...

    def image(self, index: int) -> Any: ...

    def original(self, index: int) -> str: ...


def open_labels(folder: Path, images: str | None = None) -> Labels:
    """The masks in a finished folder of `label` or `segment`.

    `images`: the folder or zip file that was labelled, or where images lie now that were segmented elsewhere.
    Raises UserError where the folder is neither, not finished, damaged, or has masks without images.
    """
    if (folder / SETTINGS).is_file():
        record, manifest = read_json(folder / SETTINGS, surrogates=True), {}
        if (folder / MANIFEST).is_file():
            manifest = read_json(folder / MANIFEST, surrogates=True)
        count = len(manifest.get("shards", ()))
        shards: list[Any] = [read_shard(folder, shard, count) for shard in range(count)]
        if not shards or None in shards:
            raise UserError(f"labels are exported when all are there, but {folder} is not finished: {_AGAIN}")
        classes = tuple(manifest["pixels"])
        if record.get("format") == "records":
            if images is not None:
                raise UserError(f"records hold their images, got --images {cut(images)} besides: leave it out")
            return LabelRecords(folder, classes, repr([shard["files"] for shard in shards]))
        return LabelFolder(folder, shards, classes, images)
    if (folder / "segment.json").is_file():
        return SegmentFolder(folder, images)
    what = "is not there" if not folder.exists() else "has neither label.json nor segment.json"
    raise UserError(f"LABELS is a finished folder of `label` or `segment`, but {folder} {what}: name their --out")


def image_files(text: str) -> dict[str, File]:
    """Name -> file of the images that were labelled. Raises UserError where they are no files."""
    corpus = open_corpus(text)
    if isinstance(corpus, FileCorpus):
        return dict(corpus.files)
    if isinstance(corpus.source, FolderSource):
        return dict(zip(corpus.source.names, corpus.source.files, strict=True))
    raise UserError(f"--images is a folder or zip file of images, got {cut(text)}: `label --format records` keeps them")


def suffix_of(content: bytes) -> str:
    """Of what a record or `stored_image` holds: JPEG or PNG."""
    return ".jpg" if content.startswith(b"\xff\xd8") else ".png"


def _path_of(text: str) -> str:
    """The path that `as_text` wrote: bytes that are not UTF-8 stand there as \\xff."""
    if os.path.exists(text):
        return text
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), text.encode())
    return os.fsdecode(raw) if as_text(os.fsdecode(raw)) == text and os.path.exists(raw) else text
