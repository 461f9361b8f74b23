"""A protocol's score is that of the masks that `segment_images` writes with the same options."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_distill import CLASSES, pretrained_clip, text_rows

from maskclip_jax.data.sources import ArraySource
from maskclip_jax.data.vocabulary import as_classes
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import evaluate_teacher
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.evaluate.segmented import evaluate_protocol
from maskclip_jax.segment.predict import segment_images

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 32, 32, 3), np.uint8)
LABELS = RNG.integers(0, len(CLASSES), (3, 32, 32)).astype(np.uint8)
OPTIONS = {"method": "sclip", "short_side": 32, "window": 24, "stride": 8, "pamr": 1, "probability_scale": 40.0}


def test_a_protocol_scores_as_its_masks_do():
    clip, rows = pretrained_clip(), text_rows()
    found = segment_images(list(IMAGES), CLASSES, clip, classifier=rows, **OPTIONS)
    expected = sum(confusion_matrix(t, f.labels, len(CLASSES)) for t, f in zip(LABELS, found, strict=True))
    seen = []
    scores = evaluate_protocol(
        clip,
        ArraySource(IMAGES, LABELS),
        classes=as_classes(CLASSES),
        protocol_name="mine",
        classifier=rows,
        progress=lambda done, total: seen.append((done, total)),
        **OPTIONS,
    )
    np.testing.assert_array_equal(scores.confusion, expected)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    protocol = json.loads(json.dumps(scores.to_dict()))["protocol"]
    for name, value in {"protocol": "mine", "method": "sclip", "window": 24, "pamr": 1, "short side": 32}.items():
        assert protocol[name] == value
    assert protocol["probability scale"] == 40


def test_a_background_by_threshold_is_class_zero():
    clip, rows = pretrained_clip(), text_rows(4)
    options = {"short_side": 32, "background_threshold": 0.4}
    found = segment_images(list(IMAGES), CLASSES[1:], clip, classifier=rows, **options)
    expected = sum(confusion_matrix(t, f.labels, 5) for t, f in zip(LABELS, found, strict=True))
    classes = as_classes(["background", *CLASSES[1:]])
    scores = evaluate_protocol(clip, ArraySource(IMAGES, LABELS), classes=classes, classifier=rows, **options)
    np.testing.assert_array_equal(scores.confusion, expected)
    assert scores.confusion[:, 0].sum() > 0
    with pytest.raises(UserError, match="words of its own"):
        evaluate_protocol(clip, ArraySource(IMAGES, LABELS), classes=classes, classifier=rows)
    with pytest.raises(UserError, match="scores need annotation"):
        evaluate_protocol(clip, ArraySource(IMAGES), classes=as_classes(CLASSES), classifier=text_rows(), short_side=32)


@pytest.mark.parametrize("method", ["naclip", METHODS["naclip"]])
def test_both_engines_read_alike(method):
    """The engine on the device, whole images: the same masks but for pixels on the fence."""
    clip = pretrained_clip()
    clip = dataclasses.replace(clip, preprocess=dataclasses.replace(clip.preprocess, short_side=32))
    fast = evaluate_teacher(clip, text_rows(), CLASSES, ArraySource(IMAGES, LABELS), method=method)
    found = segment_images(list(IMAGES), CLASSES, clip, classifier=text_rows(), method=method)
    expected = sum(confusion_matrix(t, f.labels, len(CLASSES)) for t, f in zip(LABELS, found, strict=True))
    assert np.abs(fast.confusion - expected).sum() / expected.sum() < 2e-3
    json.dumps(fast.to_dict())
    assert jax.tree.leaves(fast.protocol["method"])
