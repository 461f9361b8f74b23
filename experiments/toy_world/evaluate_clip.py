"""Dense scores of an embedded CLIP while it trains: a plain loop, independent of the library's prediction code."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.toy_world.prompts import CLASSES, PHRASE_TOKENS
from maskclip_jax.checkpoints.folders import OPENAI_MEAN, OPENAI_STD
from maskclip_jax.data.vocabulary import prompt_templates
from maskclip_jax.encoders.model import CLIP

BATCH = 25


@partial(jax.jit, static_argnames=("model", "attention"))
def _logits(variables, images, classifier, *, model: CLIP, attention: str):
    features, _ = model.apply(variables, images, attention=attention, method="encode_dense")
    return features @ classifier.T


def class_embeddings(model: CLIP, variables, tokenize) -> jax.Array:
    """[66, E]: every template, normalised, averaged, normalised (docs/method.md, section 4)."""
    encode = jax.jit(lambda v, ids: model.apply(v, ids, method="encode_text"))
    rows = []
    for name in CLASSES:
        e = encode(variables, tokenize([t.format(name) for t in prompt_templates("maskclip")], PHRASE_TOKENS))
        mean = (e / jnp.linalg.norm(e, axis=1, keepdims=True)).mean(0)
        rows.append(mean / jnp.linalg.norm(mean))
    return jnp.stack(rows)


def mean_iou(labels: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """mIoU in % over all classes, the 60 objects, the 6 stuffs."""
    n = len(CLASSES)
    confusion = np.bincount(labels.ravel().astype(int) * n + predicted.ravel(), minlength=n * n).reshape(n, n)
    with np.errstate(invalid="ignore"):
        iou = 100 * np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    return float(np.nanmean(iou)), float(np.nanmean(iou[:60])), float(np.nanmean(iou[60:]))


def dense_scores(
    model: CLIP, variables, tokenize, heldout: Path, count: int, thresholds=(0.3, 0.5, 0.7, 0.9), side: int = 128
) -> dict[str, float]:
    """mIoU of naive, MaskCLIP, and denoising at several thresholds on the first `count` held-out scenes."""
    with np.load(heldout) as file:
        images, labels = file["images"][:count], file["labels"][:count]
    mean, std = np.array(OPENAI_MEAN, np.float32), np.array(OPENAI_STD, np.float32)
    classifier = class_embeddings(model, variables, tokenize)
    scale = float(jnp.exp(variables["params"]["logit_scale"]))
    predicted: dict[str, list[np.ndarray]] = {}
    upsample = jax.jit(lambda x: jax.image.resize(x, (BATCH, 128, 128, len(CLASSES)), "linear").argmax(-1))
    for start in range(0, count, BATCH):
        x = (images[start : start + BATCH].astype(np.float32) / 255 - mean) / std
        if side != 128:
            x = jax.image.resize(x, (BATCH, side, side, 3), "linear")
        for name, attention in (("naive", "qk"), ("mask", "value")):
            logits = _logits(variables, x, classifier, model=model, attention=attention)
            predicted.setdefault(name, []).append(np.asarray(upsample(logits)))
        best = jax.nn.softmax(scale * logits, axis=-1).max(axis=(1, 2), keepdims=True)
        for t in thresholds:
            keep = (best >= t) | (best == best.max(-1, keepdims=True))
            predicted.setdefault(f"pd{t}", []).append(np.asarray(upsample(jnp.where(keep, logits, -100.0))))
    scores = {}
    for name, parts in predicted.items():
        scores[name], objects, stuff = mean_iou(labels, np.concatenate(parts))
        if name == "mask":
            scores |= {"objects": objects, "stuff": stuff}
    return scores
