"""mIoU of a model on images with masks.

    python run.py evaluate scenes --classes scenes66
    python run.py evaluate scenes --classes scenes66 --protocol naclip
    python run.py evaluate scenes --model runs/scenes

DATA is "scenes" (the 64 that ship), a folder with images/ and labels/, an .npz, a folder of .npy, a .zip!split, or
"tfds:NAME?split=…". --model is a CLIP, or a student, as in `segment`. Every score comes with its
protocol: a number without it means nothing.
"""

from __future__ import annotations

import argparse
import math

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with masks")
    parser.add_argument("--classes", help="names of the masks' values, in order (a student has its own)")
    parser.add_argument("--unseen", help="a class set's name, or classes, for seen, unseen and harmonic mIoU")
    parser.add_argument("--out", type=common.place, help="JSON file to write")
    common.add_model_arguments(parser)
    common.add_reading_arguments(parser, without=("background", "background_threshold"))
    parser.set_defaults(scales=[1.0])  # recorded with every score
    common.add_image_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.data.sources import open_source
    from maskclip_jax.data.whole_files import write_json
    from maskclip_jax.distill import is_student
    from maskclip_jax.distill.evaluation import evaluate_student
    from maskclip_jax.evaluate.encoder import beyond_counting, evaluate_teacher
    from maskclip_jax.evaluate.segmented import evaluate_protocol
    from maskclip_jax.segment.classifier import text_classifier
    from maskclip_jax.segment.options import BACKGROUND

    source = open_source(args.data)
    if args.out:
        common.output_file(args.out, (args.data, args.data.rpartition("!")[0], args.model))
    with common.progress("evaluating", len(source)) as report:
        step = {"progress": lambda done, total: report(done)}
        if is_student(args.model):
            views = ("scales", "flip", "batch_size")
            common.refuse_for_students(args, views, ("classes",))
            trained = common.load_run(args)
            asked = {name: value for name in views if (value := getattr(args, name)) is not None}
            scores = evaluate_student(trained.config, trained.variables, trained.text, source, **asked, **step)
            about = {"checkpoint": trained.step, "chosen": trained.chosen}
            scores = scores._replace(protocol=scores.protocol | about)
        else:
            classes, unseen = _classes(args), _unseen(args)
            options = common.reading_options(args, background=str(classes[0]).casefold() == BACKGROUND)
            pretrained = common.load_model(args)
            if args.protocol or beyond_counting(options):
                about = {"classes": classes, "unseen": unseen, "protocol_name": args.protocol}
                scores = evaluate_protocol(pretrained, source, options, **about, **step)
            else:
                rows, names = text_classifier(pretrained, classes, options.templates), [str(c) for c in classes]
                scores = evaluate_teacher(pretrained, rows, names, source, options, unseen=unseen, **step)
    found = scores.to_dict()
    for name, value in found.pop("per class").items():
        if value == value:  # NaN: in neither masks nor predictions
            print(f"  {name:<24} {value:5.1f}")
    if not math.isfinite(found["mIoU"]):
        common.complain("no pixel of these masks is labelled (255 is none): there is nothing to score", "warning")
    protocol = found.pop("protocol")
    print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
    print(
        f"protocol: {', '.join(f'{k} {v}' for k, v in protocol.items() if k != 'fidelity')}, fidelity {args.fidelity}"
    )
    if args.out:
        write_json(args.out, scores.to_dict() | common.record(args))
        print(f"wrote {args.out}")


def _classes(args: argparse.Namespace):
    from maskclip_jax.data.vocabulary import parse_classes

    if args.classes is None:
        raise UserError("the masks' values need names, but --classes is missing: name them in order")
    return parse_classes(args.classes)


def _unseen(args: argparse.Namespace) -> list[int]:
    """Indices of the classes that `--unseen` names."""
    from maskclip_jax.data.vocabulary import is_class_set, parse_classes, unseen_classes

    if not args.unseen:
        return []
    names = [str(c).casefold() for c in _classes(args)]
    known = is_class_set(args.unseen)
    unseen = unseen_classes(args.unseen) if known else parse_classes(args.unseen)
    unseen = [str(c).casefold() for c in unseen]
    strangers = [c for c in unseen if c not in names]
    if strangers:
        raise UserError(f"unseen classes are among --classes, but {', '.join(strangers)} are not: correct the names")
    if len(unseen) == len(names):
        raise UserError("unseen classes are some of --classes, got all of them: leave some out")
    return [names.index(c) for c in unseen]
