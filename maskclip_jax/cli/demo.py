"""The shipped scenes, segmented by the shipped model from their words alone, beside the truth.

    python run.py demo

Writes sheet.png (image, naive, MaskCLIP, + prompt denoising, + key smoothing, student, truth), scores.json and
demo.json, and prints mIoU on the held-out scenes. Training used neither masks nor these scenes.

The student (MaskCLIP+) is trained here, in under three minutes, by `experiments/configs/scenes.py:demo` on 436 other
scenes that the embedded ViT labels: too short to pass its teacher (longer runs: experiments/README.md).
It stays in OUT/student, where a second call finds it. --no-student leaves it out.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import resources
from pathlib import Path

from maskclip_jax.cli import common

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "configs" / "scenes.py"
SHOWN = (48, 50, 19, 46, 5, 1)  # scenes on the sheet: some that come out well, some that do not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=common.place, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--no-student", action="store_true", help="only what needs no training")
    common.add_model_arguments(parser)


def load_scenes():
    """The shipped scenes: images, label maps, class names."""
    from maskclip_jax.data.images import read_image, read_label_png

    folder = Path(str(resources.files("maskclip_jax") / "assets" / "scenes"))
    names = json.loads((folder / "classes.json").read_text())
    files = sorted((folder / "images").iterdir())
    images = [read_image(f) for f in files]
    labels = [read_label_png(folder / "labels" / f"{f.stem}.png") for f in files]
    return images, labels, names


def run(args: argparse.Namespace) -> None:
    from maskclip_jax.data.whole_files import write_json
    from maskclip_jax.segment.classifier import text_classifier
    from maskclip_jax.segment.predict import segment_images

    began = time.monotonic()
    out = common.output_folder(args.out)
    images, labels, names = load_scenes()
    pretrained = common.load_model(args)
    threshold = pretrained.reading.prompt_denoising or 0.5
    readings = {
        "naive": {"method": "clip"},
        "MaskCLIP": {},
        f"+ denoising {threshold:g}": {"prompt_denoising": threshold},
        "+ smoothing": {"prompt_denoising": threshold, "key_smoothing": True},
    }
    print(f"{len(images)} scenes, {len(names)} class names as prompts, model {args.model}")
    classifier = text_classifier(pretrained, names)
    masks, scores = {}, {}

    def keep(name, found, start):
        masks[name] = [result.labels for result in found]
        scores[name] = score(labels, masks[name], names) | {"seconds": time.monotonic() - start}

    for name, options in readings.items():
        start = time.monotonic()
        with common.progress(name, len(images)) as report:
            options["progress"] = lambda done, total, report=report: report(done)
            keep(name, segment_images(images, names, pretrained, classifier=classifier, **options), start)
    write_results(out, images, labels, names, masks, scores)
    if not args.no_student:
        start = time.monotonic()
        if trained := train_student(args, out / "student"):
            from maskclip_jax.distill.predict import iter_student_segmentations

            keep("student", iter_student_segmentations(images, trained, classes=names), start)
            write_results(out, images, labels, names, masks, scores)
    print_table(f"{len(images)} held-out scenes, {len(names)} classes, %", scores)
    write_json(out / "demo.json", common.record(args))
    print(f"wrote {out / 'sheet.png'} ({time.monotonic() - began:.0f} s in all)")


def train_student(args: argparse.Namespace, folder: Path):
    """The student of the embedded model; None, with a line why, where its scenes are not at hand."""
    if args.model != "embedded":
        print("no student: the demo's starts from the embedded ResNet; `run.py distill` trains any other")
        return None
    if not EXPERIMENT.is_file():
        print("no student: its scenes come with the repository, not with the installed package")
        return None
    from maskclip_jax.distill.experiment import load_experiment
    from maskclip_jax.distill.student_folder import load_student
    from maskclip_jax.distill.train import train_and_evaluate

    config = load_experiment(f"{EXPERIMENT}:demo")
    train_and_evaluate(config, folder)
    return load_student(folder, "latest")


def score(labels, predicted, names) -> dict[str, float]:
    """Percentages over all scenes."""
    import numpy as np

    from maskclip_jax.evaluate.metrics import confusion_matrix, mean_iou, pixel_accuracy

    confusion = sum(confusion_matrix(t, p, len(names)) for t, p in zip(labels, predicted, strict=True))
    iou = mean_iou(confusion)
    per_class = np.asarray(iou.per_class)
    return {
        "mIoU": 100 * float(iou.mean),
        "objects": 100 * float(np.nanmean(per_class[:60])),
        "stuff": 100 * float(np.nanmean(per_class[60:])),
        "pixel accuracy": 100 * float(pixel_accuracy(confusion)),
    }


def write_results(out: Path, images, labels, names, masks, scores) -> None:
    """The sheet and the scores of what there is so far."""
    from maskclip_jax.data.images import write_image
    from maskclip_jax.data.whole_files import write_json

    write_image(out / "sheet.png", sheet(images, labels, masks, names, scores))
    write_json(out / "scores.json", scores)


def print_table(title: str, scores: dict[str, dict[str, float]]) -> None:
    """A row for each way of reading."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("", *next(iter(scores.values()))):
        table.add_column(column, justify="right" if column else "left")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    Console(width=100).print(table)


def sheet(images, labels, results, names, scores):
    """The comparison sheet of the `SHOWN` scenes."""
    import numpy as np

    from maskclip_jax.data.vocabulary import class_palette
    from maskclip_jax.visualize import area_legend, comparison_sheet, overlay

    palette = class_palette(names)
    shown = [i for i in SHOWN if i < len(images)]
    # Enlarged before they are drawn on, so that borders stay thin.
    large = lambda x: np.repeat(np.repeat(x, 2, 0), 2, 1)  # noqa: E731
    columns = ["image", *(f"{name}: {scores[name]['mIoU']:.1f}" for name in results), "truth"]
    rows = []
    for i in shown:
        masks = [*(found[i] for found in results.values()), labels[i]]
        rows.append([large(images[i]), *(overlay(large(images[i]), large(m), palette) for m in masks)])
    present = np.concatenate([labels[i].ravel() for i in shown])[None]
    heading = "mIoU in % over all held-out scenes; trained from captions alone"
    return comparison_sheet(columns, rows, legend=area_legend(present, names, palette), heading=heading)
