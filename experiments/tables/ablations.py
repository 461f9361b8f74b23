"""Ablations (paper, Tables 5 and 6): prompt templates, thresholds, dense stride, guidance with and without refinement,
self-training, feature distillation, teacher and student; and why key smoothing fails on the small models.

    python -m experiments.tables.ablations                                    no download; the records hold the seconds
    python -m experiments.tables.ablations --scale full --only templates/single

The grid of both thresholds is in transforms.py (one vmapped program). Rows of trained students are filled from --runs.
Published: feature distillation loses to labels (no number in our sources). Ours: experiments/README.md, from
results/ablations.embedded.json.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import records
from experiments.harness.figures import Figure
from experiments.harness.records import Cell, Found, Settings, score, table
from experiments.harness.scoring import (
    CHECKPOINTS,
    inputs_of,
    open_data,
    pretrained,
    student_cell,
    teacher_cell,
)
from maskclip_jax.data.preprocess import prepare

NAME = "ablations"
TITLE = "Ablations (Tables 5 and 6)"
SCENES = 200
KEY_SCENES = 60
MODELS = {"resnet": "embedded", "vit": "embedded-vit"}
TEMPLATES = {"single": "1 template", "scene": "5", "imagenet": "80", "maskclip": "85"}
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
STRIDES = (32, 16, 8)
STUDENTS = {  # row: (variant on the scenes, protocol at full size)
    "labels of several readings, the surest of each class": ("ablation", None),
    "labels made in the step, denoised (the paper's way)": ("ablation_denoised", "annotation_free_refined"),
    "labels made in the step, as they come": ("ablation_raw", "annotation_free"),
    "feature distillation": ("ablation_feature", "feature"),
    "teacher: ViT": ("ablation_vit", None),
    "teacher: ViT, read by SCLIP, labels made in the step": ("ablation_sclip", None),
    "student: PSPNet": ("ablation_psp", None),
    "student: DeepLabv3+": ("ablation_v3plus", None),
    "zero-shot, self-training": ("zero_shot", "zero_shot"),
    "zero-shot, guided to the end": ("zero_shot_guided", "zero_shot_guided"),
}


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        return _full(settings)
    count, found = settings.scenes(SCENES), []
    for short, model in MODELS.items():
        make = functools.partial(teacher_cell, model=model, data="scenes", count=count)
        found += [make(f"templates/{short}/{name}", templates=name) for name in TEMPLATES]
        found += [make(f"denoising/{short}/{t:g}", prompt_denoising=t) for t in THRESHOLDS]
    make = functools.partial(teacher_cell, model="embedded", data="scenes", count=count)
    found += [make(f"stride/resnet/{stride}", dense_stride=stride) for stride in STRIDES]
    keys = settings.scenes(KEY_SCENES)
    for short, model in MODELS.items():
        config = {"model": model, "data": "scenes", "count": keys, "inputs": inputs_of(model)}
        found.append(Cell(f"keys/{short}", config, functools.partial(key_similarity, model, keys)))
    scored = settings.scenes(500)
    found += [student_cell(settings, f"student/{row}", name, count=scored) for row, (name, _) in STUDENTS.items()]
    return found


def _full(settings: Settings) -> list[Cell]:
    make = functools.partial(teacher_cell, data="context59", count=None, fidelity="released")
    model = CHECKPOINTS["vit_b16"]
    found = [make(f"templates/{name}", model, templates=name) for name in TEMPLATES]
    found += [make(f"denoising/{t:g}", model, prompt_denoising=t) for t in THRESHOLDS]
    found += [
        student_cell(settings, f"student/{row}", f"context59/{protocol}/r50", data=_scored_on(protocol))
        for row, (_, protocol) in STUDENTS.items()
        if protocol is not None
    ]
    return found


def _scored_on(protocol: str) -> str:
    """Zero-shot Context has the background as class 0."""
    return "context60" if protocol.startswith("zero_shot") else "context59"


def key_similarity(model: str, count: int) -> dict[str, Any]:
    """What smoothing averages over: mean cosine of the keys of two positions with the same class, and with another.

    Smoothing helps where the first is near 1 and the second near 0. "weight on the same class" is the share of a
    position's positive weight that its own class gets; without any keys it would be the class's share of the image.
    """
    clip, source = pretrained(model), open_data("scenes", count)
    encode = jax.jit(functools.partial(clip.model.apply, method="encode_dense"))
    variables = jax.device_put(clip.variables)
    rows = []
    for index in range(len(source)):
        example = source[index]
        image = prepare(example.image, clip.preprocess, clip.config.multiple)
        features, keys = encode(variables, image.pixels[None])
        h, w = features.shape[1:3]
        # the class at the centre of each cell, in pixels of the original image
        centres = [
            np.minimum(((np.arange(n) + 0.5) * side / valid * clip.config.stride).astype(int), side - 1)
            for n, side, valid in zip((h, w), image.original, image.valid, strict=True)
        ]
        labels = example.labels[np.ix_(*centres)].ravel()
        rows.append(np.asarray(_similarities(keys[0], jnp.asarray(labels))))
    names = ("cosine, same class", "cosine, other class", "weight on the same class", "share of the same class")
    return dict(zip(names, (float(x) for x in np.mean(rows, axis=0)), strict=True)) | {"scenes": len(rows)}


@jax.jit
def _similarities(keys: jax.Array, labels: jax.Array) -> jax.Array:
    unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    same = (labels[:, None] == labels).astype(jnp.float32)
    off = 1 - jnp.eye(len(labels))
    mean = lambda weight: (cosine * weight).sum() / jnp.maximum(weight.sum(), 1)  # noqa: E731
    positive = jnp.maximum(cosine, 0)
    share = (positive * same).sum(1) / positive.sum(1)
    return jnp.stack([mean(same * off), mean((1 - same) * off), share.mean(), same.mean()])


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """A small table for each question."""
    students = []
    for key, f in found.items():
        if key.startswith("student/"):
            unseen = score(found, key, "unseen") if "zero-shot" in key else ""
            command = f"`{f.cell.command}`" * (f.record is None)
            students.append((key.split("/", 1)[1], score(found, key), unseen, command))
    head = ("", "mIoU", "unseen", "to fill it")
    last = ["MaskCLIP+; an empty row is filled by its command.\n", table([head, *students])]
    if settings.scale == "full":
        rows = [(key, score(found, key)) for key in found if not key.startswith("student/")]
        return ["Pascal Context, ViT-B/16, mIoU in %.\n", table([("", "ours"), *rows]), *last]
    across = lambda group, names: [  # noqa: E731
        (short, *(score(found, f"{group}/{short}/{n}") for n in names)) for short in MODELS
    ]
    strides = [score(found, f"stride/resnet/{stride}") for stride in STRIDES]
    count = max(f.cell.config["count"] for key, f in found.items() if key.startswith("templates"))
    keys = {short: found[f"keys/{short}"].scores for short in MODELS}
    names = next((tuple(n for n in s if n != "scenes") for s in keys.values() if s), ())
    similar = [(short, *(f"{s[n]:.2f}" for n in names)) for short, s in keys.items() if s]
    return [
        f"mIoU in % on {count} scenes. Templates:\n",
        table([("", *TEMPLATES.values()), *across("templates", TEMPLATES)]),
        "Threshold of prompt denoising:\n",
        table([("", *(f"{t:g}" for t in THRESHOLDS)), *across("denoising", [f"{t:g}" for t in THRESHOLDS])]),
        "Stride at which the ResNet is read:\n",
        table([("", *STRIDES), ("resnet", *strides)]),
        "What key smoothing averages over (keys of the last layer):\n",
        table([("", *names), *similar]) if similar else "",
        *last,
    ]


if __name__ == "__main__":
    records.main(sys.modules[__name__])
