"""Ablations (paper, Tables 5 and 6): prompt templates, thresholds, dense stride, guidance with and without refinement,
self-training, feature distillation, teacher and student; and why key smoothing fails on the small models.

    python -m experiments.tables.ablations                                    no download; the records hold the seconds
    python -m experiments.tables.ablations --scale full --only templates/single

The grid of both thresholds is in transforms.py (one vmapped program). Rows of trained students are filled from --runs.
Published: feature distillation loses to labels (no number in our sources). Ours: experiments/README.md, from
results/ablations.embedded.json.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
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
from maskclip_jax.data.vocabulary import class_set
from maskclip_jax.evaluate.encoder import evaluate, teacher_reader
from maskclip_jax.evaluate.engine import Counter
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.refine import (
    Logits,
    Probabilities,
    dense_logits,
    flat_mask,
    key_smoothing,
    probability_scale,
    to_probabilities,
)

NAME = "ablations"
TITLE = "Ablations (Tables 5 and 6)"
SCENES = 200
KEY_SCENES = 60
SMOOTHINGS = {  # row: (keys less their mean over the image, temperature of a softmax over the cosines or 0, threshold)
    "none": (False, 0, 0),
    "the paper's": (False, 0, 1),
    "threshold 0.5": (False, 0, 0.5),
    "threshold 0.25": (False, 0, 0.25),
    "centred keys": (True, 0, 1),
    "centred keys, threshold 0.5": (True, 0, 0.5),
    "temperature 0.1": (False, 0.1, 1),
    "temperature 0.03": (False, 0.03, 1),
    "centred keys, temperature 0.1": (True, 0.1, 1),
    "centred keys, temperature 0.1, threshold 0.5": (True, 0.1, 0.5),
}
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
TEMPLATES = {"single": "1 template", "scene": "5", "imagenet": "80", "maskclip": "85"}
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
STRIDES = (32, 16, 8)
STUDENTS = {  # row: (variant on the scenes, protocol at full size)
    "labels of several readings, the surest of each class": ("ablation", None),
    "labels made in the step, denoised (the paper's way)": ("ablation_denoised", "annotation_free_refined"),
    "labels made in the step, as they come": ("ablation_raw", "annotation_free"),
    "feature distillation": ("ablation_feature", "feature"),
    "teacher: ResNet": ("ablation_resnet", None),
    "teacher read by SCLIP, labels made in the step": ("ablation_sclip", None),
    "student: PSPNet": ("ablation_psp", None),
    "student: DeepLabv3+": ("ablation_v3plus", None),
    "zero-shot, self-training": ("zero_shot", "zero_shot"),
    "zero-shot, guided to the end": ("zero_shot_guided", "zero_shot_guided"),
}
CHOSEN = ("none", "the paper's", "temperature 0.1", "temperature 0.03")
OURS = {"vit": "temperature 0.1", "resnet": "temperature 0.03"}  # the best of `SMOOTHINGS` on the validation scenes


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        return _full(settings)
    count, found = settings.scenes(SCENES), []
    for short, model in MODELS.items():
        make = functools.partial(teacher_cell, model=model, data="scenes", count=count)
        found += [make(f"templates/{short}/{name}", templates=name) for name in TEMPLATES]
        found += [make(f"denoising/{short}/{t:g}", prompt_denoising=t) for t in THRESHOLDS]
    make = functools.partial(teacher_cell, model="embedded-resnet", data="scenes", count=count)
    found += [make(f"stride/resnet/{stride}", dense_stride=stride) for stride in STRIDES]
    keys = settings.scenes(KEY_SCENES)
    for short, model in MODELS.items():
        config = {"model": model, "data": "scenes", "count": keys, "inputs": inputs_of(model)}
        found.append(Cell(f"keys/{short}", config, functools.partial(key_similarity, model, keys)))
        smooth = functools.partial(smoothings, model)
        config = {
            "model": model,
            "data": "validation",
            "count": keys,
            "rows": {row: list(how) for row, how in SMOOTHINGS.items()},
        }
        config["inputs"] = inputs_of(model)
        found.append(Cell(f"smoothing/{short}", config, functools.partial(smooth, "validation", keys)))
        config = config | {"data": "scenes", "count": count, "rows": {row: list(SMOOTHINGS[row]) for row in CHOSEN}}
        found.append(Cell(f"chosen smoothing/{short}", config, functools.partial(smooth, "scenes", count, CHOSEN)))
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
        assert example.labels is not None  # the scenes have masks
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


def smoothings(model: str, data: str, count: int, rows: Sequence[str] = tuple(SMOOTHINGS)) -> dict[str, Any]:
    """mIoU of some of `SMOOTHINGS`; one program, in which they are traced."""
    clip, source = pretrained(model), open_data(data, count)
    names, reader = [str(name) for name in class_set("scenes66")], teacher_reader(clip)

    def scores(v: Any, pixels: jax.Array, grid: jax.Array | None) -> Probabilities:
        logits, keys = dense_logits(clip.model, v["clip"], pixels, v["text"], grid=grid)
        valid, scale = flat_mask(grid, logits.shape[1:3], clip.config), probability_scale(clip.model, v["clip"])
        p = to_probabilities(Logits(logits.reshape(len(logits), -1, logits.shape[-1])), scale)
        inside = jnp.ones(p.shape[:2]) if valid is None else valid.astype(jnp.float32)
        mean = jnp.einsum("bl,bld->bd", inside, keys) / inside.sum(1, keepdims=True)
        keys = keys - v["centred"] * mean[:, None]
        by_cosine = key_smoothing(p, keys, threshold=v["threshold"], valid=valid)
        unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
        cosine = jnp.einsum("bld,bmd->blm", unit, unit) / jnp.maximum(v["temperature"], 1e-3)
        weights = jax.nn.softmax(jnp.where(inside[:, None] > 0, cosine, -jnp.inf))
        warm = jnp.where(p.max(-1, keepdims=True) < v["threshold"], weights @ p, p)
        return Probabilities(jnp.where(v["temperature"] > 0, warm, by_cosine).reshape(logits.shape))

    counter = Counter(dataclasses.replace(reader, scores=scores), len(names))
    variables = {"clip": clip.variables, "text": text_classifier(clip, names)}
    found: dict[str, Any] = {"scenes": len(source)}
    for row in rows:
        how = dict(zip(("centred", "temperature", "threshold"), np.float32(SMOOTHINGS[row]), strict=True))
        found[row] = 100 * evaluate(counter, variables | how, source, names, batch_size=20, protocol={}).mean_iou
    return found


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
    scored = lambda group: {short: s for short in MODELS if (s := found[f"{group}/{short}"].scores)}  # noqa: E731
    smoothed, chosen = scored("smoothing"), scored("chosen smoothing")
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
        "Key smoothing in other ways, on validation scenes (temperature: weights are a softmax of cosines over it):\n",
        table([("", *smoothed), *((row, *(f"{s[row]:.1f}" for s in smoothed.values())) for row in SMOOTHINGS)]),
        "The paper's, and those chosen there (ours: 0.1 for the ViT, 0.03 for the ResNet), on the held-out scenes\n"
        "above; none too upsamples probabilities, MaskCLIP logits (the last of the templates' columns):\n",
        table([("", *chosen), *((row, *(f"{s[row]:.1f}" for s in chosen.values())) for row in CHOSEN)]),
        *last,
    ]


if __name__ == "__main__":
    records.main(sys.modules[__name__])
