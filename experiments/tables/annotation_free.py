"""Annotation-free segmentation (paper, Tables 1 and 2): the naive baseline, MaskCLIP, + key smoothing, + prompt
denoising, both, and MaskCLIP+ trained on MaskCLIP's labels; ResNet and ViT side by side.

    python -m experiments.tables.annotation_free                              no download; the records hold the seconds
    python -m experiments.tables.annotation_free --scale full --only voc20/r50/MaskCLIP

Published (mIoU, %; released README, `--fidelity released`): MaskCLIP R50 41.5 / 18.5 / 10.2 on VOC20 / Context59 /
COCO-Stuff171, MaskCLIP+ 58.0 / 23.9 / 13.8. Ours on the scenes: experiments/README.md, written from
results/annotation_free.embedded.json. Not run at full size: data sets and checkpoints are the user's to download.

MaskCLIP+ is scored where its student is in --runs; the variants are those of `configs/scenes.py` (`large`
and `refined` for the ViT teacher, `large_resnet` for the ResNet) and of `configs/paper.py`.
"""

from __future__ import annotations

import functools
import sys

import numpy as np

from experiments.configs import scenes
from experiments.configs.paper import TARGETS
from experiments.harness import records
from experiments.harness.figures import Figure, bars, curves, sheet
from experiments.harness.records import Cell, Found, Settings, beside, score, seeded, spread, table
from experiments.harness.scoring import (
    CHECKPOINTS,
    recommended_denoising,
    scenes_sheet,
    student_cell,
    teacher_cell,
)

NAME = "annotation_free"
TITLE = "Annotation-free segmentation (Tables 1 and 2)"
SCENES = 500
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
FULL = ("voc20", "context59", "cocostuff171")
PUBLISHED = {  # MaskCLIP of the released README; the two of +KS+PD come from a secondary source
    "voc20/r50/MaskCLIP": 41.5,
    "voc20/r50x16/MaskCLIP": 50.9,
    "voc20/vit_b16/MaskCLIP": 49.5,
    "context59/r50/MaskCLIP": 18.5,
    "context59/r50x16/MaskCLIP": 20.3,
    "context59/vit_b16/MaskCLIP": 21.7,
    "cocostuff171/r50/MaskCLIP": 10.2,
    "cocostuff171/r50x16/MaskCLIP": 13.6,
    "cocostuff171/vit_b16/MaskCLIP": 12.5,
    "context59/r50/+KS+PD": "21.8 (secondary source)",
    "context59/vit_b16/+KS+PD": "25.5 (secondary source)",
    "cocostuff171/r50/+KS+PD": "12.8 (secondary source)",
    "cocostuff171/vit_b16/+KS+PD": "14.6 (secondary source)",
}
READINGS = ("naive", "MaskCLIP", "+KS", "+PD", "+KS+PD")
SIZED = "MaskCLIP at its best size"
SIZES = {"resnet": 160, "vit": 176}  # pixels; validation scenes chose (300, of the sizes from 128 to 192)
PLUS = "MaskCLIP+"
REFINED = f"{PLUS} with a decoder"
# The ViT's students: row -> data, variant, seeds. The second round learns from the labels of the first one's seed 0.
STUDENTS = {
    REFINED: ("scenes", "refined", (0, 1, 2)),
    f"{REFINED}, on Twemoji": ("twemoji", "refined", (0, 1, 2)),
    PLUS: ("scenes", "large", (0, 1, 2)),
    f"{PLUS}, on Twemoji": ("twemoji", "large", (0, 1, 2)),
    f"{PLUS}, second round": ("scenes", "second_round", (0, 1)),
}


def reading_options(name: str, threshold: float) -> dict[str, object]:
    """Arguments of a row."""
    return {
        "naive": name == "naive",
        "prompt_denoising": threshold if "PD" in name else None,
        "key_smoothing": 1.0 if "KS" in name else None,
    }


def cells(settings: Settings) -> list[Cell]:
    return _embedded(settings) if settings.scale == "embedded" else _full(settings)


def _embedded(settings: Settings) -> list[Cell]:
    found, count = [], settings.scenes(SCENES)
    for data in ("scenes", "twemoji"):
        for short, model in MODELS.items():
            threshold = recommended_denoising(model)
            for name in READINGS:
                options = reading_options(name, threshold)
                found.append(teacher_cell(f"{data}/{short}/{name}", model, data, count, **options))
            options = reading_options(SIZED, threshold) | {"short_side": SIZES[short]}
            found.append(teacher_cell(f"{data}/{short}/{SIZED}", model, data, count, **options))
            variant = {"resnet": "large_resnet", "vit": "large"}[short]
            found.append(student_cell(settings, f"{data}/{short}/{PLUS}", variant, data=data, count=count))
    known = {cell.key for cell in found}
    for row, (data, variant, seeds) in STUDENTS.items():
        missing = [seed for seed in seeds if seed_key(row, seed) not in known]
        found += [student_cell(settings, seed_key(row, n), variant, data=data, count=count, seed=n) for n in missing]
    return found


