"""What a step of `train_clip` draws: scenes, captions and phrases that lie on the device, and the terms over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.toy_world.prompts import CAPTION_TOKENS, CLASSES, PHRASE_TOKENS, PHRASES, Mentions
from experiments.toy_world.scenes import caption

NOUNS = np.array([CLASSES.index(phrase.split()[-1]) for phrase in PHRASES], np.int32)
COLOURED_SLOTS = 46  # coloured phrases contrasted at each step, beside all class names


def load_corpus(scenes: Path, tokenize, templates: list[str], seed: int) -> dict[str, jax.Array]:
    """Scenes, what their captions mention, tokenised captions and phrases: all on the device."""
    folders = [scenes / "wide", scenes / "wide_closeup"]
    records = [json.loads((f / "scenes.json").read_text())["scenes"] for f in folders]
    mentions, rng = Mentions([r for part in records for r in part]), np.random.default_rng(seed)
    captions = [caption(tuple(r["phrases"]), rng, subset=True) for part in records for r in part for _ in range(2)]
    templates = [*templates, "{}", "a {}", "a photo of a {}.", "a photo of {}."]
    filled = [t.format(p) for p in PHRASES for t in templates]
    return {
        "images": jnp.concatenate([jnp.asarray(np.load(f / "images.npy")) for f in folders]),
        "named": jnp.asarray(mentions.named),
        "unknown": jnp.asarray(mentions.unknown),
        "captions": jnp.asarray(tokenize(captions, CAPTION_TOKENS)).reshape(-1, 2, CAPTION_TOKENS),
        "phrases": jnp.asarray(tokenize(filled, PHRASE_TOKENS)).reshape(len(PHRASES), len(templates), PHRASE_TOKENS),
        "wide": jnp.asarray(len(records[0])),
    }


def draw_batch(
    key: jax.Array, corpus: dict[str, jax.Array], size: int, closeups: Sequence[float], progress: jax.Array
) -> dict[str, jax.Array]:
    """Scenes and close-ups, all class names and some coloured phrases, those that are named first.

    Args:
      corpus: of `load_corpus`.
      size: images.
      closeups: share of close-ups in the first 15% and from the middle of training on.
      progress: share of the training that is done.
    """
    keys = jax.random.split(key, 6)
    share = jnp.interp(progress, jnp.asarray((0.15, 0.5)), jnp.asarray(closeups))
    near = jax.random.bernoulli(keys[0], share, (size,))
    total, wide = len(corpus["images"]), corpus["wide"]
    row = jnp.where(
        near,
        jax.random.randint(keys[1], (size,), wide, total),
        jax.random.randint(keys[2], (size,), 0, wide),
    )
    named, unknown, coloured = corpus["named"][row], corpus["unknown"][row], len(CLASSES)
    rank = named[:, coloured:].any(0) + jax.random.uniform(keys[3], (len(PHRASES) - coloured,))
    slots = jnp.concatenate([jnp.arange(coloured), coloured + jax.lax.top_k(rank, COLOURED_SLOTS)[1]])
    some = row[: size // 4]  # rows are drawn at random already
    return {
        "images": corpus["images"][row],
        "phrases": corpus["phrases"][slots, jax.random.randint(keys[4], slots.shape, 0, corpus["phrases"].shape[1])],
        "captions": corpus["captions"][some, jax.random.randint(keys[5], some.shape, 0, 2)],
        "named": named[:, slots],
        "unknown": unknown[:, slots],
        "noun": jnp.asarray(NOUNS)[slots],
    }


def multi_positive(scores: jax.Array, positive: jax.Array, negative: jax.Array) -> jax.Array:
    """Mean over the positives of -log(e^s / (e^s + Σ over negatives e^s')), row by row."""
    others = jax.nn.logsumexp(jnp.where(negative, scores, -1e9), axis=1, keepdims=True)
    loss = jax.nn.softplus(others - scores)
    return (loss * positive).sum() / jnp.maximum(positive.sum(), 1)


def unnamed(scores: jax.Array, named: jax.Array, wrong: jax.Array, stuff: jax.Array, share: float) -> jax.Array:
    """Mean over the positions of -log of the named phrases' share, phrases on the last axis; objects against stuff.

    Σ over named e^s / Σ over named and wrong e^s is a share that stuff alone can fill: every caption names some, so
    that a position which shows an object loses nothing by answering to the grass behind it (measured: 65% of the
    objects' pixels called stuff, 0.1% another object). So the named objects and the named stuff have a share each, and
    the loss is its cross-entropy with who of the two the position shows: objects at the `share` of the batch's
    positions that are most like them, the probability of the others falling with their distance.
    """
    among = lambda chosen: jax.nn.logsumexp(jnp.where(chosen, scores, -1e9), axis=-1)  # noqa: E731
    objects, ground, all_ = among(named & ~stuff), among(named & stuff), among(named | wrong)
    likeness = jax.lax.stop_gradient(objects - ground)
    shown = jax.nn.sigmoid(likeness - jnp.quantile(likeness, 1 - share))
    return (all_ - shown * objects - (1 - shown) * ground).mean()


def uniformity(embeddings: jax.Array, noun: jax.Array) -> jax.Array:
    """log mean e^(3 cos) over pairs of phrases with different nouns."""
    different = noun[:, None] != noun[None]
    return jnp.log((jnp.exp(3 * embeddings @ embeddings.T) * different).sum() / different.sum())
