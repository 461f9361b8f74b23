"""The images of a corpus by index and name, read one at a time; their number is not limited by memory.

A folder is read with all folders in it, and an image's name is its path there without the suffix; everything else that
`open_source` knows (zip files, arrays, TFDS, parts) keeps the names that its examples have.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from maskclip_jax.data.decode import SOME_SUFFIXES, SUFFIXES
from maskclip_jax.data.images import encoded_png, read_content, read_image, stored_image
from maskclip_jax.data.sources import DataSource, open_source
from maskclip_jax.data.walk import files_by_name
from maskclip_jax.data.whole_files import changed_at
from maskclip_jax.errors import UserError


class Read(NamedTuple):
    """One image of a corpus."""

    name: str
    image: UInt8[np.ndarray, "H W 3"]
    encoded: bytes | None  # JPEG or PNG that decodes to `image`, where it was asked for
    sum: list | None = None  # bytes and SHA-256 of its file, where it has one


class FileCorpus:
    """Image files below a folder (below its `images/` where there is one), sorted by name."""

    knows_names = True

    def __init__(self, folder: Path):
        self.root = folder / "images" if (folder / "images").is_dir() else folder
        self.files = list(files_by_name(self.root, SUFFIXES).items())
        if not self.files:
            raise UserError(f"a folder of images holds {SOME_SUFFIXES} files, but {self.root} has none: check the path")

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Unique, without suffix; folders are separated by "/"."""
        return self.files[index][0]

    def changed_at(self, index: int) -> int:
        """When the file was written, or put there with an older time of its own (`mv`, `cp -p`), in ns; 0: never."""
        return changed_at(self.files[index][1], or_moved=True)

    def read(self, index: int, *, encoded: bool = False) -> Read:
        """Raises UserError where the image is damaged."""
        name, file = self.files[index]
        data = read_content(file)
        return Read(name, read_image(file, data), stored_image(file, data)[0] if encoded else None, _sum(data))

    def sum(self, index: int) -> list:
        """Bytes and SHA-256 of the file. Raises UserError where it cannot be read."""
        return _sum(read_content(self.files[index][1]))

    def is_still(self, index: int, kept: Any, made: int) -> bool:
        """Whether the file is the one of `sum` `kept` that was there at `made` (ns); a sum of None tells by its time.

        It is read only where it has changed since, or has another size.
        """
        if not isinstance(kept, list):
            return changed_at(self.files[index][1]) <= made
        with contextlib.suppress(UserError, OSError):
            file = self.files[index][1]
            return os.path.getsize(file) == kept[0] and (self.changed_at(index) <= made or self.sum(index) == kept)
        return False

    def identity(self) -> str:
        """A text that differs when the images do: how many, and their names."""
        names = "\n".join(name for name, _ in self.files)
        return f"{len(self)} images, {hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()}"


class SourceCorpus:
    """The images of a data source; masks are not looked at. Names cost reading, so `identity` is without them."""

    knows_names = False  # before an image is read

    def __init__(self, source: DataSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, *, encoded: bool = False) -> Read:
        example = self.source[index]
        return Read(
            _checked_name(example.name), example.image, encoded_png(Image.fromarray(example.image)) if encoded else None
        )

    def identity(self) -> str:
        return f"{len(self)} images"


Corpus = FileCorpus | SourceCorpus


def open_corpus(text: str) -> Corpus:
    """The corpus that a text names: a folder, or whatever `open_source` takes. Raises UserError."""
    if not text.strip():
        raise UserError(f"images are a folder, an .npz or .zip file …, got {text!r}: name one ('.' is this folder)")
    folder = Path(os.path.expanduser(text))
    if text != "scenes" and folder.is_dir() and not (folder / "images.npy").is_file():
        return FileCorpus(folder)
    return SourceCorpus(open_source(text))


def _sum(data: bytes) -> list:
    return [len(data), hashlib.sha256(data).hexdigest()]


def _checked_name(name: str) -> str:
    if not name or name.startswith("/") or re.search(r"(^|/)\.{0,2}(/|$)|\0|\\", name):
        raise UserError(f"an image's name becomes a path below --out, but {name!r} cannot: name the images otherwise")
    return name
