"""Functional transforms as a showcase: what `vmap` and `grad` make of pure functions.

    python -m experiments.tables.transforms                                   no download; the records hold the seconds

    grid       all thresholds of denoising × smoothing in one program: `vmap` over both, nothing recompiled
    tuning     few-shot prompt tuning: the gradient of a mask objective with respect to the class embeddings (`tune`)
    levels     the five levels of a corruption, corrupted, encoded and scored in one program: `vmap` over the level

Not in the paper, so nothing is published. Ours: experiments/README.md, from results/transforms.embedded.json.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import records
from experiments.harness.figures import Figure, heat
from experiments.harness.records import Cell, Found, Settings, table, text
from experiments.harness.scoring import inputs_of, open_data, pretrained
from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.cli.common import progress
from maskclip_jax.data.corruptions.corrupt import corrupt
from maskclip_jax.data.images import IGNORE
from maskclip_jax.data.preprocess import prepare, resize_shape, upsample_matrix
from maskclip_jax.data.vocabulary import class_set
from maskclip_jax.evaluate.metrics import mean_iou
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.refine import dense_logits, grid_confidence, probability_scale, refined

NAME = "transforms"
TITLE = "Functional transforms"
MODELS = {"resnet": "embedded-resnet", "vit": "embedded"}
GRID_SCENES, TUNE_SCENES, LEVEL_SCENES = 100, 200, 48
DENOISING = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # 0 drops nothing
SMOOTHING = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)  # 0 smooths nothing
SHOTS = (4, 16, 64)
STEPS, RATE, PRIOR = 50, 2e-3, 16.0  # the words weigh as much as 16 scenes; chosen on scenes 250 to 329
CORRUPTION = "gaussian_noise"
NAMES = class_set("scenes66")


def pixels_of(clip: Pretrained, images: list[np.ndarray]) -> np.ndarray:
    """Prepared images of one size, [B, H, W, 3]."""
    return np.stack([prepare(image, clip.preprocess, clip.config.multiple).pixels for image in images])


def to_pixels(clip: Pretrained, side: int) -> jax.Array:
    """Cells -> pixels along one axis of a square image of `side`."""
    valid, stride = resize_shape(side, side, short_side=clip.preprocess.short_side)[0], clip.config.stride
    cells = -(-valid // clip.config.multiple) * clip.config.multiple // stride
    return jnp.asarray(upsample_matrix(-(-valid // stride), stride, valid, side, columns=cells))


def predict(scores: jax.Array, up: jax.Array) -> jax.Array:
    """Scores [h, w, C] -> labels [H, W]."""
    rows = jnp.einsum("hwc,yh->ywc", scores, up, precision="highest")
    return jnp.einsum("ywc,xw->yxc", rows, up, precision="highest").argmax(-1)


def count(labels: jax.Array, predicted: jax.Array) -> jax.Array:
    """Confusion matrix of one image as a product of indicators: it can be vmapped without scattering."""
    hot = functools.partial(jax.nn.one_hot, num_classes=len(NAMES), dtype=jnp.float32)  # 255 has no column
    return hot(labels.ravel()).T @ hot(predicted.ravel())


@functools.partial(jax.jit, static_argnames="model")
def grid_confusions(
    model: Any, variables: Any, pixels: jax.Array, labels: jax.Array, classifier: jax.Array, up: jax.Array
) -> jax.Array:
    """Confusion matrices [denoising, smoothing, C, C] over a batch. One program, one pass through the tower."""
    logits, keys = dense_logits(model, variables, pixels, classifier)
    scale = probability_scale(model, variables)
    known = {"scale": scale, "confidence": grid_confidence(logits, None, model.config, scale)}

    def one(denoising: jax.Array, smoothing: jax.Array) -> jax.Array:
        found = refined(logits, keys, model.config, denoising=denoising, smoothing=smoothing, **known)
        masks = jax.vmap(predict, (0, None))(found.values, up)
        return jax.vmap(count)(labels, masks).sum(0)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.asarray(DENOISING), jnp.asarray(SMOOTHING))


def grid(model: str, scenes: int) -> dict[str, Any]:
    """mIoU at every pair of thresholds."""
    clip, classifier = _loaded(model)
    total, began = np.zeros((), np.int64), time.monotonic()
    with progress(f"{NAME} grid {model}", scenes) as report:
        for images, labels in _batches(scenes, 5):
            up = to_pixels(clip, images[0].shape[0])
            part = grid_confusions(clip.model, clip.variables, pixels_of(clip, images), labels, classifier, up)
            total = total + np.asarray(part).astype(np.int64)
            report(len(images))
    miou = [[round(100 * float(mean_iou(c).mean), 2) for c in row] for row in total]
    return {"mIoU": miou, "settings": len(DENOISING) * len(SMOOTHING), "seconds": round(time.monotonic() - began, 1)}


def tune(logits_of: Any, features: jax.Array, labels: jax.Array, start: jax.Array) -> jax.Array:
    """Few-shot prompt tuning: class embeddings that explain a few annotated images; the towers stay as they are.

    Args:
      logits_of: (features, embeddings) -> scaled logits; differentiable.
      features: unit dense features [B, h, w, E].   labels: [B, h, w], 255 is ignored.
      start: text classifier [C, E].
    """

    hot = jax.nn.one_hot(labels, len(start))  # 255 has no column
    present = hot.any((0, 1, 2))[:, None]
    prior = PRIOR / len(features)

    def objective(embeddings: jax.Array) -> jax.Array:
        unit = embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
        log_p = jax.nn.log_softmax(logits_of(features, unit))
        away = 1 - (unit * start).sum(-1)
        return -(hot * log_p).sum() / hot.sum() + prior * away.sum()

    optimiser = optax.adam(RATE)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        embeddings, state = carry
        loss, gradient = jax.value_and_grad(objective)(embeddings)
        updates, state = optimiser.update(gradient, state)
        updates = jnp.where(present, updates, 0.0)  # what no scene shows would only be pushed away
        return (optax.apply_updates(embeddings, updates), state), loss

    (embeddings, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), None, length=STEPS)
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)


def tuning(model: str, scenes: int, shots: int) -> dict[str, Any]:
    """mIoU on `scenes` scenes before and after tuning on `shots` others (the archive's last)."""
    clip, classifier = _loaded(model)
    scale = float(probability_scale(clip.model, clip.variables))
    encode = jax.jit(functools.partial(clip.model.apply, method="encode_dense"))
    features, cells = [], []
    for images, labels in _batches(shots, min(shots, 16), last=True):
        found = encode(clip.variables, pixels_of(clip, images)).features
        features.append(found)
        side, valid = images[0].shape[0], resize_shape(*images[0].shape[:2], short_side=clip.preprocess.short_side)[0]
        centres = ((np.arange(found.shape[1]) + 0.5) * clip.config.stride * side / valid).astype(int)
        inside = centres < side
        at = np.minimum(centres, side - 1)
        cells.append(np.where(inside[:, None] & inside, np.asarray(labels)[:, at[:, None], at], IGNORE))
    logits_of = lambda f, t: scale * jnp.einsum("bhwe,ce->bhwc", f, t)  # noqa: E731
    tuned = jax.jit(functools.partial(tune, logits_of))(
        jnp.concatenate(features), jnp.asarray(np.concatenate(cells)), classifier
    )
    before, after = (_score(clip, scenes, c) for c in (classifier, tuned))
    turned = np.degrees(np.arccos(np.clip((np.asarray(tuned) * np.asarray(classifier)).sum(-1), -1, 1)))
    return {"before": before, "after": after, "mean turn in degrees": float(turned.mean()), "shots": shots}


def levels(model: str, scenes: int) -> dict[str, Any]:
    """mIoU at every level of one corruption: image, level -> confusion matrix, vmapped over both."""
    clip, classifier = _loaded(model)
    mean, std = (jnp.asarray(x) for x in (clip.preprocess.mean, clip.preprocess.std))

    @jax.jit
    def all_levels(images: jax.Array, labels: jax.Array, key: jax.Array, up: jax.Array) -> jax.Array:
        def one(level: jax.Array) -> jax.Array:
            keys = jax.random.split(key, len(images))
            noisy = jax.vmap(corrupt, (0, None, None, 0))(images, CORRUPTION, level, keys)
            pixels = (noisy / 255 - mean) / std  # at their own size: everything between file and mask is one program
            side = -(-images.shape[1] // clip.config.multiple) * clip.config.multiple
            pixels = jnp.pad(pixels, ((0, 0), (0, side - images.shape[1]), (0, side - images.shape[2]), (0, 0)))
            logits, _ = dense_logits(clip.model, clip.variables, pixels, classifier)
            return jax.vmap(lambda s, t: count(t, predict(s, up)))(logits, labels).sum(0)

        return jax.vmap(one)(jnp.arange(1, 6))

    total = np.zeros((), np.int64)
    for number, (images, labels) in enumerate(_batches(scenes, 8)):
        side, stride = images[0].shape[0], clip.config.stride
        cells = -(-side // clip.config.multiple) * clip.config.multiple // stride
        up = jnp.asarray(upsample_matrix(-(-side // stride), stride, side, side, columns=cells))
        part = all_levels(np.stack(images), labels, jax.random.key(number), up)
        total = total + np.asarray(part).astype(np.int64)
    return {"mIoU": [round(100 * float(mean_iou(c).mean), 2) for c in total], "corruption": CORRUPTION}


def _loaded(model: str) -> tuple[Pretrained, jax.Array]:
    clip = pretrained(model)
    return clip, jnp.asarray(text_classifier(clip, NAMES))


def _batches(scenes: int, size: int, *, last: bool = False) -> Any:
    """Images (a list) and labels of `size` scenes at a time: the archive's first, or its last."""
    source = open_data("scenes")
    order = range(len(source) - scenes, len(source)) if last else range(scenes)
    for start in range(0, scenes, size):
        part = [source[i] for i in order[start : start + size]]
        yield [e.image for e in part], jnp.asarray(np.stack([e.labels for e in part]).astype(np.int32))


def _score(clip: Pretrained, scenes: int, classifier: jax.Array) -> float:
    from experiments.harness.scoring import percent
    from maskclip_jax.evaluate.encoder import evaluate_teacher

    names = [str(n) for n in NAMES]
    return percent(evaluate_teacher(clip, classifier, names, open_data("scenes", scenes), batch_size=20))["mIoU"]


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        return []
    found = []
    for short, model in MODELS.items():
        base = {"model": model, "data": "scenes", "inputs": inputs_of(model)}
        scenes = settings.scenes(GRID_SCENES)
        config = base | {"count": scenes, "denoising": list(DENOISING), "smoothing": list(SMOOTHING)}
        found.append(Cell(f"grid/{short}", config, functools.partial(grid, model, scenes)))
        scenes = settings.scenes(TUNE_SCENES)
        for shots in SHOTS:
            config = base | {"count": scenes, "shots": shots, "steps": STEPS, "rate": RATE, "prior": PRIOR}
            found.append(Cell(f"tuning/{short}/{shots}", config, functools.partial(tuning, model, scenes, shots)))
        scenes = settings.scenes(LEVEL_SCENES)
        config = base | {"count": scenes, "corruption": CORRUPTION, "seed": 0}
        found.append(Cell(f"levels/{short}", config, functools.partial(levels, model, scenes)))
    return found


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """The grid as a picture and its best pair, the tuning as a table, the levels as a row."""
    out: list[str | Figure] = []
    if not found:
        return ["These run on the scenes alone.\n"]
    tunings = [(s, n, found[f"tuning/{s}/{n}"].scores) for s in MODELS for n in SHOTS]
    rows = [(s, n, x["before"], x["after"], x["mean turn in degrees"]) for s, n, x in tunings if x]
    out += [
        "Few-shot prompt tuning, mIoU in %:\n",
        table([("", "annotated scenes", "before", "after", "turn (°)"), *rows]),
    ]
    rows = [(s, *x["mIoU"]) for s in MODELS if (x := found[f"levels/{s}"].scores)]
    if rows:
        head = ("", *(f"level {i}" for i in range(1, 6)))
        out += [f"{CORRUPTION.replace('_', ' ')}, all levels in one program, mIoU in %:\n", table([head, *rows])]
    for short in MODELS:
        scores = found[f"grid/{short}"].scores
        if scores is None:
            continue
        array = np.asarray(scores["mIoU"])
        i, j = np.unravel_index(array.argmax(), array.shape)
        caption = (
            f"Thresholds, {short}: {scores['settings']} pairs in one program; best {text(float(array.max()))} at "
            f"denoising {DENOISING[i]:g}, smoothing {SMOOTHING[j]:g} (0: off)"
        )
        axes = ("key smoothing threshold", "prompt denoising threshold")
        out += [f"{caption}.\n", heat(f"{NAME}_grid_{short}", array, DENOISING, SMOOTHING, axes, caption)]
    return out


if __name__ == "__main__":
    records.main(sys.modules[__name__])
