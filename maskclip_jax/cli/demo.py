"""The shipped scenes, segmented by the shipped models from their words alone, beside the truth.

    python run.py demo

Writes sheet.png (image, naive, MaskCLIP, + prompt denoising, student, truth), scores.json and demo.json, and prints
mIoU on the held-out scenes. Training used neither masks nor these scenes.

The student (MaskCLIP+) ships too: the ViT's masks taught it (experiments/configs/scenes.py:large). `--train`
trains one here instead, in three to five minutes, by `experiments/configs/scenes.py:demo` on 436 other scenes: too
short to pass its teacher. It stays in OUT/student, where a second call finds it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from maskclip_jax.cli import common
from maskclip_jax.errors import UserError

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "configs" / "scenes.py"
SHOWN = (48, 50, 19, 46, 5, 1)  # scenes on the sheet: some that come out well, some that do not
NOTES = {
    "image": "Never seen in training. The prompts are all {classes} names.",
    "naive": "CLIP's own last layer at every patch: its attention mixes the whole image into each.",
    "MaskCLIP": "The same weights without that attention: the values know where. No training.",
    "+ denoising": "Names that no patch is sure of are left out: {threshold:g} is the least.",
    "student": "MaskCLIP+: a network of {size:.1f} M weights, trained on the ViT's masks alone.",
    "truth": "What the scores are measured by, and nothing else. Its borders are on every picture.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=common.place, default=Path("out/demo"), help="folder to write to")
    parser.add_argument("--train", action="store_true", help="train the student here, in three to five minutes")
    common.add_model_arguments(parser)
    parser.set_defaults(model="embedded")


def load_scenes():
    """The shipped scenes: images, label maps, class names."""
    from maskclip_jax.data.images import read_image, read_label_png
    from maskclip_jax.data.whole_files import shipped

    folder = shipped("assets", "scenes")
    names = json.loads((folder / "classes.json").read_text())
    files = sorted((folder / "images").iterdir())
    images = [read_image(f) for f in files]
    labels = [read_label_png(folder / "labels" / f"{f.stem}.png") for f in files]
    return images, labels, names


def run(args: argparse.Namespace) -> None:
    import jax

    from maskclip_jax.data.images import write_image
    from maskclip_jax.data.whole_files import write_json
    from maskclip_jax.distill.student_folder import load_student
    from maskclip_jax.segment.classifier import text_classifier
    from maskclip_jax.segment.predict import segment_images

    began = time.monotonic()
    out = common.output_folder(args.out)
    images, labels, names = load_scenes()
    pretrained = common.load_model(args)
    threshold = pretrained.reading.prompt_denoising or 0.5
    readings = {"naive": {"method": "clip"}, "MaskCLIP": {}, "+ denoising": {"prompt_denoising": threshold}}
    student = train_student(out / "student") if args.train else load_student("embedded-student")
    size = sum(array.size for array in jax.tree.leaves(student.variables)) / 1e6
    print(f"{len(images)} scenes, {len(names)} class names as prompts, model {args.model}")
    classifier = text_classifier(pretrained, names)
    masks, scores = {}, {}
    for name in (*readings, "student"):
        start = time.monotonic()
        with common.progress(name, len(images)) as report:
            options = {"progress": lambda done, total, report=report: report(done)}
            if name in readings:
                options |= {"classifier": classifier} | readings[name]
            found = segment_images(images, names, pretrained if name in readings else student, **options)
        masks[name] = [result.labels for result in found]
        scores[name] = score(labels, masks[name], names) | {"seconds": time.monotonic() - start}
    about = {name: note.format(classes=len(names), threshold=threshold, size=size) for name, note in NOTES.items()}
    write_image(out / "sheet.png", sheet(images, labels, masks, names, scores, about))
    write_json(out / "scores.json", scores)
    print_table(f"{len(images)} held-out scenes, {len(names)} classes, %", scores)
    write_json(out / "demo.json", common.record(args))
    print(f"wrote {out / 'sheet.png'} ({time.monotonic() - began:.0f} s in all)")


def train_student(folder: Path):
    """A student trained here, or the one that an earlier call left in `folder`."""
    if not EXPERIMENT.is_file():
        raise UserError("--train reads scenes of the repository, which an installed package lacks: run it in a clone")
    from maskclip_jax.distill.experiment import load_experiment
    from maskclip_jax.distill.student_folder import load_student
    from maskclip_jax.distill.train import train_and_evaluate

    train_and_evaluate(load_experiment(f"{EXPERIMENT}:demo"), folder)
    return load_student(folder)


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


def sheet(images, labels, results, names, scores, notes):
    """The comparison sheet of the `SHOWN` scenes: a column for each of `notes`."""
    import numpy as np

    from maskclip_jax.data.vocabulary import class_palette
    from maskclip_jax.visualize import area_legend, comparison_sheet

    palette = class_palette(names)
    rows = [sheet_row(images[i], labels[i], [found[i] for found in results.values()], palette) for i in SHOWN]
    lines = [f"mIoU {scores[name]['mIoU']:.1f}" if name in scores else "" for name in notes]
    lines = [f"{line}\n{note}" for line, note in zip(lines, notes.values(), strict=True)]
    legend = area_legend(np.concatenate([labels[i].ravel() for i in SHOWN])[None], names, palette)
    heading = f"mIoU in % on {len(images)} held-out scenes: all of it learned from captions, none from a mask"
    return comparison_sheet(list(notes), rows, notes=lines, legend=legend, heading=heading, panel=256)


def sheet_row(image, truth, masks, palette):
    """The image, each of the masks on it, and the truth, twice as large and all with the truth's borders."""
    from maskclip_jax.visualize import enlarge, overlay

    picture, borders = enlarge(image, truth, 2)
    large = (enlarge(image, mask, 2)[1] for mask in (*masks, truth))
    return [picture, *(overlay(picture, mask, palette, outline=borders) for mask in large)]
