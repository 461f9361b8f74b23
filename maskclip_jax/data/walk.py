"""Files below a folder, on disk or in a zip file, by a name that keeps the folders. One rule for all commands:

what begins with a dot is left out; links to folders are followed, each real folder once, under its own name where it
has one below the folder looked through; a link to a folder above leads nowhere; and where `labels` lies beside
`images` (in any case), it holds masks, which are no images.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from maskclip_jax.data.archives import Member
from maskclip_jax.errors import UserError

File = Path | Member

# Image formats that are not read here: files of them cause a warning.
_FOREIGN = (".heic", ".heif", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf")


def files_by_name(folder: File, suffixes: tuple[str, ...]) -> dict[str, File]:
    """Files with one of these suffixes (in any case), sorted by their path in the folder without suffix.

    Raises UserError where two files have one name.
    """
    found: dict[str, File] = {}
    for name, file in files_below(folder, suffixes):
        bare = name[: -len(Path(name).suffix)]
        if bare in found:
            raise UserError(f"images have different names, but {folder} has two named {bare!r}: rename one")
        found[bare] = file
    return dict(sorted(found.items()))


def files_below(folder: File, suffixes: tuple[str, ...]) -> list[tuple[str, File]]:
    """(path in the folder, file) of all files with one of these suffixes, sorted by path.

    Warns where images lie there that nothing here reads, and where a folder cannot be opened.
    """
    found, foreign = [], []
    for name, file in walk(folder):
        suffix = Path(name).suffix.lower()
        if suffix in suffixes:
            found.append((name, file))
        elif suffix in _FOREIGN:
            foreign.append(name)
    if foreign:
        warnings.warn(
            f"{len(foreign)} files in {folder} are images that are not read, the first {min(foreign)}: convert them",
            stacklevel=2,
        )
    return sorted(found, key=lambda item: item[0])


def walk(folder: File) -> Iterator[tuple[str, File]]:
    """(path in the folder, file) of every file below it, in no order; see the module's head."""
    if isinstance(folder, Member):
        yield from _walk_archive(folder)
        return
    seen = {_identity(folder)}
    above = {_identity(parent) for parent in Path(os.path.realpath(folder)).parents}
    folders, links = [("", folder)], []
    while folders or links:
        # Real folders first: what lies below `folder` keeps the name it has there.
        if not folders:
            links.sort(reverse=True)
            prefix, link = links.pop()
            if (identity := _identity(link)) is None or identity in seen or identity in above:
                continue
            seen.add(identity)
            folders.append((prefix, link))
        prefix, current = folders.pop()
        entries = _entries(current)
        beside_images = any(entry.name.lower() == "images" for entry in entries)
        for entry in entries:
            if entry.name.startswith(".") or not _is_folder(entry):
                if not entry.name.startswith("."):
                    yield prefix + entry.name, Path(entry.path)
                continue
            if entry.name.lower() == "labels" and beside_images:
                continue
            if entry.is_symlink():
                links.append((f"{prefix}{entry.name}/", Path(entry.path)))
            elif (identity := _identity(entry.path)) not in seen:  # reached before by a link, or mounted twice
                seen.add(identity)
                folders.append((f"{prefix}{entry.name}/", Path(entry.path)))


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or lies in it, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def subfolders(folder: File) -> list[File]:
    """The folders right in one, by the same rule, sorted by name."""
    found = [item for item in folder.iterdir() if not item.name.startswith(".") and item.is_dir()]
    if isinstance(folder, Path):
        here = Path(os.path.realpath(folder))
        above = {_identity(place) for place in (here, *here.parents)}
        found.sort(key=lambda item: (os.path.islink(item), item.name))
        places = [_identity(item) for item in found]
        found = [item for i, item in enumerate(found) if places[i] not in above and places[i] not in places[:i]]
    return sorted(found, key=lambda item: item.name)


def _walk_archive(top: Member) -> Iterator[tuple[str, File]]:
    folders = [("", top)]
    while folders:
        prefix, folder = folders.pop()
        items = list(folder.iterdir())
        beside_images = any(item.name.lower() == "images" for item in items)
        for item in items:
            if item.name.startswith("."):
                continue
            if not item.is_dir():
                yield prefix + item.name, item
            elif item.name.lower() != "labels" or not beside_images:
                folders.append((f"{prefix}{item.name}/", item))


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        warnings.warn(f"the folder {folder} is left out: it cannot be opened ({error.strerror})", stacklevel=2)
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round in a circle
        return False


def _identity(folder: str | Path) -> tuple[int, int] | None:
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino
