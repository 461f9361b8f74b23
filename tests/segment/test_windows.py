"""Sliding windows end to end, against a loop over unpadded windows."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pixel_loops import CLASSES, settings_of, softmax, upsampled

from maskclip_jax.data.preprocess import interpolation_matrix, prepare, upsample_matrix
from maskclip_jax.errors import UserError
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.predict import dense_logits, iter_segmentations, segment_images
from maskclip_jax.segment.refine import class_confidence, drop_classes, key_smoothing


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def by_windows(p, picture, classifier, window, stride, denoising, smoothing):
    """Windows one at a time, unpadded; denoised together; upsampled and averaged pixel by pixel."""
    fidelity, scale = p.config.fidelity, np.exp(np.asarray(p.variables["params"]["logit_scale"]))
    prepared = prepare(picture, p.preprocess, 1)
    height, width = prepared.valid
    tall, broad = min(window, height), min(window, width)
    ys = sorted({*range(0, height - tall, stride), height - tall})
    xs = sorted({*range(0, width - broad, stride), width - broad})
    dense = []
    core = jax.jit(lambda v, x: dense_logits(p.model, v, x, classifier))
    for y, x in itertools.product(ys, xs):
        crop = prepared.pixels[y : y + tall, x : x + broad]
        extra = [(0, -n % p.config.multiple) for n in crop.shape[:2]]
        dense.append(core(p.variables, np.pad(crop, (*extra, (0, 0)))[None]))
    shape = dense[0].logits.shape
    flat = [d.logits.reshape(1, -1, shape[-1]) for d in dense]
    if denoising is not None:
        sure = jnp.max(jnp.stack([class_confidence(f, scale=scale) for f in flat]), axis=0)
        flat = [drop_classes(f, sure, threshold=denoising) for f in flat]
    if smoothing is not None:
        flat = [
            key_smoothing(
                jax.nn.softmax(scale * f, -1), d.keys, threshold=smoothing, normalize=fidelity.key_normalization
            )
            for f, d in zip(flat, dense, strict=True)
        ]
    total, count = np.zeros((height, width, shape[-1])), np.zeros((height, width, 1))
    for (y, x), f in zip(itertools.product(ys, xs), flat, strict=True):
        rows, columns = (
            upsample_matrix(n, p.config.stride, m, m) for n, m in zip(shape[1:3], (tall, broad), strict=True)
        )
        total[y : y + tall, x : x + broad] += upsampled(np.asarray(f).reshape(shape[1:]), rows, columns)
        count[y : y + tall, x : x + broad] += 1
    resize = (interpolation_matrix(n, m) for n, m in zip(prepared.valid, prepared.original, strict=True))
    return upsampled(total / count, *resize)


@pytest.mark.parametrize(("kind", "denoising", "smoothing"), [("vit", 0.45, 0.9), ("resnet", 0.3, None)])
def test_windows_are_the_loop_over_windows(pretrained, images, kind, denoising, smoothing):
    p = pretrained(kind)
    window, stride = (20, 12) if kind == "vit" else (48, 31)
    p = dataclasses.replace(p, preprocess=dataclasses.replace(p.preprocess, short_side=36, long_side=80))
    pictures = images((30, 41), (12, 90))
    classifier = text_classifier(p, CLASSES, "single")
    options = {"window": window, "stride": stride, "prompt_denoising": denoising, "key_smoothing": smoothing}
    settings = settings_of(p, batch_size=4, **options)
    with count_compiles() as count:
        out = list(iter_segmentations(pictures, settings))
    assert count.programs <= 3
    for picture, ours in zip(pictures, out, strict=True):
        expected = by_windows(p, picture, classifier, window, stride, denoising, smoothing)
        best = np.sort(expected, -1)
        clear = best[..., -1] - best[..., -2] > (1e-4 if smoothing is None else 1e-4 * np.abs(best).max())
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(ours.labels[clear], expected.argmax(-1)[clear])
        if smoothing is None:
            scale = np.asarray(settings.scale)
            np.testing.assert_allclose(ours.confidence, softmax(scale * expected).max(-1), atol=1e-3)


def test_one_window_over_everything_is_the_whole_image(pretrained, images):
    """Where the image keeps its size: else windows are upsampled to the resized image first, and that is resized."""
    p = pretrained("vit")
    p = dataclasses.replace(p, preprocess=dataclasses.replace(p.preprocess, short_side=None, long_side=None))
    (picture,) = images((40, 50))
    # Not 1: one cell is sure to the last bit, which another program rounds to just below 1, and only that is smoothed.
    options = {"templates": "single", "prompt_denoising": 0.4, "key_smoothing": 0.9, "return_probabilities": True}
    (whole,) = segment_images([picture], CLASSES, p, **options)
    for window in (56, 10**30):  # of which no more is read, nor memory taken, than the image has
        (windowed,) = segment_images([picture], CLASSES, p, window=window, **options)
        np.testing.assert_allclose(whole.probabilities, windowed.probabilities, atol=1e-4)


def test_thousands_of_windows_are_refused_before_anything_runs(pretrained, images):
    with count_compiles() as count, pytest.raises(UserError, match="at most 4096 windows, but windows of 1 every 1"):
        segment_images(
            images((96, 64)), CLASSES, pretrained("vit", short_side=64), window=1, stride=1, templates="single"
        )
    assert count.programs <= 12  # of the text tower alone
