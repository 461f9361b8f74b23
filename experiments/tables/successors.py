"""MaskCLIP and its training-free successors: methods × (raw, denoised, smoothed, PAMR), each image whole at the
embedded models' own size; at full size every paper's own protocol.

    python -m experiments.tables.successors                                   no download; the records hold the seconds
    python -m experiments.tables.successors --scale full --only voc20/sclip

Published (mIoU, ViT-B/16, VOC20 / Context59 / COCO-Stuff171): CLIP 41.8 / 9.2 / 4.4, MaskCLIP 74.9 / 26.4 / 16.4, SCLIP
81.5 / 34.5 / 22.8, with windows, 80 templates and synonyms; the released MaskCLIP's whole images give 49.5 on VOC20.
Ours on the scenes: experiments/README.md, from results/successors.embedded.json. The papers' windows and sizes are for
photographs of 500 pixels; on the scenes the attention alone is compared, everything else equal.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from experiments.harness import records
from experiments.harness.figures import Figure, sheet
from experiments.harness.records import Cell, Found, Settings, beside, score, table
from experiments.harness.scoring import (
    CHECKPOINTS,
    protocol_cell,
    recommended_denoising,
    scenes_sheet,
)
from maskclip_jax.encoders.dense import ALONE, METHODS
from maskclip_jax.segment.protocols import PROTOCOLS, protocol_options

NAME = "successors"
TITLE = "MaskCLIP and its training-free successors"
SCENES = 100
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
READINGS: dict[str, dict[str, Any]] = {"raw": {}, "PD": {}, "KS": {"key_smoothing": 1.0}, "PAMR": {"pamr": 10}}
ASKING = [method for method in METHODS if method not in ALONE]
FULL = ("voc20", "context59", "cocostuff171")
PUBLISHED = {  # ViT-B/16, each paper's protocol
    "clip": (41.8, 9.2, 4.4),
    "maskclip": (74.9, 26.4, 16.4),
    "values": (61.4, 28.3, 18.4),
    "sclip": (81.5, 34.5, 22.8),
    "clearclip": (80.9, 35.9, 23.9),
    "gem": (79.9, 35.9, 23.7),
    "naclip": (79.7, 35.2, 23.3),
    "naclip, PAMR": (83.0, 38.4, 25.7),
    "clip_surgery": (None, None, None),
    "proxyclip": (80.3, 39.1, 26.5),
    "clip_dinoiser": (80.9, 35.9, 24.6),  # learned from DINO's S
    "lposs": (78.8, 37.8, 25.9),
    "lposs+": (None, None, None),
}


def methods_of(short: str) -> list[str]:
    """A ResNet's pool has neither residual, MLP nor earlier blocks: "values" is MaskCLIP's reading once more."""
    return [name for name, method in ALONE.items() if short == "vit" or not (method.earlier or name == "values")]


def reading_options(name: str, model: str) -> dict[str, Any]:
    """Options of a column."""
    return READINGS[name] | ({"prompt_denoising": recommended_denoising(model)} if name == "PD" else {})


def full_options(row: str) -> dict[str, Any]:
    """A row's protocol. What has none of its own, or one that is not of windows, is read as SCLIP's paper reads it."""
    method, _, refined = row.partition(", ")
    own = method in PROTOCOLS and method != "maskclip"
    options = protocol_options(method if own else "sclip").changed()
    return options | ({} if own else {"method": method}) | {"pamr": 10 if refined else 0}


def cells(settings: Settings) -> list[Cell]:
    found = []
    if settings.scale == "full":
        for i, data in enumerate(FULL):
            for row, published in PUBLISHED.items():
                made = protocol_cell(f"{data}/{row}", CHECKPOINTS["vit_b16"], data, None, full_options(row))
                found.append(made._replace(published=published[i]))
        return found
    count = settings.scenes(SCENES)
    for short, model in MODELS.items():
        for method in methods_of(short):
            for name in READINGS:
                options = {"method": method} | reading_options(name, model)
                found.append(protocol_cell(f"{short}/{method}/{name}", model, "scenes", count, options))
    for method in ASKING:  # the ViT beside itself: no other backbone is embedded
        options = {"method": method, "affinity": MODELS["vit"]}
        found.append(protocol_cell(f"vit/{method}/raw", MODELS["vit"], "scenes", count, options))
    return found


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """One row per method, a column per model and refinement; what the masks look like."""
    if settings.scale == "full":
        rows = [(row, *(beside(found, f"{data}/{row}") for data in FULL)) for row in PUBLISHED]
        return ["Published / ours, ViT-B/16, mIoU in %.\n", table([("", *FULL), *rows])]
    columns = [(short, name) for short in MODELS for name in READINGS]
    keys = {m: [f"{s}/{m}/{n}" for s, n in columns] for m in METHODS}
    rows = [(m, *(score(found, key) if key in found else "" for key in keys[m])) for m in METHODS]
    count = max(f.cell.config["count"] for f in found.values())
    note = (
        f"mIoU in % on {count} held-out scenes, 66 names as prompts, images whole; PD at the checkpoints' thresholds, "
        "KS at 1, PAMR in 10 steps; what asks a second backbone (the last rows) has the ViT itself.\n"
    )
    pictures = [
        sheet(f"{NAME}_{short}", f"Some scenes by every method, {short}", functools.partial(examples, short))
        for short in MODELS
        if all(score(found, f"{short}/{method}/raw") is not None for method in methods_of(short))
    ]
    return [note, table([("", *(f"{s}, {n}" for s, n in columns)), *rows]), *pictures]


def examples(short: str) -> np.ndarray:
    """Some of the scenes, read by every method, beside the truth."""
    return scenes_sheet({method: {"method": method} for method in methods_of(short)}, MODELS[short])


if __name__ == "__main__":
    records.main(sys.modules[__name__])
