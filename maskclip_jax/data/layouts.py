"""The data sets people have on their disks: which files make an example, in one table.

A pattern's `{}` is an example's name; it may hold folders. `find_examples` turns a layout and a folder into lists of
files and opens none of them; what is missing is told with the places looked at and where to get it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from maskclip_jax.data.walk import File, walk
from maskclip_jax.errors import UserError


class Pair(NamedTuple):
    """The files of one example."""

    name: str
    image: File
    label: File | None
    values: str  # what the mask's pixels mean: see `masks.value_table`


class Split(NamedTuple):
    """Where the files of a split lie, alternatives in order of preference."""

    images: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]  # pattern, and what its pixels mean
    lists: tuple[str, ...] = ()  # text files of names, the first that exists; none: whatever images there are


class Layout(NamedTuple):
    """One data set."""

    title: str
    roots: tuple[str, ...]  # folders, from the one the user names, that may be the data set's own
    splits: Mapping[str, Split]
    configs: Mapping[str, tuple[str, bool]]  # name -> class set (`vocabulary.class_set`), whether background is a class
    origin: str  # where to get it


def _voc(part: str, *more: str) -> Split:
    masks = (("SegmentationClass/{}.png", "background+20"), ("SegmentationClassAug/{}.png", "background+20"))
    listed = (f"ImageSets/Segmentation/{part}.txt", *more)
    return Split(("JPEGImages/{}.jpg",), masks if part == "trainaug" else masks[:1], listed)


def _context(part: str) -> Split:
    masks = [("SegmentationClassContext/{}.png", "background+59")]
    for folder in ("trainval", "Context/trainval", "pascal-context/trainval"):
        masks += [(f"{folder}/{{}}.mat", "context459"), (f"{folder}/{{}}.png", "context459")]
    lists = (f"ImageSets/SegmentationContext/{part}.txt", f"ImageSets/Main/{part}.txt")
    return Split(("JPEGImages/{}.jpg",), tuple(masks), lists)


def _coco(part: str) -> Split:
    folders = (f"annotations/{part}", f"stuffthingmaps/{part}", f"stuffthingmaps_trainval2017/{part}", part)
    train_ids = tuple((f"{folder}/{{}}_labelTrainIds.png", "classes+171") for folder in folders)
    return Split(
        (f"images/{part}/{{}}.jpg", f"{part}/{{}}.jpg"),
        train_ids + tuple((f"{folder}/{{}}.png", "coco-stuff") for folder in folders),
    )


def _ade(part: str) -> Split:
    return Split((f"images/{part}/{{}}.jpg",), ((f"annotations/{part}/{{}}.png", "other+150"),))


def _cityscapes(part: str) -> Split:
    masks = f"gtFine/{part}/{{}}_gtFine_"
    return Split(
        (f"leftImg8bit/{part}/{{}}_leftImg8bit.png",),
        ((masks + "labelTrainIds.png", "classes+19"), (masks + "labelIds.png", "cityscapes")),
    )


LAYOUTS = {
    "voc2012": Layout(
        "Pascal VOC 2012",
        (".", "VOC2012", "VOCdevkit/VOC2012"),
        {
            "train": _voc("train"),
            "val": _voc("val"),
            "trainval": _voc("trainval"),
            "trainaug": _voc(
                "trainaug", "ImageSets/Segmentation/train_aug.txt", "ImageSets/SegmentationAug/train_aug.txt"
            ),
        },
        {"voc20": ("voc20", False), "voc21": ("voc20", True)},
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (VOCtrainval_11-May-2012.tar), and for trainaug the masks of "
        "SBD as PNGs in SegmentationClassAug with a list of them, as mmsegmentation's voc_aug.py makes both",
    ),
    "pascal_context": Layout(
        "Pascal Context",
        (".", "VOC2010", "VOCdevkit/VOC2010"),
        {"train": _context("train"), "val": _context("val")},
        {"context59": ("context59", False), "context60": ("context59", True)},
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2010 (images and ImageSets) and "
        "https://cs.stanford.edu/~roozbeh/pascal-context (trainval.tar.gz, the 459-class .mat masks)",
    ),
    "coco_stuff164k": Layout(
        "COCO-Stuff 164k",
        (".", "coco_stuff164k"),
        {"train": _coco("train2017"), "val": _coco("val2017")},
        {"coco-stuff171": ("coco-stuff171", False)},
        "https://github.com/nightrome/cocostuff (train2017.zip, val2017.zip, stuffthingmaps_trainval2017.zip)",
    ),
    "ade20k": Layout(
        "ADE20K",
        (".", "ADEChallengeData2016"),
        {"train": _ade("training"), "val": _ade("validation")},
        {"ade20k150": ("ade20k150", False)},
        "http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
    ),
    "cityscapes_fine": Layout(
        "Cityscapes",
        (".", "cityscapes"),
        {"train": _cityscapes("train"), "val": _cityscapes("val")},
        {"cityscapes19": ("cityscapes19", False)},
        "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
    ),
}


def find_examples(layout: Layout, source: Path, splits: tuple[str, ...] | None = None) -> dict[str, list[Pair]]:
    """The examples of every split, sorted as its list is, or by name.

    Args:
      source: the data set's folder, or one above it.
      splits: which are wanted; None takes those that are there.

    Raises:
      UserError: the folder, a wanted split, or an image or mask of a split is missing.
    """
    if not source.is_dir():
        raise UserError(f"{layout.title} is a folder, but {source} is none: get it from {layout.origin}")
    if unknown := sorted(set(splits or ()) - set(layout.splits)):
        raise UserError(f"{layout.title} has the splits {', '.join(layout.splits)}, but {unknown[0]} came: name those")
    _names.cache_clear()  # files may have come since
    found: dict[str, list[Pair]] = {}
    for split in layout.splits if splits is None else splits:
        roots = [source / root for root in layout.roots]
        root = next((root for root in roots if _is_there(root, layout.splits[split])), None)
        if root is not None:
            found[split] = _pairs(layout, layout.splits[split], root)
        elif splits is not None:
            raise UserError(_missing(layout, source, split, layout.splits[split]))
    if not found:
        split = next(iter(layout.splits))
        raise UserError(_missing(layout, source, split, layout.splits[split]))
    return found


def _is_there(root: Path, split: Split) -> bool:
    if split.lists:
        return any((root / name).is_file() for name in split.lists)
    return any((root / pattern.split("{}")[0]).is_dir() and _names(root, pattern) for pattern in split.images)


def _missing(layout: Layout, source: Path, split: str, files: Split) -> str:
    looked = [*files.lists, *files.images] if files.lists else files.images
    places = ", ".join(root for root in layout.roots if root != ".")
    return (
        f"split {split} of {layout.title} needs {' or '.join(looked).replace('{}', '*')}, but {source} has none, nor "
        f"its {places}: get them from {layout.origin}"
    )


def _pairs(layout: Layout, files: Split, root: Path) -> list[Pair]:
    images = {pattern: _names(root, pattern) for pattern in files.images}
    masks = {pattern: _names(root, pattern) for pattern, _ in files.labels}
    listed = next((root / name for name in files.lists if (root / name).is_file()), None)
    names = sorted(set().union(*images.values())) if listed is None else _read_list(listed)
    if not names:
        raise UserError(f"a list names its images, but {listed} is empty: get it from {layout.origin}")
    pairs, lacking = [], {"image": [], "mask": []}
    for name in names:
        image = next((pattern for pattern, there in images.items() if name in there), None)
        label = next(((pattern, values) for pattern, values in files.labels if name in masks[pattern]), None)
        if image is None or label is None:
            lacking["mask" if label is None else "image"].append(name)
            continue
        pairs.append(Pair(name, root / image.format(name), root / label[0].format(name), label[1]))
    if listed is None:
        lacking["image"] += _orphans(masks, set(names))
    for kind, patterns in (("image", files.images), ("mask", [pattern for pattern, _ in files.labels])):
        if lacking[kind]:
            looked = ", ".join(pattern.format(lacking[kind][0]) for pattern in patterns)
            raise UserError(
                f"every example of {layout.title} has image and mask, but {len(lacking[kind])} of {len(names)} lack "
                f"the {kind}, the first: {looked} in {root}. Unpack it again, or get it from {layout.origin}"
            )
    return pairs


def _orphans(masks: Mapping[str, frozenset[str]], names: set[str]) -> list[str]:
    """Masks without an image; what a pattern with a longer ending explains is not counted twice."""
    endings = [pattern.split("{}")[1].removesuffix(".png") for pattern in masks]
    orphans = set()
    for there in masks.values():
        bare = {next((n.removesuffix(e) for e in endings if e and n.endswith(e)), n) for n in there}
        orphans |= bare - names
    return sorted(orphans)


@functools.lru_cache(maxsize=64)  # splits of one data set share folders of 100,000 files
def _names(root: Path, pattern: str) -> frozenset[str]:
    """What `{}` can be, from the files that are there."""
    before, after = pattern.split("{}")
    top, names = root / before if before.endswith("/") else (root / before).parent, set()
    if top.is_dir():
        names = {name.removesuffix(after) for name, _ in walk(top) if name.endswith(after)}
    return frozenset(names)


def _read_list(file: Path) -> list[str]:
    """One name a line; DeepLab's lists hold the two files' paths instead, the image's first."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a list of names is UTF-8 text, but {file} is not: unpack it again") from error
    first = [line.split()[0] for line in lines if line.strip()]
    names = [re.sub(r"\.jpg$", "", name.rsplit("/", 1)[-1]) for name in first]
    if len(names) != len(set(names)):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"a list names each image once, but {file} has {twice!r} twice: unpack it again")
    return names
