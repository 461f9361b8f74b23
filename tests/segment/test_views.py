"""Views, PAMR and synonyms against what they say, by hand; methods and protocols as the user gives them."""

import dataclasses

import numpy as np
import pytest

from maskclip_jax.encoders.dense import ALONE, METHODS, DenseMethod
from maskclip_jax.errors import UserError
from maskclip_jax.segment.grid import whole_scores
from maskclip_jax.segment.pamr import pamr
from maskclip_jax.segment.pixels import every_pixel
from maskclip_jax.segment.predict import prediction_settings, segment_images
from maskclip_jax.segment.protocols import PROTOCOLS, protocol_options
from maskclip_jax.segment.windows import window_scores

CLASSES = ["dog", "cat,kitten", "tree", "fire truck"]

NAN, INF = float("nan"), float("inf")


def settings_of(p, **options):
    return prediction_settings(CLASSES, p, templates="single", return_probabilities=True, **options)


def probabilities(p, pictures, **options):
    found = segment_images(pictures, CLASSES, p, templates="single", return_probabilities=True, **options)
    return [result.probabilities for result in found]


def test_both_ways_to_the_pixels_agree(pretrained, images):
    p, pictures = pretrained("vit"), images((40, 50), (33, 71))
    tiles = segment_images(pictures, CLASSES, p, templates="single", return_probabilities=True)
    whole = dict(every_pixel(pictures, settings_of(p), whole_scores))
    for i, expected in enumerate(tiles):
        assert (whole[i].labels != expected.labels).mean() < 1e-3  # two programs: near a tie either may come out
        assert whole[i].labels.dtype == expected.labels.dtype
        np.testing.assert_allclose(whole[i].confidence, expected.confidence, atol=1e-4)  # 100 × the cosines' rounding
        np.testing.assert_allclose(whole[i].probabilities, expected.probabilities, atol=1e-4)


def test_views_are_averaged(pretrained, images):
    p, (picture,) = pretrained("vit"), images((40, 50))
    views = [probabilities(p, [picture], short_side=side)[0] for side in (32, 48)]
    views += [probabilities(p, [picture[:, ::-1].copy()], short_side=side)[0][:, ::-1] for side in (32, 48)]
    (ours,) = probabilities(p, [picture], scales=(1, 1.5), flip=True)
    np.testing.assert_allclose(ours, np.mean(views, axis=0), atol=2e-5)


def test_pamr_refines_the_logits(pretrained, images):
    p, (picture,) = pretrained("vit"), images((40, 50))
    settings = settings_of(p, window=24, stride=16, pamr=2)
    (plain,) = probabilities(p, [picture], window=24, stride=16)
    ((_, cells),) = window_scores([picture], settings)
    logits = np.einsum("yh,xw,hwc->yxc", cells.rows, cells.columns, cells.scores.values)
    refined = np.asarray(pamr(logits.astype(np.float32), picture / np.float32(255), steps=2))
    e = np.exp(settings.scale * (refined - refined.max(-1, keepdims=True)))
    (ours,) = probabilities(p, [picture], window=24, stride=16, pamr=2)
    np.testing.assert_allclose(ours, e / e.sum(-1, keepdims=True), atol=1e-4)
    assert np.abs(ours - plain).max() > 1e-3


def test_the_best_synonym_counts(pretrained, images):
    p, (picture,) = pretrained("vit"), images((40, 50))
    words = ["dog", "cat", "kitten", "tree", "fire truck"]
    (apart,) = segment_images([picture], words, p, templates="single", return_probabilities=True)
    (best,) = segment_images([picture], CLASSES, p, templates="single", return_probabilities=True, synonyms="max")
    each = apart.probabilities
    expected = np.stack([each[..., 0], each[..., 1:3].max(-1), each[..., 3], each[..., 4]], -1)
    np.testing.assert_allclose(best.probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(best.labels, expected.argmax(-1))
    np.testing.assert_allclose(best.confidence, expected.max(-1), atol=1e-5)


def test_the_probability_scale(pretrained, images):
    p, (picture,) = pretrained("vit"), images((40, 50))
    (hot,) = probabilities(p, [picture], probability_scale=5)
    (own,) = probabilities(p, [picture])
    log = lambda x: np.log(x) - np.log(x).mean(-1, keepdims=True)  # noqa: E731
    scale = float(np.exp(np.asarray(p.variables["params"]["logit_scale"])))
    np.testing.assert_allclose(log(hot) / 5, log(own) / scale, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_methods_reach_the_tower(pretrained, kind):
    p = pretrained(kind)
    for name, preset in ALONE.items():
        if kind == "resnet" and preset.earlier:  # refused
            continue
        method = settings_of(p, method=name).method
        assert method == dataclasses.replace(METHODS[name], blocks=min(METHODS[name].blocks, 1 if kind == "vit" else 6))


def test_a_method_changes_the_answer_and_windows_read_it_too(pretrained, images):
    p, (picture,) = pretrained("vit"), images((32, 32))
    (plain,) = probabilities(p, [picture])
    (whole,) = probabilities(p, [picture], method="naclip")
    (windowed,) = probabilities(p, [picture], method="naclip", window=32, stride=32)
    np.testing.assert_allclose(windowed, whole, atol=1e-5)  # one window holds the whole image
    assert np.abs(whole - plain).max() > 1e-3


def test_protocols_are_options(pretrained):
    p = pretrained("vit")
    for name in PROTOCOLS:
        protocol = protocol_options(name)
        settings = prediction_settings(CLASSES, p, protocol, affinity=None if protocol.affinity is None else p)
        assert settings.preprocess.short_side == PROTOCOLS[name].short_side
        assert settings.naming["least"] == 0
    assert protocol_options("sclip", background=True).background_threshold == 0.1
    settings = prediction_settings(CLASSES, p, protocol_options("naclip"))
    assert (float(settings.scale), len(settings.word_class)) == (40, 5)
    assert (settings.options.windows, settings.options.pamr) == ((224, 112), 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "slip"}, "a method is one of"),
        ({"method": DenseMethod("qq", blocks=3)}, "has 2 blocks"),
        ({"synonyms": "best"}, "synonyms is one of mean, max, got best"),
        ({"pamr": -1}, "0 to 1000 steps"),
        ({"pamr": 10**6}, "0 to 1000 steps"),
        *(({"scales": scales}, "scales are 0.0625 to 16") for scales in ((), (0.0,), (1, NAN), (INF,), (1e9,), (-1,))),
        *(({"probability_scale": scale}, "above 0 and up to") for scale in (0.0, -1, NAN, INF, 1e30)),
    ],
)
def test_one_line_for_what_cannot_be(pretrained, options, words):
    with pytest.raises(UserError, match=words) as error:
        settings_of(pretrained("vit"), **options)
    assert "\n" not in str(error.value)


def test_too_many_numbers(pretrained, monkeypatch):
    monkeypatch.setattr("maskclip_jax.segment.pixels.MOST_FLOATS", 1000)
    with pytest.raises(UserError, match="50×40 pixels and there are 4 words"):
        segment_images([np.zeros((40, 50, 3), np.uint8)], CLASSES, pretrained("vit"), templates="single", pamr=1)
    with pytest.raises(UserError, match="a protocol is one of maskclip, maskclip-context, sclip"):
        protocol_options("slip")
