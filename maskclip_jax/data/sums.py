"""SHA-256 checksums stored beside files, and checked when they are read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from maskclip_jax.data.whole_files import cut, read_json, write_json
from maskclip_jax.errors import UserError

SUMS = "sums.json"  # beside the files whose checksums it holds


def write_sums(folder: Path, more: Mapping[str, Any] = MappingProxyType({}), *, skip: Sequence[str] = ()) -> None:
    """Keeps size and SHA-256 of every file below a folder beside them, in `sums.json`.

    Args:
      more: what else to keep there (see `read_sums`).
      skip: names of files that may change.

    Raises:
      UserError: it cannot be written.
    """
    files = {name: _sum(folder / name) for name in _names(folder) if Path(name).name not in skip}
    write_json(folder / SUMS, with_digest({**more, "files": files}))


def read_sums(folder: Path) -> dict[str, Any]:
    """What `write_sums` kept: "files" and its `more`. Raises UserError where that was damaged."""
    content = without_digest(read_json(folder / SUMS), folder / SUMS)
    if not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / SUMS} is no list of files")
    return content


def damaged_files(folder: Path) -> str:
    """What is no longer as `write_sums` found it, in words; "" where all is, or where no sums were kept."""
    if not (folder / SUMS).exists():
        return ""
    try:
        kept, names = read_sums(folder)["files"], _names(folder)
        if missing := sorted(set(kept) - set(names)):
            return f"{missing[0]} is missing"
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            found = pool.map(lambda name: _sum(folder / name), kept)
            return next(
                (f"{name} is not what was written" for name, sum in zip(kept, found, strict=True) if sum != kept[name]),
                "",
            )
    except (UserError, OSError) as error:
        return cut(str(error))


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _sum(path: Path) -> list[int | str]:
    return [path.stat().st_size, digest_of(path)]


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """`content` and its own SHA-256: JSON that is still JSON after a bit has changed is not taken for the same."""
    return content | {"sha256": _digest(content)}


def without_digest(content: dict[str, Any], where: Path) -> dict[str, Any]:
    """The inverse of `with_digest`. Raises UserError where it is not what was written."""
    found = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != _digest(found):
        raise UserError(f"{where} is not what was written")
    return found


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
