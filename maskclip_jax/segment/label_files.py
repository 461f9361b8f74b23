"""The folder of a labelling: files that are whole or not there, the settings it was begun with, and its end.

label.json      the settings, written first: another command is refused in this folder
shards/         one JSON for each shard that is done
manifest.json   settings, counts and checksums, when all shards are; skipped.json lists the images left out
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from maskclip_jax.errors import UserError

PARTIAL, SETTINGS, MANIFEST, SKIPPED = ".partial", "label.json", "manifest.json", "skipped.json"


def write_whole(out: Path, path: str, content: bytes) -> str:
    """Writes `out/path`, whole or not at all, and returns its SHA-256. Raises UserError where that cannot be."""
    target, temporary = out / path, out / PARTIAL / uuid.uuid4().hex
    try:
        for last_try in (False, True):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                os.replace(temporary, target)
                break
            except FileNotFoundError:  # another process is done with everything and has cleared .partial away
                if last_try:
                    raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--out must be writable, but {target} is not ({reason}): make room, run again") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return hashlib.sha256(content).hexdigest()


def write_json_whole(out: Path, path: str, value: Any) -> str:
    """`write_whole` of indented JSON."""
    return write_whole(out, path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Writes the settings, or compares them with those this folder was begun with.

    Raises:
      UserError: they differ, or the folder holds something else's label.json.
    """
    settings = json.loads(json.dumps(settings))
    try:
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_json_whole(out, SETTINGS, settings)
        return
    except (OSError, ValueError) as error:
        raise UserError(
            f"--out goes on with its {SETTINGS}, but that is not readable ({error}): choose another"
        ) from error
    if not isinstance(before, dict) or before != settings:
        names = sorted({*settings, *before}) if isinstance(before, dict) else []
        changed = [name for name in names if before.get(name) != settings.get(name)]
        what = (
            f"{changed[0]} was {before.get(changed[0])!r} and is {settings.get(changed[0])!r}"
            if changed
            else "it has others"
        )
        raise UserError(f"a labelling goes on with the settings it began with, but {what}: choose another --out")


def shard_file(shard: int, shards: int) -> str:
    """The JSON that says that a shard is done, below --out."""
    return f"shards/{shard:05d}-of-{shards:05d}.json"


def missing_shards(out: Path, shards: int) -> list[int]:
    """Shards that are not done yet."""
    return [shard for shard in range(shards) if not (out / shard_file(shard, shards)).is_file()]


def finish(out: Path, shards: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Writes manifest.json and skipped.json from the shards' own and removes what is temporary; returns the manifest.

    Call it when no shard is missing; several processes may, for they write the same.
    """
    counts = {"images": 0, "skipped": 0, "bytes": 0}
    pixels: dict[str, int] = {}
    listed, skipped = [], []
    for shard in range(shards):
        path = shard_file(shard, shards)
        content = (out / path).read_bytes()
        found = json.loads(content)
        for name in ("images", "bytes"):
            counts[name] += found[name]
        counts["skipped"] += len(found["skipped"])
        for name, count in found["pixels"].items():
            pixels[name] = pixels.get(name, 0) + count
        skipped += found["skipped"]
        digest = hashlib.sha256(content).hexdigest()
        listed.append({"file": path, "sha256": digest, "images": found["images"], "files": len(found["files"])})
    if skipped:
        write_json_whole(out, SKIPPED, skipped)
    manifest = {"settings": settings, "counts": counts, "pixels": pixels, "shards": listed}
    write_json_whole(out, MANIFEST, manifest)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return manifest
