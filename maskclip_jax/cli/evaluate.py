"""mIoU of a model on images with masks.

    python run.py evaluate scenes --classes scenes66
    python run.py evaluate scenes --classes scenes66 --model embedded-vit --protocol naclip
    python run.py evaluate scenes --model runs/scenes

DATA is "scenes" (the 64 that ship), a folder with images/ and labels/, an .npz, a folder of .npy, a .zip!split, or
"tfds:NAME?split=…". --model is a CLIP, as in `segment`, or the folder of a run of `distill`. Every score comes with its
protocol: a number without it means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="images with masks")
    parser.add_argument("--classes", help="names of the masks' values, in order (a student knows its own)")
    parser.add_argument("--unseen", help="a class set's name, or classes, for seen, unseen and harmonic mIoU")
    parser.add_argument("--out", type=common.place, help="JSON file to write")
    common.add_model_arguments(parser)
    common.add_size_arguments(parser)
    common.add_image_arguments(parser)
    parser.add_argument("--templates", help="maskclip (85), imagenet (80), scene (5), single, or a template with {}")
    parser.add_argument("--naive", action="store_true", help="the paper's baseline: the unmodified last layer")
    parser.add_argument("--prompt-denoising", type=common.unit, metavar="T", help="threshold; off unless given")
    parser.add_argument("--key-smoothing", type=common.unit, nargs="?", const=1.0, metavar="T", help="threshold (1)")
    common.add_method_arguments(parser)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="sizes whose probabilities are averaged")
    parser.add_argument("--flip", action="store_true", help="average with the mirrored image")
    parser.add_argument("--batch-size", type=common.positive, default=8, help="images at once, at most")


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.data.images import write_json
    from maskclip_jax.data.sources import open_source
    from maskclip_jax.distill.evaluation import evaluate_student
    from maskclip_jax.distill.run_layout import is_run
    from maskclip_jax.evaluate.encoder import evaluate_teacher

    source = open_source(args.data)
    if args.out:
        common.output_file(args.out, (args.data, args.data.rpartition("!")[0], args.model))
    views = {"scales": args.scales, "flip": args.flip, "batch_size": args.batch_size}
    with common.progress("evaluating", len(source)) as report:
        views["progress"] = lambda done, total: report(done)
        if is_run(args.model):
            refused = ("classes", "templates", "naive", "prompt_denoising", "key_smoothing", "protocol")
            refused += ("short_side", "within")
            common.refuse_for_students(args, (*refused, *common.METHOD_OPTIONS))
            trained = common.load_run(args)
            scores = evaluate_student(trained.config, trained.variables, trained.text, source, **views)
            about = {"checkpoint": trained.step, "chosen": trained.chosen}
            scores = scores._replace(protocol=scores.protocol | about)
        elif any(getattr(args, o) for o in ("protocol", "synonyms", "probability_scale", "pamr")):
            from maskclip_jax.evaluate.segmented import evaluate_protocol

            scores = evaluate_protocol(common.load_model(args), source, **_protocol_options(args), **views)
        else:
            scores = evaluate_teacher(*_teacher(args), source, **_teacher_options(args), **views)
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
        raise UserError("a CLIP must be told what the masks' values mean, but --classes is missing: name them in order")
    return parse_classes(args.classes)


def _protocol_options(args: argparse.Namespace) -> dict:
    """Arguments of `evaluate_protocol`; a background, where the first class is called so, has the threshold."""
    from maskclip_jax.segment.options import BACKGROUND

    classes = _classes(args)
    options = _teacher_options(args) | {"templates": common.template_option(args)}
    options |= {"short_side": args.short_side, "within": args.within}
    unseen = options.pop("unseen", ())
    options = common.with_protocol(args, options, background=str(classes[0]).casefold() == BACKGROUND)
    del options["scales"]  # they come with the other views
    return {"classes": classes, "unseen": unseen, "protocol_name": args.protocol} | options


def _teacher(args: argparse.Namespace):
    from maskclip_jax.data.preprocess import sized
    from maskclip_jax.segment.classifier import text_classifier

    classes = _classes(args)
    pretrained = common.load_model(args)
    size = sized(pretrained.preprocess, args.short_side, args.within)
    pretrained = dataclasses.replace(pretrained, preprocess=size)
    return pretrained, text_classifier(pretrained, classes, common.template_option(args)), [str(c) for c in classes]


def _teacher_options(args: argparse.Namespace) -> dict:
    from maskclip_jax.data.vocabulary import is_class_set, parse_classes, unseen_classes

    options = {name: getattr(args, name) for name in ("prompt_denoising", "key_smoothing", "naive")}
    options["method"] = args.method or "maskclip"
    if args.unseen:
        names = [str(c).casefold() for c in _classes(args)]
        known = is_class_set(args.unseen)
        unseen = unseen_classes(args.unseen) if known else parse_classes(args.unseen)
        unseen = [str(c).casefold() for c in unseen]
        strangers = [c for c in unseen if c not in names]
        if strangers:
            raise UserError(
                f"unseen classes are among --classes, but {', '.join(strangers)} are not: correct the names"
            )
        if len(unseen) == len(names):
            raise UserError("unseen classes are some of --classes, but all of them came: leave some out")
        options["unseen"] = [names.index(c) for c in unseen]
    return options
