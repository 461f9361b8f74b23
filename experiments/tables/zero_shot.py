"""Zero-shot segmentation (paper, Tables 3 and 4): seen, unseen and harmonic mIoU of MaskCLIP+ with its two phases,
beside the supervised upper bound and the fine-tuned CLIP that fails on unseen classes (section 3.2, three mappers).

    python -m experiments.tables.zero_shot                                    seconds; students are found in --runs
    python -m experiments.tables.zero_shot --train --runs runs                trains those that are missing: hours
    python run.py distill experiments/configs/paper.py:voc20/zero_shot/r50 --out runs/voc20_zero_shot_r50-0

Published (mIoU, all classes; released README): 87.8 / 48.4 / 39.7 on VOC / Context / COCO-Stuff; unseen classes, in the
paper: 86.1 / 66.7 / 54.7. Ours on the scenes: experiments/README.md, from results/zero_shot.embedded.json.
"""

from __future__ import annotations

import sys

from experiments.configs.paper import TARGETS
from experiments.harness import records
from experiments.harness.figures import Figure, curves
from experiments.harness.records import Cell, Found, Settings, score, seeded, spread, table, text
from experiments.harness.scoring import recommended_denoising, run_folder, student_cell, teacher_cell, unseen_of
from maskclip_jax.distill import is_run
from maskclip_jax.distill.run_folder import read_config
from maskclip_jax.distill.run_log import read_metrics

NAME = "zero_shot"
TITLE = "Zero-shot segmentation (Tables 3 and 4)"
SCENES = 500
ROWS = {  # row: variant
    "MaskCLIP+, guided and self-training": "zero_shot",
    "MaskCLIP+, guided only": "zero_shot_guided",
    "supervised (upper bound)": "supervised",
    "fine-tuned CLIP, M = identity": "finetuned_identity",
    "fine-tuned CLIP, M = linear": "finetuned_linear",
    "fine-tuned CLIP, M = MLP": "finetuned_mlp",
}
SEEDS = dict.fromkeys(("MaskCLIP+, guided and self-training", "supervised (upper bound)"), (0, 1, 2))
TEACHER = "MaskCLIP, no training"
PUBLISHED_UNSEEN = {"voc20": 86.1, "context59": 66.7, "cocostuff171": 54.7}
FULL = {"voc20": "voc20", "context59": "context60", "cocostuff171": "cocostuff171"}  # Context with its background
COLUMNS = {"mIoU": "all", "seen": "seen", "unseen": "unseen", "harmonic": "harmonic"}


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        return [
            student_cell(settings, f"{data}/{row}", name, data=folder, published=TARGETS.get(name))
            for data, folder in FULL.items()
            for row, variant in ROWS.items()
            for name in [f"{data}/{variant}/r50"]
        ]
    count = settings.scenes(SCENES)
    threshold = recommended_denoising("embedded")
    found = [
        teacher_cell(f"scenes/{TEACHER}", "embedded", "scenes", count, unseen=True, prompt_denoising=threshold),
    ]
    return found + [
        student_cell(settings, seeded(f"scenes/{row}", seed), variant, count=count, seed=seed)
        for row, variant in ROWS.items()
        for seed in SEEDS.get(row, (0,))
    ]


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """One row per method with the four scores; the phases over the steps where the run is here."""
    if settings.scale == "full":
        head = ("data", "method", "all: published / ours", "unseen: published / ours", "seen", "harmonic", "command")
        rows = []
        for key, f in found.items():
            data, row = key.split("/", 1)
            published = PUBLISHED_UNSEEN[data] if row == next(iter(ROWS)) else None
            ours = [text(score(found, key, name)) for name in COLUMNS]
            shown = (f"{text(f.cell.published)} / {ours[0]}", f"{text(published)} / {ours[2]}", ours[1], ours[3])
            rows.append((data, row, *shown, f"`{f.cell.command}`"))
        return [table([head, *rows])]
    shown = [f"scenes/{row}" for row in (TEACHER, *ROWS)]
    rows = [
        (key.split("/", 1)[1], *(score(found, key, name) for name in COLUMNS), f"`{f.cell.command}`" * (not f.record))
        for key, f in found.items()
        if key in shown
    ]
    unseen = ", ".join(unseen_of("scenes"))
    note = f"mIoU in %; unseen: {unseen}. An empty row is filled by its command.\n"
    return [note, table([("", *COLUMNS.values(), "to fill it"), *rows]), *_seeds(found), *_phases(settings)]


def _seeds(found: dict[str, Found]) -> list[str]:
    """Unseen mIoU seed by seed, and the share of the supervised student's that the zero-shot student reaches."""
    unseen = {row: [score(found, seeded(f"scenes/{row}", n), "unseen") for n in seeds] for row, seeds in SEEDS.items()}
    ours, bound = unseen.values()
    shares = [None if a is None or b is None else 100 * a / b for a, b in zip(ours, bound, strict=True)]
    rows = [(row, *scores, *spread(scores)) for row, scores in (unseen | {"share, %": shares}).items()]
    head = ("", *(f"seed {n}" for n in range(len(shares))), "mean", "standard deviation")
    return ["Unseen classes, seed by seed:\n", table([head, *rows])]


def _phases(settings: Settings) -> list[Figure]:
    """Unseen mIoU over the steps of the zero-shot run: where the teacher stops and the student goes on alone."""
    folder = run_folder(settings, "zero_shot", 0)
    names = ("seen", "unseen", "harmonic")
    found = (
        [line for line in read_metrics(folder) if all(f"eval/{name}" in line for name in names)]
        if is_run(folder)
        else []
    )
    if not found:
        return []
    guided = read_config(folder).guided_steps
    series = {name: [line[f"eval/{name}"] for line in found] for name in names}
    steps = [line["step"] for line in found]
    caption = "The zero-shot student while it trains"
    return [curves(f"{NAME}_phases", steps, series, ("step", "mIoU (%)"), caption, {"self-training": guided})]


if __name__ == "__main__":
    records.main(sys.modules[__name__])
