"""Masks for a whole corpus: over all hosts and devices, resumable at the image.

    python run.py label photos --classes "dog, sofa, window" --out labels
    python run.py label photos --classes voc20 --out labels --shard 0/4        (on the first of four machines)
    python run.py label photos --model runs/scenes --out labels                (a student of `distill`)

DATA is a folder of images (with all folders in it), or anything `evaluate` takes. Writes labels/NAME.png, the tree of
the images mirrored, or with --format records a TFDS data set of array_record shards; shards/ and manifest.json hold
counts and checksums. The same command goes on where it stopped: it makes again what was damaged since, and tries images
that were skipped, or have changed since, once more. On several hosts, give each its --shard I/N, or run one
command on all of them with MASKCLIP_COORDINATOR and its companions set, or --cluster on a TPU pod or under Slurm.

`distill` trains from it: --set labels_from=labels/labels, or with records train_data="tfds:labelled?split=train&
label=label&name=name&data_dir=labels/records" and labels_from=data.
"""

from __future__ import annotations

import argparse
import os
import time

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError

# Arguments that change no result.
PLACE = ("data", "out", "scratch", "shard", "on_error", "cluster", "command", "max_pixels")


def share(text: str) -> tuple[int, int]:
    """An argument like 0/4."""
    first, slash, second = text.partition("/")
    if slash and first.isdecimal() and second.isdecimal() and int(first) < int(second):
        return int(first), int(second)
    raise argparse.ArgumentTypeError(f"I/N with I from 0 to N-1, not {text!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="the images")
    parser.add_argument("--classes", help="what to look for, as in segment (a student has its own)")
    parser.add_argument("--out", type=common.place, required=True, help="folder to write to, the same one on all hosts")
    parser.add_argument("--format", choices=("png", "records"), default="png", help="files, or a TFDS data set")
    parser.add_argument("--confidence", action="store_true", help="also each pixel's confidence, 0..255")
    parser.add_argument(
        "--top-k", type=common.positive, metavar="K", help="also the K most probable classes of every cell"
    )
    parser.add_argument("--features", action="store_true", help="also the features of every cell, in bfloat16")
    parser.add_argument("--shard", type=share, metavar="I/N", help="this is worker I of N, counted from 0")
    parser.add_argument("--shard-size", type=common.positive, default=1000, help="images of a shard")
    parser.add_argument(
        "--scratch", type=common.place, help="local folder where records wait until their shard is whole (OUT)"
    )
    parser.add_argument("--on-error", choices=("skip", "stop"), default="skip", help="what to do about damaged images")
    parser.add_argument("--cluster", action="store_true", help="one of several hosts of a cluster (TPU pod, Slurm)")
    common.add_model_arguments(parser)
    common.add_reading_arguments(parser)
    common.add_image_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.cluster or any(name.startswith("MASKCLIP_HOST") or name == "MASKCLIP_COORDINATOR" for name in os.environ):
        from maskclip_jax.ops.hosts import join_hosts

        join_hosts(cluster=args.cluster)  # before anything else touches JAX

    import jax

    from maskclip_jax.data.vocabulary import parse_classes
    from maskclip_jax.data.whole_files import locked
    from maskclip_jax.distill import is_student
    from maskclip_jax.label import folder as label_files
    from maskclip_jax.label import records as label_records
    from maskclip_jax.label import run as label
    from maskclip_jax.label.corpus import open_corpus
    from maskclip_jax.ops.hosts import wait_for_all
    from maskclip_jax.segment.predict import prediction_settings

    hosts = jax.process_count()
    if args.shard and hosts > 1:
        raise UserError(f"--shard is for hosts without a coordinator, but these {hosts} have one: leave it out")
    worker, workers = args.shard or (jax.process_index(), hosts)
    options = label.LabelOptions(
        args.format, args.confidence, args.top_k or 0, args.features, args.shard_size, args.on_error
    )
    corpus = open_corpus(args.data)
    _check_apart(args, corpus)
    if is_student(args.model):
        settings, classes = _student(args), []
    elif args.classes is None:
        raise UserError("a CLIP needs class names, but --classes is missing: name what to look for")
    else:
        classes = [list(entry) for entry in parse_classes(args.classes)]
        reading = common.reading_options(args, background=args.background is not None)
        settings = prediction_settings(parse_classes(args.classes), common.load_model(args), reading)
        label.check_options(settings, options)
    out = common.output_folder(args.out)
    record = {name: value for name, value in vars(args).items() if name not in PLACE}
    record |= {"classes": classes, "images": corpus.identity()}
    if not classes:  # a run may go on after its masks were made
        record |= {"classes": list(settings.names), "step": settings.step}  # pyright: ignore[reportAttributeAccessIssue]: a student's
    label_files.begin(out, record)
    shards = label.shard_count(corpus, options)
    part = list(range(worker, shards, workers))
    lock = out / label_files.PARTIAL / f"lock-{worker}-of-{workers}"
    with locked(lock, f"part {worker}/{workers} of {out}"):
        with common.progress("checking what is there", len(part)) as report:
            mine = label.review(corpus, settings, options, out, part, report)
        wait_for_all("labelling reviewed")  # what one host takes back, no other counts as done
        sizes = {shard: min(options.shard_size, len(corpus) - shard * options.shard_size) for shard in mine}
        made_with, done, skipped = label_files.settings_digest(record), 0, 0
        with common.progress(f"labelling ({worker + 1} of {workers})", sum(sizes.values())) as report:
            for shard in mine:
                before = done
                found = label.label_shard(
                    corpus,
                    settings,
                    options,
                    out,
                    shard,
                    scratch=args.scratch,
                    made_with=made_with,
                    progress=lambda n, before=before: report(before + n),
                )
                for entry in found["skipped"]:
                    common.complain(f"skipped {entry['name']}: {entry['reason']}", "warning")
                done, skipped = done + sizes[shard], skipped + len(found["skipped"])
    print(f"labelled {done - skipped} images in {len(mine)} shards, skipped {skipped}")
    while hosts > 1 and not all((out / label_files.shard_file(shard, shards)).is_file() for shard in range(shards)):
        time.sleep(1)  # hosts of one program end together: one that exits early ends the others
    if missing := label_files.missing_shards(out, shards):
        print(f"{len(missing)} of {shards} shards are left to other workers, or to the same command with their --shard")
        return
    if options.form == "records":
        features = label.record_features(settings, options)
        label_records.write_tfds_metadata(out, shards, features, settings.names)
    counts = label_files.finish(out, shards, record)["counts"]
    print(f"{out} holds the masks of {counts['images']} images ({counts['skipped']} skipped): {out / 'manifest.json'}")


def _student(args: argparse.Namespace):
    from maskclip_jax.distill.predict import StudentLabeller
    from maskclip_jax.distill.student_folder import load_student

    common.refuse_for_students(args, ("short_side", "batch_size"), ("classes", "top_k", "features"))
    trained = load_student(args.model)
    return StudentLabeller(trained, short_side=args.short_side, batch_size=args.batch_size)


def _check_apart(args: argparse.Namespace, corpus) -> None:
    """Masks among the images would be images the next time."""
    from maskclip_jax.data.walk import is_below

    root = getattr(corpus, "root", None)
    if root is not None and is_below(args.out, root):
        raise UserError(f"--out lies outside of the images, but {args.out} is in {root}: choose another folder")
