"""What `label` leaves on disk, for the tests that compare it."""

import hashlib
import json
from pathlib import Path

COUNT = 11  # images of the `photos` fixture


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def tree(out: Path) -> dict[str, str]:
    """Every file below `out` and its SHA-256."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def check_manifest(out: Path, images: int = COUNT, skipped: int = 0) -> dict:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["images"] == images
    assert manifest["counts"]["skipped"] == skipped
    files = tree(out)
    named = {}
    for entry in manifest["shards"]:
        assert files[entry["file"]] == entry["sha256"]
        named |= json.loads((out / entry["file"]).read_text())["files"]
    for path, digest in named.items():
        assert files[path] == digest
    rest = {"manifest.json", "label.json", *(entry["file"] for entry in manifest["shards"])}
    extra = {p for p in files if p not in rest | set(named)}
    assert extra <= {"skipped.json", *(p for p in files if p.startswith("records/") and p.endswith(".json"))}
    return manifest
