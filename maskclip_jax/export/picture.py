"""One image of an export, read when a format asks for it: its label map, its regions, and the image itself."""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from PIL import Image

from maskclip_jax.data.decode import upright_size
from maskclip_jax.data.images import ignored_label, read_content, stored_image
from maskclip_jax.data.whole_files import as_text, write_bytes
from maskclip_jax.errors import UserError
from maskclip_jax.export.labels import Labels, suffix_of
from maskclip_jax.segment.regions import Region, find_regions, only_regions

MEDIA = ("copy", "link", "none")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What is exported.

    Fields:
      per: objects are a "region" (pixels that share an edge) or a "class" (all of one in an image).
      min_area: pixels of an object; smaller ones are left out, and their pixels belong to no class.
      min_confidence: mean probability of an object; the same.
      split: names of parts and their shares, which add up to 1; empty: one part.
      media: "copy" images as upright RGB JPEG or PNG, "link" to those that are so, "none"; None is the format's own.
      shard_size: images of a WebDataset shard.
      url: what comes before an image's name in Label Studio's tasks.
    """

    per: str = "region"
    min_area: int = 1
    min_confidence: float = 0.0
    split: tuple[tuple[str, float], ...] = ()
    media: str | None = None
    shard_size: int = 1000
    url: str = "/data/local-files/?d="


class Picture:
    """An image of `labels`; nothing is read before it is asked for, and only once."""

    def __init__(self, labels: Labels, index: int, name: str, options: ExportOptions, seen: collections.Counter[str]):
        self.source, self.index, self.name, self.options, self.seen = labels, index, name, options, seen
        self.classes = labels.classes

    @functools.cached_property
    def _masks(self):
        labels, confidence = self.source.read(self.index)
        ignore = ignored_label(len(self.classes))
        if len(self.classes) > 255:
            labels = labels.astype(np.uint16)
        return np.where(labels < len(self.classes), labels, labels.dtype.type(ignore)), confidence

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self._masks[0].shape

    @functools.cached_property
    def regions(self) -> list[Region]:
        """The objects that are exported."""
        o = self.options
        limits = {"per": o.per, "min_area": o.min_area, "min_confidence": o.min_confidence}
        return find_regions(self._masks[0], self.classes, self._masks[1], **limits)

    @property
    def labels(self) -> Integer[np.ndarray, "H W"]:
        """The label map of what is exported; 255 (65535 beyond 255 classes) is no class."""
        if self.options.min_area <= 1 and not self.options.min_confidence:
            return self._masks[0]
        return only_regions(self._masks[0], self.regions, self.classes, ignored_label(len(self.classes)))

    def content(self) -> tuple[bytes, bool]:
        """The image as an upright RGB JPEG or PNG, and whether its file has these very bytes."""
        file = self.source.image(self.index)
        if file is None:
            raise UserError(f"images lie where they were, but that of {self.name!r} does not: say where with --images")
        data = file if isinstance(file, bytes) else read_content(file)
        stored, shape = stored_image(file if not isinstance(file, bytes) else self.name, data)
        self._check(shape)
        return stored, stored is data

    def place(self, folder: Path) -> str:
        """The image put into a folder; its path there, or the one it was labelled by where it is not put."""
        if self.options.media == "none":
            file = self.source.image(self.index)
            if isinstance(file, Path):
                shape, turned = upright_size(file)
                self._check(shape)
                self.seen["turned"] += turned
            return as_text(self.source.original(self.index))
        stored, same = self.content()
        name, file = self.name + suffix_of(stored), self.source.image(self.index)
        target = folder / name
        if self.options.media == "link" and same and isinstance(file, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.path.abspath(file), target)
        else:
            write_bytes(target, stored)
        return name

    def jpeg(self) -> bytes:
        """The image as a JPEG: its own bytes where it is one, else made in quality 95."""
        stored, _ = self.content()
        if suffix_of(stored) == ".jpg":
            return stored
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(stored)) as image:
            image.save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    def _check(self, shape: tuple[int, int]) -> None:
        if tuple(shape) != self.shape:
            sizes = " and ".join(f"{width}×{height}" for height, width in (self.shape, shape))
            raise UserError(f"a mask has its image's size, but those of {self.name!r} are {sizes}: name its own image")


def export_names(names: Sequence[str], avoid: tuple[str, str]) -> list[str]:
    """Names that tools' lists and archives can hold, each once: odd characters become _, a name that is taken gets -2.

    `avoid`: a regular expression and its replacement, for what one format cannot hold besides.
    """
    taken: set[str] = set()
    result = []
    for name in names:
        safe = re.sub(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029\ud800-\udfff]|(^|(?<=/))[\s#.]|\s(?=/|$)", "_", name)
        safe, number = re.sub(*avoid, safe), 2
        bare = safe
        while safe in taken:
            safe, number = f"{bare}-{number}", number + 1
        taken.add(safe)
        result.append(safe)
    return result
