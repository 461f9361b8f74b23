"""One rule for looking through folders: links, loops, hidden files, masks beside images, kinds that are not read."""

import os
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from maskclip_jax.cli.segment import find_images
from maskclip_jax.data.archives import Archive, Member
from maskclip_jax.data.decode import FORMATS, SUFFIXES
from maskclip_jax.data.folders import find_pairs
from maskclip_jax.data.sources import open_source
from maskclip_jax.data.walk import files_by_name, walk
from maskclip_jax.label.corpus import open_corpus


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names_of(root: Path) -> list[str]:
    """What each command finds, which is the same for all of them."""
    by_segment = [file.relative_to(root).with_suffix("").as_posix() for file in find_images([root])]
    by_label = [name for name, _ in open_corpus(str(root)).files]
    by_evaluate = open_source(str(root)).names
    assert sorted(by_segment) == by_label == by_evaluate
    if not any(folder.name == "images" for folder in root.iterdir()):
        (pairs,) = find_pairs(root, "classes+1", need_masks=False).values()
        assert [pair.name for pair in pairs] == by_label
    return by_label


def test_links_lead_to_each_folder_once(tmp_path):
    root, outside = (
        touch(tmp_path / "in", "a/1.png", "b/2.png", "b/c/3.png"),
        touch(tmp_path / "far", "x/4.png", "5.png"),
    )
    for name, target in {
        "loop": root,  # back to itself
        "b/up": root / "a",  # has a name of its own
        "parent": tmp_path,  # holds all of this
        "slash": Path("/"),
        "a/z": outside / "x",  # comes first, and so x has its name here
        "q/far": outside,
        "r": outside,
        "one": root / "two",  # round and round
        "two": root / "one",
        "gone": root / "nowhere",
        "6.png": outside / "5.png",  # a file may have two names
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    assert names_of(root) == ["6", "a/1", "a/z/4", "b/2", "b/c/3", "q/far/5"]
    assert names_of(root / "loop" / "b") == ["2", "c/3", "up/1", "up/z/4"]


def test_what_begins_with_a_dot_is_left_out(tmp_path):
    names = (".hidden.png", "._a.png", ".cache/b.png", "a.png", ".DS_Store")
    root = touch(tmp_path / "in", *names)
    assert names_of(root) == ["a"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    assert list(files_by_name(Member(Archive(tmp_path / "a.zip")), SUFFIXES)) == ["a"]


def test_masks_beside_images_are_no_images(tmp_path):
    root = touch(tmp_path / "in", "trip/images/a.png", "trip/labels/a.png", "labels/b.png")
    assert [name for name, _ in open_corpus(str(root)).files] == ["labels/b", "trip/images/a"]
    assert sorted(name for name, _ in walk(root)) == ["labels/b.png", "trip/images/a.png"]


def test_every_suffix_is_found_in_any_case(tmp_path):
    root = touch(tmp_path, *(f"{i:02}{suffix.upper()}" for i, suffix in enumerate(SUFFIXES)), "notes.txt", "a.eps")
    assert len(names_of(root)) == len(SUFFIXES)


def test_suffixes_are_those_of_the_formats():
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert known - {".pfm"} <= set(SUFFIXES) <= known | {".dib", ".pam"}  # a .dib is mostly a BMP


def test_images_that_nothing_reads_are_told(tmp_path):
    root = touch(tmp_path, "a.png", "b.HEIC", "c/d.cr2")
    with pytest.warns(
        UserWarning, match=r"2 files in .* are images that are not read, the first b\.HEIC: convert them"
    ):
        assert list(files_by_name(root, SUFFIXES)) == ["a"]


def test_a_folder_that_cannot_be_opened_is_told(tmp_path, monkeypatch):
    root, scandir = touch(tmp_path, "a.png", "closed/b.png"), os.scandir

    def closed(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(UserWarning, match="closed is left out: it cannot be opened"):
        assert list(files_by_name(root, SUFFIXES)) == ["a"]


def test_splits_are_folders_once(tmp_path):
    root = touch(tmp_path / "in", "train/images/a.png", "val/images/b.png", ".old/images/c.png", "images.txt")
    (root / "latest").symlink_to(root / "val")
    (root / "loop").symlink_to(root)
    assert list(find_pairs(root, "classes+1", need_masks=False)) == ["train", "val"]
