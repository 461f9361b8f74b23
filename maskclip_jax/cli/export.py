"""Finished masks in the files of another tool.

    python run.py export labels --to coco --images photos --out coco
    python run.py export labels --to yolo --images photos --split train=0.8,val=0.2 --out yolo
    python run.py export out --to cvat --min-area 50 --out cvat

LABELS is the --out of a finished `label` (also --format records, which hold their images) or `segment`. docs/export.md
says what each format's files are, how its tool opens them, and what becomes of background and ignored pixels.

--out is a new or empty folder, and there only when all is written. A `webdataset` that was stopped goes on with the
same command; the others start again. --split sorts images by the SHA-256 of their names and cuts at the shares.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError

FORMATS = ("coco", "coco-panoptic", "cvat", "label-studio", "fiftyone", "yolo", "webdataset", "voc")


def shares(text: str) -> tuple[tuple[str, float], ...]:
    """An argument like train=0.8,val=0.2."""
    parts = [entry.partition("=") for entry in text.split(",")]
    try:
        found = tuple((name.strip(), common.unit(share)) for name, _, share in parts)
        named = [re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII) for name, _ in found]
        if all(named) and len(dict(found)) == len(found) and abs(sum(share for _, share in found) - 1) < 1e-6:
            return found
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(f"parts with shares that add up to 1, like train=0.8,val=0.2, not {text!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("labels", type=common.place, metavar="LABELS", help="a finished folder of label or segment")
    parser.add_argument("--to", choices=FORMATS, required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", type=common.place, required=True, help="folder to write, new or empty")
    parser.add_argument("--images", help="the images that were labelled; of segment, where they lie now")
    parser.add_argument(
        "--media", choices=("copy", "link", "none"), help="what becomes of the images (each format has its own)"
    )
    parser.add_argument("--per", choices=("region", "class"), default="region", help="what is one object")
    parser.add_argument("--min-area", type=common.positive, default=1, help="pixels an object has at least")
    parser.add_argument("--min-confidence", type=common.unit, help="mean confidence an object has at least")
    parser.add_argument("--split", type=shares, metavar="PART=SHARE,…", help="like train=0.8,val=0.2")
    parser.add_argument("--shard-size", type=common.positive, default=1000, help="images of a webdataset shard")
    parser.add_argument(
        "--url", default="/data/local-files/?d=", help="label-studio: what comes before an image's path"
    )
    common.add_image_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from maskclip_jax.data.walk import is_below
    from maskclip_jax.export.labels import open_labels
    from maskclip_jax.export.picture import ExportOptions
    from maskclip_jax.export.run import FORMATS as RULES
    from maskclip_jax.export.run import export

    for inputs in (args.labels, *([Path(args.images)] if args.images else [])):
        if is_below(args.out, inputs):
            raise UserError(f"--out lies outside of what is read, but {args.out} is in {inputs}: choose another folder")
    labels = open_labels(args.labels, args.images)
    names = ("per", "min_area", "media", "shard_size", "url")
    options = ExportOptions(
        min_confidence=args.min_confidence or 0.0,
        split=args.split or (),
        **{name: getattr(args, name) for name in names},
    )
    try:
        with common.progress(f"exporting to {args.to}", len(labels.names)) as report:
            notes = export(labels, args.to, args.out, options, report)
    except KeyboardInterrupt:
        again = "goes on" if RULES[args.to].resumed else "starts again"
        print(f"stopped: the same command {again}", file=sys.stderr)
        return 130
    for note in notes:
        common.complain(note, "warning")
    print(f"{args.out} holds the masks of {len(labels.names)} images for {args.to}")
    return 0
