"""Where examples come from: arrays, folders, zip files of scenes, TFDS. Random access; examples are read when indexed.

A source is named by one text (`open_source`), which a config can hold:

    scenes                                    the 64 scenes that ship with the package
    FOLDER                                    `images/` and maybe `labels/` in it (same names), or only image files;
                                              with all folders in these
    FOLDER with images.npy (and labels.npy)   arrays [N, H, W, 3] and [N, H, W], memory-mapped
    FILE.npz                                  arrays "images" and maybe "labels"
    FILE.zip!FOLDER                           a FOLDER of the first kind inside a zip file; FILE.zip is all of it
    tfds:NAME?split=train&label=label         a TFDS data set prepared as array_record (`as_data_source`);
                                              also &image=, &name= (features), &data_dir=

Any of them may end in `[start:stop]`, to take a part.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from maskclip_jax.data.archives import Archive, Member
from maskclip_jax.data.decode import SOME_SUFFIXES, SUFFIXES
from maskclip_jax.data.images import read_image, read_label_png
from maskclip_jax.data.walk import File, files_by_name
from maskclip_jax.data.whole_files import reason, shipped
from maskclip_jax.errors import UserError


class Example(NamedTuple):
    """One image, its annotation where there is one (indices, 255 = ignore), and a name unique in the source."""

    image: UInt8[np.ndarray, "H W 3"]
    labels: Integer[np.ndarray, "H W"] | None
    name: str


@runtime_checkable
class DataSource(Protocol):
    """Random access to examples; the same index always gives the same example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class ArraySource:
    """Images uint8 [N, H, W, 3] and labels [N, H, W] (or None) in memory or memory-mapped."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None):
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise UserError(f"images are uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}: convert them")
        if labels is not None and (labels.shape != images.shape[:3] or labels.dtype.kind not in "iu"):
            raise UserError(
                f"labels are integers {list(images.shape[:3])}, got {labels.dtype} {list(labels.shape)}: convert them"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        labels = None if self.labels is None else np.asarray(self.labels[index])
        return Example(np.asarray(self.images[index]), labels, f"{index:06d}")


class FolderSource:
    """Image files below a folder (or its `images/`, with masks of the same names in `labels/`), sorted by name.

    The folder lies on disk or in a zip file. A name is the path in that folder without the suffix.
    """

    def __init__(self, folder: str | File):
        folder = Path(folder) if isinstance(folder, str) else folder
        self.labels = folder / "labels" if (folder / "images").is_dir() and (folder / "labels").is_dir() else None
        folder = folder / "images" if (folder / "images").is_dir() else folder
        found = files_by_name(folder, SUFFIXES)
        self.names, self.files = list(found), list(found.values())
        if not self.files:
            raise UserError(f"a data folder holds images ({SOME_SUFFIXES}), but {folder} has none: check the path")
        if self.labels is not None:
            missing = [name for name in self.names if not (self.labels / f"{name}.png").is_file()]
            if missing:
                raise UserError(f"every image has a mask, but {self.labels / f'{missing[0]}.png'} is missing: add it")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        name = self.names[index]
        labels = None if self.labels is None else read_label_png(self.labels / f"{name}.png")
        return _checked(Example(read_image(self.files[index]), labels, name))


class TFDSSource:
    """A TFDS split as random-access array_records; reading it needs no TensorFlow."""

    def __init__(
        self,
        dataset: str,
        split: str,
        *,
        image: str = "image",
        label: str | None = None,
        name: str | None = None,
        data_dir: str | None = None,
    ):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(dataset, data_dir=data_dir)
            self.source = builder.as_data_source(split=split)
        except Exception as error:  # TFDS raises its own, TensorFlow's and OSErrors for what is missing or unprepared
            raise UserError(
                f"TFDS cannot open {dataset}, split {split} ({reason(error)}): "
                "prepare it with file_format='array_record'"
            ) from error
        features = list(builder.info.features)
        for wanted in (image, label, name):
            if wanted is not None and wanted not in features:
                raise UserError(
                    f"{dataset} has the features {', '.join(features)}, but not {wanted!r}: name one of them"
                )
        self.image, self.label, self.name = image, label, name
        self.title = f"{dataset}, split {split}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self.source[index]
        except Exception as error:  # array_record and the decoders raise whatever a damaged file makes them
            raise UserError(
                f"records are whole, but number {index} of {self.title} is not readable ({reason(error)}): "
                "prepare it again"
            ) from error
        labels = None if self.label is None else np.asarray(record[self.label])
        labels = labels[..., 0] if labels is not None and labels.ndim == 3 else labels
        image = np.asarray(record[self.image])
        name = f"{index:06d}" if self.name is None else record[self.name]
        name = name.decode() if isinstance(name, bytes) else str(name)
        return _checked(Example(np.repeat(image, 3, -1) if image.shape[-1] == 1 else image, labels, name))


class PartSource:
    """Examples start … stop−1 of another source."""

    def __init__(self, source: DataSource, start: int, stop: int):
        self.source, self.indices = source, range(len(source))[start:stop]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]


def open_source(text: str) -> DataSource:
    """The source that a text names (see the module's head). Raises UserError where there is none."""
    matched = re.fullmatch(r"(.*?)(\[\d*:\d*\])?", text.strip(), re.DOTALL)
    assert matched is not None  # both may be empty
    name, part = matched.groups()
    source = _open(name)
    if part is not None:
        start, stop = part[1:-1].split(":")
        source = PartSource(source, int(start or 0), int(stop) if stop else len(source))
    if len(source) == 0:
        raise UserError(f"a data source holds examples, but {text} has none: check the path and the part")
    return source


def _open(name: str) -> DataSource:
    if name == "scenes":
        return FolderSource(shipped("assets", "scenes"))
    if name.startswith("tfds:"):
        return _open_tfds(name)
    path = Path(os.path.expanduser(name))
    file, bang, inner = name.rpartition("!")
    if bang and not path.exists():  # a folder's own name may hold a "!"
        path = Path(os.path.expanduser(file))
    if not name or not path.exists():
        raise UserError(
            f"a data source is 'scenes', a folder, an .npz or .zip file, or tfds:…, got {name!r}: check the path"
        )
    if path.suffix.lower() == ".zip" and path.is_file():
        folder = Member(Archive(path), inner.strip("/") if bang else "")
        if not folder.is_dir():
            raise UserError(f"{path} has no folder {inner!r}: name one that it holds after '!'")
        return FolderSource(folder)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _open_npz(path)
    if not path.is_dir():
        raise UserError(f"a data source is a folder, .npz or .zip, but {path} is a file of another kind: convert it")
    if (path / "images.npy").is_file():
        labels = path / "labels.npy"
        return ArraySource(_mapped(path / "images.npy"), _mapped(labels) if labels.is_file() else None)
    return FolderSource(path)


def tfds_source(dataset: str, data_dir: Path, **options: str) -> str:
    """The text that `open_source` takes for a split of a data set in a folder of any name."""
    folder = urllib.parse.quote(os.fsencode(data_dir), safe="/:")
    query = "&".join(f"{name}={urllib.parse.quote(value)}" for name, value in options.items())
    return f"tfds:{dataset}?{query}&data_dir={folder}"


def _open_tfds(name: str) -> TFDSSource:
    dataset, _, query = name.removeprefix("tfds:").partition("?")
    # A plus is a plus (folders are named "c++"); %XX is any byte, as `tfds_source` writes what would end a value.
    query = query.replace("+", "%2B")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True, errors="surrogateescape"))
    known = {"split", "image", "label", "name", "data_dir"}
    if unknown := sorted(set(options) - known):
        raise UserError(f"a TFDS source takes {', '.join(sorted(known))}, got {unknown}: remove it")
    if "split" not in options:
        raise UserError(f"a TFDS source names its split, but {name!r} has none: add ?split=train")
    return TFDSSource(dataset, **options)


def _open_npz(path: Path) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays:
                raise UserError(f"{path} must hold 'images', but has {sorted(arrays)}: rename the array")
            return ArraySource(arrays["images"], arrays.get("labels"))
    except UserError:
        raise
    except Exception as error:  # a zip file inside: BadZipFile, zlib.error, EOFError, MemoryError and others
        raise UserError(f"{path} is not a readable .npz file ({reason(error)}): write it again") from error


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged header raises what Python's own parser does
        raise UserError(f"{path} is not a readable .npy file ({reason(error)}): write it again") from error


def _checked(example: Example) -> Example:
    if example.labels is not None and example.labels.shape != example.image.shape[:2]:
        raise UserError(
            f"a mask has its image's size, but {example.name} has {list(example.labels.shape)} "
            f"for {list(example.image.shape[:2])}: make it again"
        )
    return example
