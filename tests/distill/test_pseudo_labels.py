"""Labels against plain loops over pixels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_distill import config_of

from maskclip_jax.distill import pseudo_labels as pl
from maskclip_jax.errors import UserError
from maskclip_jax.segment.refine import Logits, Probabilities

SHAPE = (2, 5, 6)


def scores_of(classes, seed=0):
    return np.random.default_rng(seed).normal(size=(*SHAPE, classes)).astype(np.float32)


def labels_of(values, seed=1):
    return np.random.default_rng(seed).choice(np.asarray(values, np.int32), SHAPE)


def by_hand(annotation, scores, candidates, threshold=None, scale=1.0):
    """scores [.., K] of the candidates alone; pixel by pixel."""
    out = annotation.copy()
    for at in np.ndindex(annotation.shape):
        if annotation[at] != 254:
            continue
        values = scores[at].astype(np.float64) * scale
        p = np.exp(values - values.max())
        p /= p.sum()
        best = int(np.argmax(values))
        out[at] = candidates[best] if threshold is None or p[best] >= threshold else 255
    return out


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_annotation_free(threshold):
    config = config_of()
    annotation = labels_of([254, 254, 254, 255])
    scores = scores_of(5)
    pseudo = pl.best_candidate(Logits(jnp.asarray(scores)), config.candidates, scale=3.0, threshold=threshold)
    found = np.asarray(pl.fill_unlabelled(jnp.asarray(annotation), pseudo))
    np.testing.assert_array_equal(found, by_hand(annotation, scores, config.candidates, threshold, 3.0))
    assert (found[annotation == 255] == 255).all()
    if threshold is not None:
        changed = found[annotation == 254]
        assert 0 < (changed == 255).sum() < changed.size  # the threshold divides these scores


@pytest.mark.parametrize("background", [False, True])
def test_zero_shot_keeps_the_annotation_and_asks_for_unseen_classes_only(background):
    config = config_of(mode="zero-shot", unseen=("cat", "sky"), background=background)
    seen = sorted(set(range(config.num_classes)) - set(config.unseen_labels))
    annotation = labels_of([254, 254, 255, *seen])
    scores = scores_of(2)
    pseudo = pl.best_candidate(Logits(jnp.asarray(scores)), config.candidates)
    found = np.asarray(pl.fill_unlabelled(jnp.asarray(annotation), pseudo))
    np.testing.assert_array_equal(found, by_hand(annotation, scores, config.candidates))
    assert set(np.unique(found[annotation == 254])) == set(config.unseen_labels)
    assert (found[annotation != 254] == annotation[annotation != 254]).all()


def test_smoothed_scores_are_probabilities_already():
    scores = np.array([[[[3.0, 1.0, -1.0], [0.5, 0.4, 0.1]]]], np.float32)  # clipped at 0 and divided: 0.75, 0.5
    found = pl.best_candidate(Probabilities(jnp.asarray(scores)), (4, 5, 6), scale=100.0, threshold=0.6)
    assert found.tolist() == [[[4, 255]]]


def test_what_training_may_see():
    """dog 0, cat 1, grass 2, sky 3, road 4; ignored 255."""
    labels = np.array([[0, 1, 2], [3, 4, 255]], np.uint8)
    see = lambda **changes: pl.training_annotation(labels, config_of(**changes)).tolist()  # noqa: E731
    unseen = {"unseen": ("cat", "sky")}
    assert see() == see(mode="feature") == [[254] * 3] * 2
    assert see(foreground="annotation") == [[254, 254, 254], [254, 254, 255]]
    assert see(mode="zero-shot", **unseen) == [[0, 254, 2], [254, 4, 255]]
    assert see(mode="finetuned-clip", mapper="mlp", student=clip_student(), **unseen) == [[0, 255, 2], [255, 4, 255]]
    assert see(mode="supervised", **unseen) == labels.tolist()
    # with a background the same numbers are background, dog, cat, grass, sky
    assert see(foreground="annotation", background=True) == [[0, 254, 254], [254, 254, 255]]
    assert see(mode="zero-shot", background=True, **unseen) == [[0, 1, 254], [3, 254, 255]]


def clip_student():
    return dataclasses.replace(config_of().student, stem="clip")


@pytest.mark.parametrize(
    ("changes", "leak", "name"),
    [
        ({"mode": "zero-shot", "unseen": ("cat", "sky")}, 3, "sky"),
        ({"mode": "zero-shot", "unseen": ("cat", "sky"), "background": True}, 2, "cat"),
        ({}, 4, "road"),
        ({"foreground": "annotation", "background": True}, 1, "dog"),
    ],
)
def test_a_leak_is_refused(changes, leak, name):
    config = config_of(**changes)
    labels = np.full(SHAPE, 254, np.int32)
    pl.check_no_leak(labels, config)
    assert float(pl.leaked_pixels(jnp.asarray(labels), config)) == 0
    labels[1, 2, :3] = leak
    with pytest.raises(UserError, match=f"refuse to train.*{name}") as error:
        pl.check_no_leak(labels, config)
    assert "\n" not in str(error.value)
    assert float(pl.leaked_pixels(jnp.asarray(labels), config)) == 3
    hidden = pl.training_annotation(labels, config)
    pl.check_no_leak(hidden, config)


def test_a_supervised_run_sees_everything():
    config = config_of(mode="supervised", unseen=("cat",))
    labels = labels_of(range(5))
    pl.check_no_leak(labels, config)
    assert float(pl.leaked_pixels(jnp.asarray(labels), config)) == 0


def test_phases_change_exactly_at_guided_steps():
    config = config_of(self_training=True, guided_steps=3)
    assert [bool(pl.is_guided(step, config)) for step in (0, 2, 3, 4)] == [True, True, False, False]
    never = config_of(guided_steps=3)
    assert all(bool(pl.is_guided(step, never)) for step in (0, 3, 10))
