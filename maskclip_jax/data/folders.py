"""Folders (and zip files) of images with or without masks -> lists of files, by split.

ROOT/images/**  ROOT/labels/**.png            one split, named as ROOT is
ROOT/SPLIT/images/**  ROOT/SPLIT/labels/**    several
ROOT/**                                       images without masks, where no folder is called `images`
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from maskclip_jax.data.archives import Archive, Member
from maskclip_jax.data.decode import SUFFIXES
from maskclip_jax.data.layouts import Pair
from maskclip_jax.data.walk import File, files_by_name, subfolders
from maskclip_jax.errors import UserError


def find_pairs(source: Path, values: str, *, need_masks: bool, suffixes: tuple[str, ...] = SUFFIXES) -> dict:
    """The examples of every split, {split: [Pair]}, sorted by name; no file is opened.

    Args:
      source: a folder or zip file as drawn above.
      values: what the masks' pixels mean, as `masks.value_table` takes it.
      need_masks: whether images without masks are an error.
      suffixes: of images, in any case.

    Raises:
      UserError: there are none, a split is empty, an image has no mask or a mask no image, or two have one name.
    """
    if not source.exists():
        raise UserError(f"images are a zip file or a folder, but {source} does not exist: check the path")
    if not source.is_dir() and not zipfile.is_zipfile(source):
        raise UserError(f"images are a zip file or a folder, but {source} is neither: check the path")
    root: File = source if source.is_dir() else Member(Archive(source))
    if (root / "images.npy").is_file():
        raise UserError(
            f"{source} holds arrays (images.npy), which need no preparing: give the folder itself wherever data is "
            "named, or one with images/ and labels/ here"
        )
    for folder in (root, *subfolders(root)):
        for item in subfolders(folder):
            name = item.name.lower()
            if name in ("images", "labels") and not (folder / name).is_dir():
                raise UserError(f"images and masks lie in images/ and labels/, but there is {item}: rename it {name}")
    own_name = source.resolve().stem if root is not source else source.resolve().name
    if (root / "images").is_dir():
        folders = {own_name: root}
    else:
        folders = {folder.name: folder for folder in subfolders(root) if (folder / "images").is_dir()}
    if not folders and not need_masks:
        pairs = _plain(root, values, suffixes)
        return {split_name(own_name): pairs}
    if not folders:
        raise UserError(f"images lie in SPLIT/images, but {source} has no such folder: name a zip or folder that does")
    splits: dict[str, list[Pair]] = {}
    for name in sorted(folders):
        splits[split_name(name)] = _split(folders[name], values, need_masks, suffixes)
    if len(splits) != len(folders):
        raise UserError(f"splits have different names, but of {', '.join(folders)} two become one: rename one")
    return splits


def split_name(text: str) -> str:
    """A folder's name as TFDS takes it for a split: letters, digits and _ (and "all" means all splits there)."""
    name = re.sub(r"\W", "_", text, flags=re.ASCII)
    return name if name.strip("_") and name.lower() != "all" else "data"


def _plain(root: File, values: str, suffixes: tuple[str, ...]) -> list[Pair]:
    images = files_by_name(root, suffixes)
    if not images:
        raise UserError(
            f"a folder of images holds {', '.join(suffixes[:5])} … files, but {root} has none: check the path"
        )
    return [Pair(name, image, None, values) for name, image in images.items()]


def _split(folder: File, values: str, need_masks: bool, suffixes: tuple[str, ...]) -> list[Pair]:
    images = files_by_name(folder / "images", suffixes)
    if not images:
        raise UserError(
            f"a split has images ({', '.join(suffixes[:5])} …), but {folder / 'images'} has none: add or remove it"
        )
    labels = folder / "labels"
    if not labels.is_dir() and not need_masks:
        return [Pair(name, image, None, values) for name, image in images.items()]
    masks = files_by_name(labels, (".png", ".mat")) if labels.is_dir() else {}
    if lacking := sorted(set(images) - set(masks)):
        path = labels / f"{lacking[0]}.png"
        raise UserError(f"every image has a mask, but {path} is missing ({len(lacking)} in all): add it")
    if lacking := sorted(set(masks) - set(images)):
        path = f"{folder / 'images' / lacking[0]}{suffixes[0]}"
        raise UserError(f"every mask has an image, but {path} is missing ({len(lacking)} in all): add it")
    return [Pair(name, image, masks[name], values) for name, image in images.items()]
