"""Files below a folder, on disk or in a zip file, by a name that keeps the folders."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from maskclip_jax.errors import UserError

File = Path | zipfile.Path


def files_by_name(folder: File, suffixes: tuple[str, ...]) -> dict[str, File]:
    """Files with one of these suffixes (in any case), sorted by their path in the folder without suffix.

    What begins with a dot is left out. Raises UserError where two files have one name.
    """
    found: dict[str, File] = {}
    for name, file in _walk(folder, ""):
        if Path(name).suffix.lower() in suffixes:
            bare = name[: -len(Path(name).suffix)]
            if bare in found:
                raise UserError(f"images have different names, but {folder} has two named {bare!r}: rename one")
            found[bare] = file
    return dict(sorted(found.items()))


def _walk(folder: File, above: str) -> Iterator[tuple[str, File]]:
    for item in folder.iterdir():
        if item.name.startswith("."):
            continue
        if item.is_dir():
            yield from _walk(item, f"{above}{item.name}/")
        else:
            yield above + item.name, item