def seed_key(row: str, seed: int) -> str:
    """The cell of a seed of one of the ViT's students."""
    data, variant, _ = STUDENTS[row]
    name = {"large": PLUS, "refined": REFINED}.get(variant, row)
    return seeded(f"{data}/vit/{name}", seed)


def best_reading(found: dict[str, Found], data: str) -> float | None:
    """mIoU of the ViT's best reading without training."""
    scores = (score(found, f"{data}/vit/{name}") for name in (*READINGS, SIZED))
    return max((s for s in scores if s is not None), default=None)


def _students(found: dict[str, Found]) -> list[str | Figure]:
    """The ViT's students, seed by seed, beside their teacher's best reading; their curves on the scenes."""
    rows, lines = [], {}
    most = max(len(seeds) for *_, seeds in STUDENTS.values())
    for row, (data, _, seeds) in STUDENTS.items():
        best = best_reading(found, data)
        known = [found[seed_key(row, seed)].scores for seed in seeds]
        if data == "scenes":
            lines |= {f"{row}, seed {n}": dict(s.get("curve", [])) for n, s in zip(seeds, known, strict=True) if s}
        scores = [None if s is None else s["mIoU"] for s in known]
        mean, deviation = spread(scores)
        over = None if mean is None or best is None else f"{mean - best:+.1f}"
        rows.append((row, *scores, *[""] * (most - len(scores)), mean, deviation, best, over))
    head = ("", *(f"seed {n}" for n in range(most)), "mean", "standard deviation", "the teacher's best", "over it")
    out: list[str | Figure] = [
        "The ViT's students, mIoU in %, and how far their mean is over the best of their teacher's readings above:\n",
        table([head, *rows]),
    ]
    if steps := sorted({step for line in lines.values() for step in line}):
        series = {name: [line.get(step) for step in steps] for name, line in lines.items()}
        series["the teacher's best"] = [best_reading(found, "scenes")] * len(steps)
        caption = "The ViT's students while they train"
        out.append(curves(f"{NAME}_students", steps, series, ("step", "mIoU (%)"), caption))
    return out


def _full(settings: Settings) -> list[Cell]:
    found = []
    for data in FULL:
        for short, model in CHECKPOINTS.items():
            for name in READINGS:
                key = f"{data}/{short}/{name}"
                options = reading_options(name, 0.5) | {"fidelity": "released", "published": PUBLISHED.get(key)}
                found.append(teacher_cell(key, model, data, None, **options))
            variant = f"{data}/annotation_free/{short}"
            published = TARGETS.get(variant)
            found.append(student_cell(settings, f"{data}/{short}/{PLUS}", variant, data=data, published=published))
    return found


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """One row per reading, a column per data set and model; a bar for each."""
    if settings.scale == "full":
        columns = [f"{data}/{model}" for data in FULL for model in CHECKPOINTS]
        rows = [(name, *(beside(found, f"{c}/{name}") for c in columns)) for name in (*READINGS, PLUS)]
        return ["Published / ours, mIoU in %.\n", table([("", *columns), *rows])]
    columns = [f"{data}/{model}" for data in ("scenes", "twemoji") for model in MODELS]
    heads = [c.replace("/", ", ") for c in columns]
    names = (*READINGS, SIZED, PLUS, REFINED)
    rows = [(name, *(score(found, f"{c}/{name}") for c in columns)) for name in names]
    thresholds = [recommended_denoising(model) for model in MODELS.values()]
    counts = {f.cell.config["count"] for f in found.values()}
    side = scenes.config("refined").augmentation.short_side
    note = (
        f"mIoU in % on {max(counts)} held-out scenes, 66 names as prompts; denoising at the checkpoints' thresholds "
        f"({', '.join(f'{t:g}' for t in thresholds)}); the best sizes, by validation scenes, are "
        f"{SIZES['resnet']} px (ResNet) and {SIZES['vit']} px (ViT), and {side} px for the student with a decoder.\n"
    )
    missing = [f.cell.command for key, f in found.items() if PLUS in key and f.record is None]
    empty = [f"Empty until trained: `{command}`\n" for command in dict.fromkeys(missing)]
    series = {head: [score(found, f"{c}/{n}") for n in names] for c, head in zip(columns, heads, strict=True)}
    pictures = [
        sheet(f"{NAME}_{short}", f"Some scenes, {short}", functools.partial(examples, model))
        for short, model in MODELS.items()
        if all(score(found, f"scenes/{short}/{name}") is not None for name in READINGS)
    ]
    return [
        note,
        table([("", *heads), *rows]),
        *empty,
        *_students(found),
        bars(NAME, names, series, "mIoU (%)"),
        *pictures,
    ]


def examples(model: str) -> np.ndarray:
    """Some of the scenes, read in every way, beside the truth."""
    threshold = recommended_denoising(model)
    return scenes_sheet({name: reading_options(name, threshold) for name in READINGS}, model)


if __name__ == "__main__":
    records.main(sys.modules[__name__])
