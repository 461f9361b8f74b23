"""Pixels in tiles against the whole array at once."""

import numpy as np
import pytest

from maskclip_jax.data.preprocess import interpolation_matrix, upsample_matrix
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment.pixels import CELLS, label_pixels, strips, tile_shape
from maskclip_jax.segment.refine import Logits, Probabilities


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def at_once(scores, rows, columns):
    return np.einsum("yh,xw,hwc->yxc", rows, columns, scores, optimize=True)


@pytest.mark.parametrize(("cells", "pixels"), [((5, 7), (300, 301)), ((40, 33), (50, 41)), ((1, 30), (1, 700))])
def test_tiles_make_the_whole(cells, pixels):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(*cells, 4)).astype(np.float32)
    rows, columns = (interpolation_matrix(n, m) for n, m in zip(cells, pixels, strict=True))
    whole = at_once(scores, rows, columns)
    maps = label_pixels(Logits(scores), rows, columns, np.arange(4), scale=3.0, with_probabilities=True)
    assert maps.labels.dtype == np.uint8
    assert maps.labels.shape == pixels
    np.testing.assert_array_equal(maps.labels, whole.argmax(-1))
    np.testing.assert_allclose(maps.probabilities, softmax(3 * whole), atol=1e-5)
    np.testing.assert_allclose(maps.confidence, softmax(3 * whole).max(-1), atol=1e-5)


def test_every_size_is_one_program():
    rng = np.random.default_rng(1)

    def run(cells, pixels):
        scores = rng.normal(size=(*cells, 23)).astype(np.float32)
        rows, columns = (interpolation_matrix(n, m) for n, m in zip(cells, pixels, strict=True))
        label_pixels(Logits(scores), rows, columns, np.arange(23), scale=1.0)  # as many as no other test has

    with count_compiles() as count:
        run((3, 4), (30, 40))
        run((64, 2), (10, 900))
        run((2, 64), (333, 1))
    assert count.programs == 1


def test_words_of_one_class_compete_alone_and_count_together():
    scores = np.log(np.array([[[0.3, 0.3, 0.4], [0.5, 0.1, 0.4], [0.1, 0.1, 0.8]]], np.float32))
    one = np.ones((1, 1), np.float32)
    maps = label_pixels(
        Logits(scores),
        one,
        np.eye(3, dtype=np.float32),
        np.array([0, 0, 1]),
        scale=1.0,
        with_probabilities=True,
    )
    np.testing.assert_array_equal(maps.labels, [[1, 0, 1]])
    np.testing.assert_allclose(maps.confidence, [[0.4, 0.6, 0.8]], atol=1e-6)
    np.testing.assert_allclose(maps.probabilities, [[[0.6, 0.4], [0.6, 0.4], [0.2, 0.8]]], atol=1e-6)
    unsure = label_pixels(Logits(scores), one, np.eye(3, dtype=np.float32), np.array([1, 2, 3]), scale=1.0,
                          least=0.45)  # fmt: skip
    np.testing.assert_array_equal(unsure.labels, [[0, 1, 3]])
    np.testing.assert_allclose(unsure.confidence, [[0.4, 0.5, 0.8]], atol=1e-6)


def test_smoothed_scores_are_shares_of_what_is_positive():
    scores = np.array([[[3.0, 1.0, -5.0], [-1.0, -2.0, -3.0]]], np.float32)
    one, two = np.ones((1, 1), np.float32), np.eye(2, dtype=np.float32)
    maps = label_pixels(Probabilities(scores), one, two, np.arange(3), scale=100.0, with_probabilities=True)
    np.testing.assert_array_equal(maps.labels, [[0, 0]])
    np.testing.assert_allclose(maps.probabilities, [[[0.75, 0.25, 0], [1 / 3] * 3]], atol=1e-6)


def test_many_classes_take_16_bits_and_smaller_tiles():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(2, 3, 300)).astype(np.float32)
    rows, columns = interpolation_matrix(2, 9), interpolation_matrix(3, 8)
    maps = label_pixels(Logits(scores), rows, columns, np.arange(300), scale=1.0)
    assert maps.labels.dtype == np.uint16
    np.testing.assert_array_equal(maps.labels, at_once(scores, rows, columns).argmax(-1))
    assert tile_shape(171) == (128, 256)
    assert np.prod(tile_shape(5000)) * 5000 <= 2**23 < 4 * np.prod(tile_shape(5000)) * 5000


@pytest.mark.parametrize("matrix", [interpolation_matrix(100, 30), upsample_matrix(130, 16, 2070, 4000)])
def test_strips_cover_an_axis_once(matrix):
    together = np.zeros_like(matrix)
    stop = 0
    for strip in strips(matrix, 64):
        assert strip.start == stop < strip.stop
        assert strip.matrix.shape == (64, CELLS)
        stop = strip.stop
        part = np.zeros((64, matrix.shape[1]), np.float32)
        np.add.at(part.T, strip.cells, strip.matrix.T)
        together[strip.start : strip.stop] = part[: strip.stop - strip.start]
    assert stop == len(matrix)
    np.testing.assert_array_equal(together, matrix)


def test_a_pixel_of_too_many_cells_is_a_bug():
    with pytest.raises(ValueError, match="at most 24 cells"):
        list(strips(np.ones((4, 25), np.float32), 4))
