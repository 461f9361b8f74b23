"""An export from beginning to end: which images go where, written beside `out` and renamed when all is there."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from maskclip_jax.data.whole_files import cut, locked, read_json, write_json
from maskclip_jax.errors import UserError
from maskclip_jax.export import maps, objects
from maskclip_jax.export.labels import LabelFolder, Labels
from maskclip_jax.export.picture import ExportOptions, Picture, export_names

SETTINGS = "export.json"  # while it is made: what it is made of
_INSIDE = (r"\.(?=[^/]*$)|__(?=[^/]*$)", "_")  # what ends a name for panopticapi and WebDataset, and hides it for one


class Format(NamedTuple):
    """How a tool's files are written."""

    write: Callable  # (folder, part, pictures, options)
    media: tuple[str, ...]  # what may become of the images; the first unless told
    finish: Callable | None = None  # (folder, parts, classes)
    check: Callable | None = None  # of the classes: raises UserError
    avoid: tuple[str, str] = (r"$.", "")  # what names cannot hold besides
    resumed: bool = False


FORMATS = {
    "coco": Format(objects.write_coco, ("none", "copy", "link")),
    "coco-panoptic": Format(objects.write_panoptic, ("none", "copy", "link"), avoid=_INSIDE),
    "cvat": Format(maps.write_cvat, ("none", "copy"), check=maps.cvat_labels),
    "label-studio": Format(objects.write_label_studio, ("none", "copy", "link"), objects.finish_label_studio),
    "fiftyone": Format(maps.write_fiftyone, ("copy", "link"), maps.finish_fiftyone),
    "yolo": Format(
        objects.write_yolo, ("copy", "link"), objects.finish_yolo, avoid=(r"(^|/)images(?=/)", r"\1images_")
    ),
    "webdataset": Format(maps.write_webdataset, ("copy",), maps.finish_classes, avoid=_INSIDE, resumed=True),
    "voc": Format(maps.write_voc, ("none", "copy"), maps.finish_classes, check=maps.check_voc),
}


def export(
    labels: Labels,
    form: str,
    out: Path,
    options: ExportOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Writes the masks as a tool reads them.

    Args:
      labels: of `open_labels`.
      form: a name of `FORMATS`.
      out: a new or empty folder; it is there when all is written. Of a WebDataset that was stopped, whole shards are
        kept beside it, and the same call goes on.
      options: what is exported, and how.
      progress: called with the number of images done.

    Returns:
      What the caller should be told, a line each.

    Raises:
      UserError: the format does not take the options, classes or images; `out` holds something; no space is left.
    """
    options = _checked(labels, form, options or ExportOptions())
    rules = FORMATS[form]
    names = export_names(labels.names, rules.avoid)
    parts = split_images(labels.names, options.split)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out is a new or empty folder, but {out} holds something: choose another")
    stage = out.absolute().with_name(f".{out.absolute().name}.export")
    seen: collections.Counter[str] = collections.Counter()
    made_of = {"format": form, "labels": labels.identity, "options": dataclasses.asdict(options)}
    made_of = {"made of": hashlib.sha256(repr(sorted(made_of.items())).encode()).hexdigest()}

    def pictures(indices: Sequence[int]) -> Iterator[Picture]:
        for index in indices:
            yield Picture(labels, index, names[index], options, seen)
            seen["done"] += 1
            if progress is not None:
                progress(seen["done"])

    with locked(stage.with_name(f"{stage.name}.lock"), f"{out}"):
        kept = False
        with contextlib.suppress(UserError):
            kept = rules.resumed and read_json(stage / SETTINGS) == made_of
        if not kept:
            shutil.rmtree(stage, ignore_errors=True)
            write_json(stage / SETTINGS, made_of)
        try:
            for part, indices in parts.items():
                rules.write(stage, part, pictures(indices), options)
            if rules.finish is not None:
                rules.finish(stage, list(parts), labels.classes)
            (stage / SETTINGS).unlink()
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()
            os.replace(stage, out)
        except OSError as error:
            raise UserError(f"--out must be writable, but {out} is not ({error.strerror}): make room") from error
        finally:
            if not (rules.resumed and any(stage.glob("*.tar"))):
                shutil.rmtree(stage, ignore_errors=True)
    notes = []
    other = [(a, b) for a, b in zip(labels.names, names, strict=True) if a != b]
    if other and (options.media != "none" or form not in ("coco", "label-studio")):  # which name the images themselves
        named = f"the first {cut(repr(other[0][0]))} is {cut(repr(other[0][1]))} there"
        notes.append(f"{len(other)} images have names that {form} cannot hold, {named}")
    if seen["turned"]:
        notes.append(f"{seen['turned']} images are stored turned (EXIF), masks are upright: --media copy turns images")
    if seen["crowded"]:
        what = f"{seen['crowded']} images have over {maps.OBJECTS} regions, each class is one object in them"
        notes.append(f"{what}: --min-area makes fewer")
    return notes


def _checked(labels: Labels, form: str, options: ExportOptions) -> ExportOptions:
    """The options with the format's own media. Raises UserError where the two do not go together."""
    if form not in FORMATS:
        raise UserError(f"a format is one of {', '.join(FORMATS)}, got {form!r}: choose one")
    rules = FORMATS[form]
    media = rules.media[0] if options.media is None else options.media
    if media not in rules.media:
        raise UserError(f"--media is {' or '.join(rules.media)} for {form}, got {media}: choose one")
    if form == "yolo" and options.per != "region":
        raise UserError("a polygon of YOLO is one region, got --per class: leave it out")
    if form == "yolo" and options.split and not {"train", "val"} <= dict(options.split).keys():
        raise UserError("YOLO trains on a part `train` and watches a part `val`, but --split has others: name them so")
    if rules.check is not None:
        rules.check(labels.classes)
    if options.min_confidence and not labels.sure:
        raise UserError("--min-confidence needs confidences, but these masks have none: label with --confidence")
    without = media == "none" and form in ("cvat", "voc")
    if isinstance(labels, LabelFolder) and not labels.files and not without:
        raise UserError(f"{form} names the images, but `label` does not keep where they are: add --images FOLDER")
    return dataclasses.replace(options, media=media)


def split_images(names: Sequence[str], split: Sequence[tuple[str, float]]) -> dict[str, list[int]]:
    """Part -> its images' indices, in order. Images sorted by the SHA-256 of their names are cut at the shares, so that

    the same images are always divided alike. Raises UserError where a part has none.
    """
    if not split:
        return {"": list(range(len(names)))}
    digests = [hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names]
    order = sorted(range(len(names)), key=digests.__getitem__)
    parts, start, share = {}, 0, 0.0
    for part, size in split:
        share += size
        stop = round(share * len(names))
        if stop <= start:
            raise UserError(f"every part of --split has images, but {part} has none of {len(names)}: give it more")
        parts[part], start = sorted(order[start:stop]), stop
    return parts
