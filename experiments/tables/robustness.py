"""Robustness (paper, section 4): eight corruptions at five levels, mIoU curves of MaskCLIP with either image tower.

    python -m experiments.tables.robustness                                   no download; the records hold the seconds
    python -m experiments.tables.robustness --scale full --only voc20/r50/speckle_noise

Published: VOC20, R50, speckle noise at level 1: 30.9 (41.5 without). The paper's other curves are not in our sources.
Ours on the scenes: experiments/README.md, written from results/robustness.embedded.json.

The scenes are 128 px a side and ImageNet-C's strengths are meant for 224 px: blurs and spatter weigh more here.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import records
from experiments.harness.figures import Figure, curves, sheet
from experiments.harness.records import Cell, Found, Settings, beside, score, table
from experiments.harness.scoring import CHECKPOINTS, open_data, teacher_cell
from maskclip_jax.data.corruptions.corrupt import CORRUPTIONS, corrupt
from maskclip_jax.data.sources import DataSource, Example

NAME = "robustness"
TITLE = "Robustness under input corruption"
SCENES = 100
LEVELS = range(1, 6)
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
PUBLISHED = {"voc20/r50/speckle_noise/1": 30.9, "voc20/r50/clean": 41.5}


class CorruptedSource:
    """Another source's examples with corrupted images; example i's chance is that of (seed, i), whoever reads it."""

    def __init__(self, source: DataSource, name: str, level: int, seed: int = 0):
        self.source, self.name, self.level, self.key = source, name, level, jax.random.key(seed)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        level = jnp.asarray(self.level)  # traced: five levels are one program
        image = _corrupt(example.image, self.name, level, jax.random.fold_in(self.key, index))
        return example._replace(image=np.asarray(image))


_corrupt = jax.jit(corrupt, static_argnames="name")


def cells(settings: Settings) -> list[Cell]:
    embedded = settings.scale == "embedded"
    models = MODELS if embedded else CHECKPOINTS
    count = settings.scenes(SCENES) if embedded else None
    fidelity = "clip" if embedded else "released"
    found = []
    for data in ("scenes",) if embedded else ("voc20", "context59", "cocostuff171"):
        for short, model in models.items():
            make = functools.partial(teacher_cell, model=model, data=data, count=count, fidelity=fidelity)
            key = f"{data}/{short}/clean"
            found.append(make(key, published=PUBLISHED.get(key)))
            for name in CORRUPTIONS:
                for level in LEVELS:
                    key = f"{data}/{short}/{name}/{level}"
                    change = functools.partial(CorruptedSource, name=name, level=level)
                    more: dict[str, Any] = {"corruption": name, "level": level, "seed": 0}
                    found.append(make(key, source=change, more=more, published=PUBLISHED.get(key)))
    return found


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """A row per corruption, a column per level, for each model; curves; what the corruptions look like."""
    out: list[str | Figure] = []
    for column in dict.fromkeys(key.rsplit("/", 2)[0] for key in found if key.count("/") == 3):
        show = score if settings.scale == "embedded" else beside
        clean = show(found, f"{column}/clean")
        rows = [(n, clean, *(show(found, f"{column}/{n}/{level}") for level in LEVELS)) for n in CORRUPTIONS]
        out.append(f"{column.replace('/', ', ')}: mIoU in %\n")
        out.append(table([("corruption", "none", *(f"level {level}" for level in LEVELS)), *rows]))
        if settings.scale == "embedded" and clean is not None:
            series = {row[0]: [clean, *row[2:]] for row in rows if any(v is not None for v in row[2:])}
            if series:
                labels = ("level (0: none)", "mIoU (%)")
                out.append(curves(f"{NAME}_{column.split('/')[1]}", range(6), series, labels, f"MaskCLIP, {column}"))
    if settings.scale == "embedded":
        out.append(sheet(f"{NAME}_sheet", "One scene under every corruption, levels 1, 3 and 5", examples))
    return out


def examples() -> np.ndarray:
    """One scene under everything."""
    from maskclip_jax.visualize import comparison_sheet

    image = open_data("scenes", 6)[5].image
    levels = jnp.array([1, 3, 5])
    at_levels = jax.jit(jax.vmap(corrupt, (None, None, 0, None)), static_argnums=1)
    pictures = {name: np.asarray(at_levels(image, name, levels, jax.random.key(0))) for name in CORRUPTIONS}
    rows = [[found[i] for found in pictures.values()] for i in range(len(levels))]
    captions = [[f"level {level}"] * len(CORRUPTIONS) for level in levels]
    return comparison_sheet([name.replace("_", " ") for name in CORRUPTIONS], rows, captions=captions, panel=160)


if __name__ == "__main__":
    records.main(sys.modules[__name__])
