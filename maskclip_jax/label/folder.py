"""The output folder of `label`: its settings, shards and manifest, written whole or not at all.

label.json      the settings, written first: another command is refused in this folder
shards/         one JSON for each shard that is done
manifest.json   settings, counts and checksums, when all shards are; skipped.json lists the images left out

What was damaged since (a power loss, a full disk) counts as not there: the same command makes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from maskclip_jax.data.sums import digest_of, with_digest, without_digest
from maskclip_jax.data.whole_files import cut, is_count, read_json, reason, sync
from maskclip_jax.errors import UserError

PARTIAL, SETTINGS, MANIFEST, SKIPPED = ".partial", "label.json", "manifest.json", "skipped.json"
MOST = 2**30  # bytes of a shard's JSON, which names every file of the shard


def write_whole(out: Path, path: str, content: bytes) -> str:
    """Writes `out/path`, whole or not at all, and returns its SHA-256. Raises UserError where that cannot be."""
    write_made(out, path, lambda temporary: temporary.write_bytes(content))
    return hashlib.sha256(content).hexdigest()


def write_made(out: Path, path: str, make: Callable[[Path], Any]) -> None:
    """`write_whole` of what `make` writes to the temporary name that it gets (array_record writes files itself)."""
    target, temporary = out / path, out / PARTIAL / uuid.uuid4().hex
    try:
        for last_try in (False, True):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                make(temporary)
                sync(temporary)
                os.replace(temporary, target)
                break
            except FileNotFoundError:  # another process is done with everything and has cleared .partial away
                if last_try:
                    raise
    except (OSError, RuntimeError) as error:  # array_record's word for a full disk is RuntimeError
        why = reason(error)
        raise UserError(f"--out must be writable, but {target} is not ({why}): make room, run again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json_whole(out: Path, path: str, value: Any) -> None:
    """`write_whole` of indented JSON; bytes of file names that are not UTF-8 become JSON's escapes.

    Nothing is written where it is there already: a finished folder may lie on a disk that can only be read.
    """
    content = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    if _digest_of(out / path) != hashlib.sha256(content).hexdigest():
        write_whole(out, path, content)


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or compares them with those this folder was begun with.

    Damaged ones are written again where nothing was made yet, or a shard tells that it was made with these.

    Raises:
      UserError: they differ, or are damaged and nothing tells, or the folder holds something else's label.json.
    """
    settings = json.loads(json.dumps(settings))
    if not (out / SETTINGS).exists():
        write_json_whole(out, SETTINGS, settings)
        return
    try:
        before = read_json(out / SETTINGS, surrogates=True)
    except UserError as error:
        if _made_with(out) not in ("", settings_digest(settings)):
            raise UserError(
                f"{error}; nothing tells that all in {out} was made like this: remove it, or choose another --out"
            ) from error
        write_json_whole(out, SETTINGS, settings)
        return
    if before != settings:
        names, gone = sorted({*settings, *before}), object()  # None is a setting
        name = next(name for name in names if before.get(name, gone) != settings.get(name, gone))
        was, now = (cut(repr(values[name])) if name in values else "not there" for values in (before, settings))
        what = f"{name} was {was} and is {now}"
        raise UserError(f"a labelling goes on with the settings it began with, but {what}: choose another --out")


def settings_digest(settings: dict[str, Any]) -> str:
    """What a shard's JSON says of the settings it was made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _made_with(out: Path) -> str | None:
    """`settings_digest` of what was made in a folder; "" where nothing was, None where nothing tells."""
    for path in sorted((out / "shards").glob("*.json")):
        with contextlib.suppress(UserError):
            if isinstance(made := _sound(path).get("settings"), str):
                return made
    made = [out / name for name in ("labels", "confidence", "cells", "records", "shards", PARTIAL)]
    return None if any(path.is_file() for folder in made for path in folder.rglob("*")) else ""


def shard_file(shard: int, shards: int) -> str:
    """The JSON that says that a shard is done, below --out."""
    return f"shards/{shard:05d}-of-{shards:05d}.json"


def read_shard(out: Path, shard: int, shards: int) -> dict[str, Any] | None:
    """The JSON of a shard that is done; None where it is not there, or not what was written."""
    with contextlib.suppress(UserError):
        return _sound(out / shard_file(shard, shards))
    return None


def write_shard(out: Path, shard: int, shards: int, found: dict[str, Any]) -> None:
    """Says that a shard is done."""
    write_json_whole(out, shard_file(shard, shards), with_digest(found))


def _sound(path: Path) -> dict[str, Any]:
    found = without_digest(read_json(path, most=MOST, surrogates=True), path)
    kinds = {"images": int, "bytes": int, "pixels": dict, "skipped": list, "files": dict}
    if any(type(found.get(name)) is not kind for name, kind in kinds.items()) or not (
        all(map(is_count, (found["images"], found["bytes"], *found["pixels"].values())))
        and all(isinstance(entry, dict) for entry in found["skipped"])
        and all(isinstance(digest, str) for digest in found["files"].values())
    ):
        raise UserError(f"{path} is not a shard's: remove it")
    return found


def missing_shards(out: Path, shards: int) -> list[int]:
    """Shards that are not done yet."""
    return [shard for shard in range(shards) if read_shard(out, shard, shards) is None]


def damaged_shards(
    out: Path, mine: Sequence[int], shards: int, progress: Callable[[int], None] | None = None
) -> list[int]:
    """Those of `mine` that say that they are done, but have files that are not what was written.

    Every file is read once. `progress` is called with the number of shards looked at.
    """
    damaged = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for place, shard in enumerate(mine, 1):
            found = read_shard(out, shard, shards)
            if found is not None:
                digests = pool.map(lambda path: _digest_of(out / path), found["files"])
                if any(a != b for a, b in zip(digests, found["files"].values(), strict=True)):
                    damaged.append(shard)
            if progress is not None:
                progress(place)
    return damaged


def _digest_of(path: Path) -> str | None:
    try:
        return digest_of(path)
    except (OSError, ValueError):
        return None


def undo_shard(out: Path, shard: int, shards: int) -> None:
    """Takes back that a shard is done; what is whole of it is found again."""
    with contextlib.suppress(FileNotFoundError):
        (out / shard_file(shard, shards)).unlink()


def finish(out: Path, shards: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes manifest.json and skipped.json from the shards' own and removes what is temporary; returns the manifest.

    Call it when no shard is missing; several processes may, for they write the same.
    """
    counts = {"images": 0, "skipped": 0, "bytes": 0}
    pixels: dict[str, int] = {}
    listed, skipped = [], []
    for shard in range(shards):
        path = shard_file(shard, shards)
        found = _sound(out / path)
        for name in ("images", "bytes"):
            counts[name] += found[name]
        counts["skipped"] += len(found["skipped"])
        for name, count in found["pixels"].items():
            pixels[name] = pixels.get(name, 0) + count
        skipped += found["skipped"]
        digest = _digest_of(out / path)
        listed.append({"file": path, "sha256": digest, "images": found["images"], "files": len(found["files"])})
    if skipped:
        write_json_whole(out, SKIPPED, skipped)
    elif (out / SKIPPED).exists():
        (out / SKIPPED).unlink()
    manifest = {"settings": settings, "counts": counts, "pixels": pixels, "shards": listed}
    write_json_whole(out, MANIFEST, manifest)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return manifest
