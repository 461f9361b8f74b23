"""The files that a segmentation becomes: an overlay with a legend, an indexed PNG, and a JSON of its classes."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

from maskclip_jax.data.images import write_image, write_label_png
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.data.whole_files import as_text, write_json

TRAILS = ("_overlay.png", "_labels.png", ".json")  # of the files of one image
LONGEST = 200  # bytes of an output's name before its suffix: systems take 255 in all


def is_result(file: Path) -> bool:
    """Whether an earlier run wrote this picture."""
    for trail in TRAILS[:2]:
        if file.name.endswith(trail):
            beside = file.with_name(file.name.removesuffix(trail) + TRAILS[2])
            return beside.exists() and is_own(beside, {"image", "height", "width", "classes"})
    return False


def is_own(file: Path, keys: set[str]) -> bool:
    """Whether a JSON file is one that this command writes, or is not there."""
    try:
        if not os.path.lexists(file):
            return True
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(found) == keys


def output_names(paths: list[Path], out: Path | None = None) -> dict[Path, str]:
    """What each image's files are called: its stem, with a number where that is taken.

    It is where another image has it (in any case: some systems take A and a for one), where a file in `out` is one of
    the images, or where it was not written by an earlier run.
    """
    inputs = {os.path.realpath(path) for path in paths}
    names: dict[Path, str] = {}
    taken: set[str] = {"segment"}  # segment.json is the run's own record
    for path in paths:
        stem = path.stem
        if len(os.fsencode(stem)) > LONGEST:
            stem = os.fsencode(stem)[:LONGEST].decode(errors="ignore")
        name, number = stem, 2
        while _folded(name) in taken or (out is not None and _is_occupied(out, name, inputs)):
            name, number = f"{stem}-{number}", number + 1
        names[path] = name
        taken.add(_folded(name))
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_occupied(out: Path, name: str, inputs: set[str]) -> bool:
    files = [out / (name + trail) for trail in TRAILS]
    there = [file for file in files if os.path.lexists(file)]
    if any(os.path.realpath(file) in inputs for file in there):
        return True
    return bool(there) and not (files[2] in there and is_own(files[2], {"image", "height", "width", "classes"}))


def write_result(out: Path, name: str, path: Path, overlay, result) -> None:
    """The files of one image, `path`; `overlay` is `result.overlay(image)`, or None: then there is no such file."""
    palette = class_palette(result.classes)
    # first: by this file the next run knows that the others are results
    write_json(out / f"{name}.json", result_record(as_text(path), result))
    if overlay is not None:
        write_image(out / f"{name}_overlay.png", overlay)
    write_label_png(out / f"{name}_labels.png", result.labels, palette)


def result_record(image: str, result) -> dict:
    """What NAME.json holds: `image` is what the picture is called."""
    scores = [
        {"class": c, "index": i, "area": result.scores[c].area, "confidence": result.scores[c].confidence}
        for i, c in enumerate(result.classes)
    ]
    height, width = result.labels.shape
    return {"image": image, "height": height, "width": width, "classes": scores}
