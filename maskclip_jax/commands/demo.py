"""The shipped scenes, segmented by the shipped model from their words alone, beside the truth.

    python run.py demo

Writes sheet.png (image, naive, MaskCLIP, + prompt denoising, + key smoothing, truth), scores.json and demo.json,
and prints mIoU on the held-out scenes. Neither masks nor these scenes were seen in training.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import resources
from pathlib import Path

from maskclip_jax.commands import common

SHOWN = (48, 50, 19, 46, 5, 1)  # scenes on the sheet: some that come out well, some that do not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
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
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from maskclip_jax.data.images import write_image, write_json
    from maskclip_jax.evaluate import confusion_matrix, mean_iou, pixel_accuracy
    from maskclip_jax.segment.classifier import text_classifier
    from maskclip_jax.segment.predict import segment_images

    began = time.monotonic()
    out = common.output_folder(args.out)
    images, labels, names = load_scenes()
    pretrained = common.load_model(args)
    threshold = pretrained.reading.prompt_denoising or 0.5
    readings = {
        "naive": {"naive": True},
        "MaskCLIP": {},
        f"+ denoising {threshold:g}": {"prompt_denoising": threshold},
        "+ smoothing": {"prompt_denoising": threshold, "key_smoothing": True},
    }
    console = Console(width=100)
    print(f"{len(images)} scenes, {len(names)} class names as prompts, model {args.model}")
    classifier = text_classifier(pretrained, names)
    results, scores = {}, {}
    for name, options in readings.items():
        start = time.monotonic()
        with common.progress(name, len(images)) as report:
            found = segment_images(
                images,
                names,
                pretrained,
                classifier=classifier,
                progress=lambda done, total, report=report: report(done),
                **options,
            )
        results[name] = [result.labels for result in found]
        confusion = sum(confusion_matrix(t, p, len(names)) for t, p in zip(labels, results[name], strict=True))
        iou = mean_iou(confusion)
        per_class = np.asarray(iou.per_class)
        scores[name] = {
            "mIoU": 100 * float(iou.mean),
            "objects": 100 * float(np.nanmean(per_class[:60])),
            "stuff": 100 * float(np.nanmean(per_class[60:])),
            "pixel accuracy": 100 * float(pixel_accuracy(confusion)),
            "seconds": time.monotonic() - start,
        }
    table = Table(title=f"{len(images)} held-out scenes, {len(names)} classes, %")
    for column in ("", *next(iter(scores.values()))):
        table.add_column(column, justify="right" if column else "left")
    for name, row in scores.items():
        table.add_row(name, *(f"{value:.1f}" for value in row.values()))
    console.print(table)
    write_image(out / "sheet.png", sheet(images, labels, results, names, scores))
    write_json(out / "scores.json", scores)
    write_json(out / "demo.json", common.record(args))
    print(f"wrote {out / 'sheet.png'} ({time.monotonic() - began:.0f} s in all)")


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
