"""Your own download of a data set as TFDS records (array_record, no TensorFlow), for `evaluate`, `label` and `distill`.

    python run.py prepare voc2012 ~/VOCdevkit --data-dir data
    python run.py evaluate "tfds:voc2012/voc20?split=val&label=label&data_dir=data" --classes voc20 --model MODEL

Data sets: voc2012 (with SBD's SegmentationClassAug, also trainaug), pascal_context, coco_stuff164k, ade20k,
cityscapes_fine; image_corpus (your own folder, with or without masks); emoji_scenes. Nothing is downloaded: a missing
file is told with the places looked at and where to get it. Ignored pixels are 255, and 65535 where image_corpus has
more than 255 --classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError

DATASETS = ("voc2012", "pascal_context", "coco_stuff164k", "ade20k", "cityscapes_fine", "image_corpus", "emoji_scenes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=DATASETS, metavar="DATASET", help="which data set")
    parser.add_argument("source", type=common.place, help="the folder that it was unpacked to")
    parser.add_argument("--data-dir", type=common.place, required=True, help="folder to write to")
    parser.add_argument(
        "--config", help="class set, where there are several: voc20 or voc21, context59 or context60 (with background)"
    )
    parser.add_argument("--splits", nargs="+", help="which of the splits; those whose files are there unless given")
    parser.add_argument("--classes", help="image_corpus: names of the masks' values, in order")
    common.add_image_arguments(parser)
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do about a damaged image or mask"
    )


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.data.datasets import BUILDERS, SKIPPED
    from maskclip_jax.data.layouts import LAYOUTS
    from maskclip_jax.data.sources import tfds_source
    from maskclip_jax.data.vocabulary import parse_classes

    options = {} if args.config is None else {"config": args.config}
    if args.splits:
        if args.dataset not in LAYOUTS:
            raise UserError(f"--splits chooses among a data set's own, but {args.dataset} has none: leave it out")
        options["splits"] = args.splits
    if args.classes is not None:
        if args.dataset != "image_corpus":
            raise UserError(f"--classes names the values of image_corpus, but {args.dataset} came: leave it out")
        options["classes"] = [str(name) for name in parse_classes(args.classes)]
    builder = BUILDERS[args.dataset](args.source, on_error=args.on_error, data_dir=args.data_dir, **options)
    out = common.output_folder(args.data_dir, "--data-dir")  # only when there is something to prepare
    if Path(builder.data_dir).exists():
        raise UserError(f"{builder.data_dir} is there already: use it, or remove it to prepare it again")
    with common.progress("preparing", sum(map(len, builder.pairs.values()))) as builder.report:
        builder.download_and_prepare()
    label = {"label": "label"} if builder.has_masks else {}
    name = "/".join(Path(builder.data_dir).relative_to(out).parts[:-1])
    for split, info in builder.info.splits.items():
        print(f"{info.num_examples} examples: {tfds_source(name, out, split=split, **label, name='name')}")
    if builder.skipped:
        common.complain(f"{len(builder.skipped)} skipped, listed in {Path(builder.data_dir) / SKIPPED}", "warning")
