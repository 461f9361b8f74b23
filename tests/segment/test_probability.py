"""Softmax or sigmoid: how cosines become probabilities, and every encoder family by every method through `segment`."""

import functools

import clip_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_clip import compiled_apply, random_pretrained

from maskclip_jax import segment_images
from maskclip_jax.encoders.dense import ALONE
from maskclip_jax.errors import UserError
from maskclip_jax.segment.grid import pixel_matrix
from maskclip_jax.segment.protocols import PROTOCOLS
from maskclip_jax.segment.refine import Logits, Probabilities, Sigmoid, to_probabilities
from maskclip_jax.segment.settings import prediction_settings

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (40, 56, 3), np.uint8)
WORDS = ("dog", "cat", "sky")
FAMILIES = ("vit", "resnet", "siglip", "tips")


@functools.cache
def clip(kind):
    config = clip_checkpoints.CONFIGS[kind]
    return random_pretrained(config, lambda prompts: np.zeros((len(prompts), 8), np.int32), short_side=None)


def rows(pretrained, count=3):
    found = np.random.default_rng(1).normal(size=(count, pretrained.config.embed_dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def segmented(pretrained, words=WORDS, **options):
    classifier = rows(pretrained, options.pop("count", len(words)))
    (found,) = segment_images([IMAGE], words, pretrained, classifier=classifier, return_probabilities=True, **options)
    return found


def test_each_class_is_judged_by_itself():
    values = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    found = to_probabilities(Logits(values), Sigmoid(7.0, -2.0))
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-(7.0 * np.asarray(values, np.float64) - 2))), atol=1e-6)
    kept = to_probabilities(Probabilities(jnp.asarray([-0.2, 0.4, 1.3])), Sigmoid(7.0, -2.0))
    np.testing.assert_allclose(kept, [0, 0.4, 1], atol=1e-7)


def test_a_sigmoid_from_image_to_masks():
    """The same labels as a softmax gives (both are monotonic); probabilities that need not sum to one."""
    pretrained = clip("siglip")
    soft, alone = segmented(pretrained), segmented(pretrained, probability="sigmoid")
    np.testing.assert_array_equal(soft.labels, alone.labels)
    np.testing.assert_allclose(soft.probabilities.sum(-1), 1, atol=1e-5)
    assert np.abs(alone.probabilities.sum(-1) - 1).max() > 0.1
    params = pretrained.variables["params"]
    scale = prediction_settings(WORDS, pretrained, classifier=rows(pretrained), probability="sigmoid").scale
    assert isinstance(scale, Sigmoid)
    np.testing.assert_allclose(scale, (np.exp(params["logit_scale"]), params["logit_bias"]), rtol=1e-6)
    # a softmax's logarithms are the scaled cosines but for a constant; the sigmoid's log-odds are they, and the bias
    odds = np.log(alone.probabilities / (1 - alone.probabilities))
    cosines = np.log(soft.probabilities)
    np.testing.assert_allclose(np.diff(odds), np.diff(cosines), atol=2e-2)
    np.testing.assert_allclose(alone.confidence, alone.probabilities.max(-1), atol=1e-6)


def test_nothing_may_be_there():
    pretrained = clip("siglip")
    before = segmented(pretrained, probability="sigmoid")
    bar = float(np.quantile(before.confidence, 0.5))
    found = segmented(pretrained, probability="sigmoid", background_threshold=bar)
    np.testing.assert_array_equal(found.labels == 0, before.confidence < np.float32(bar))


def test_words_of_a_class_do_not_add_up():
    """A background of two words is as probable as the likelier of them."""
    pretrained = clip("siglip")
    found = segmented(pretrained, ("dog", "cat"), background=["sky", "road"], count=4, probability="sigmoid")
    words = segmented(pretrained, ("sky", "road", "dog", "cat"), probability="sigmoid")
    np.testing.assert_allclose(found.probabilities[..., 0], words.probabilities[..., :2].max(-1), atol=1e-6)


def test_without_a_bias_it_is_refused():
    with pytest.raises(UserError, match=r"a sigmoid needs a model that was trained with one \(SigLIP\)"):
        segmented(clip("vit"), probability="sigmoid")
    with pytest.raises(UserError, match="probability is one of softmax, sigmoid, got other"):
        segmented(clip("vit"), probability="other")


@pytest.mark.parametrize("probability", ["softmax", "sigmoid"])
def test_windows_may_average_probabilities(probability):
    """One window is no average: its cells' probabilities are brought to pixels, in place of their logits."""
    pretrained = clip("siglip")
    options = {"window": 56, "stride": 56, "probability": probability}
    settings = prediction_settings(WORDS, pretrained, classifier=rows(pretrained), **options)
    prepared = settings.prepare(IMAGE)
    features, _ = compiled_apply(
        pretrained.model, pretrained.variables, jnp.asarray(prepared.pixels[None]), method="encode_dense"
    )
    logits = Logits(jnp.einsum("hwe,ce->hwc", features[0], rows(pretrained)))
    cells = to_probabilities(logits, settings.scale)
    up = [pixel_matrix(settings.config, n, side, side) for n, side in zip(cells.shape[:2], (40, 56), strict=True)]
    expected = np.einsum("yh,xw,hwc->yxc", *up, np.asarray(cells))
    found = segmented(pretrained, window_mean="probabilities", **options)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-4)
    assert np.abs(segmented(pretrained, **options).probabilities - expected).max() > 1e-3


def test_the_tips_protocol():
    protocol = PROTOCOLS["tipsv2"]
    assert (protocol.short_side, protocol.window, protocol.stride) == (448, 448, 336)
    assert protocol.window_mean == "probabilities"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", ALONE)
def test_every_family_by_every_method(kind, method):
    if kind == "resnet" and ALONE[method].earlier:
        with pytest.raises(UserError, match="asks a ViT's earlier blocks, which this tower does not have"):
            segmented(clip(kind), method=method)
        return
    found = segmented(clip(kind), method=method, prompt_denoising=0.2, key_smoothing=1.0)
    assert found.labels.shape == IMAGE.shape[:2]
    assert np.isfinite(found.probabilities).all()
    assert jax.tree.all(jax.tree.map(lambda p: p >= 0, found.confidence.min()))
