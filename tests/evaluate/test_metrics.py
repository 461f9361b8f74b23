"""Scores against mmsegmentation's, against loops, and against numbers worked out by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.errors import UserError
from maskclip_jax.evaluate import metrics as ev

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "official_miou.npz", allow_pickle=False)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_the_official_scores(convert):
    confusion = ev.confusion_matrix(convert(GOLDEN["label"]), convert(GOLDEN["pred"]), int(GOLDEN["num_classes"]))
    scores = ev.mean_iou(confusion)
    np.testing.assert_allclose(scores.per_class, GOLDEN["iou"], atol=1e-6)
    assert np.isnan(scores.per_class[-1])
    assert float(scores.mean) == pytest.approx(np.nanmean(GOLDEN["iou"]), abs=1e-6)
    accuracy = ev.mean_accuracy(confusion)
    np.testing.assert_allclose(accuracy.per_class, GOLDEN["acc"], atol=1e-6)
    assert float(accuracy.mean) == pytest.approx(np.nanmean(GOLDEN["acc"]), abs=1e-6)
    assert float(ev.pixel_accuracy(confusion)) == pytest.approx(float(GOLDEN["aacc"]), abs=1e-6)


def test_rows_are_ground_truth():
    true = np.array([[0, 0, 1], [2, 255, 1]], np.uint8)
    pred = np.array([[0, 1, 1], [0, 2, 1]], np.uint8)
    expected = [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    host = ev.confusion_matrix(true, pred, 3)
    assert host.dtype == np.int64
    np.testing.assert_array_equal(host, expected)
    device = jax.jit(ev.confusion_matrix, static_argnums=(2, 3))(true, pred, 3)
    assert device.dtype == jnp.int32
    np.testing.assert_array_equal(device, expected)
    # IoU by hand: 1/(2+2−1), 2/(2+3−2), 0/(1+0−0)
    np.testing.assert_allclose(ev.mean_iou(host).per_class, [1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(ev.mean_iou(host).mean, 1 / 3)
    np.testing.assert_allclose(ev.mean_accuracy(host).per_class, [1 / 2, 1, 0])
    np.testing.assert_allclose(ev.pixel_accuracy(host), 3 / 5)


@pytest.mark.parametrize("classes", [7, 171, 459])
def test_against_a_loop(classes):
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, classes, (2, 9, 11))
    true[0, :4] = 65535
    expected = np.zeros((classes, classes), int)
    for t, p in zip(true.ravel(), pred.ravel(), strict=True):
        if t != 65535:
            expected[t, p] += 1
    np.testing.assert_array_equal(ev.confusion_matrix(true, pred, classes, 65535), expected)
    device = ev.confusion_matrix(jnp.asarray(true), jnp.asarray(pred), classes, 65535)
    np.testing.assert_array_equal(device, expected)


def test_small_integer_labels_do_not_overflow():
    """200·201 + 200 does not fit uint8, nor int16."""
    label = np.full((2, 2), 200, np.uint8)
    assert ev.confusion_matrix(label, label, 201)[200, 200] == 4
    assert ev.confusion_matrix(jnp.asarray(label), jnp.asarray(label), 201)[200, 200] == 4


def test_sums_beyond_32_bits_stay_exact():
    total = np.zeros((2, 2), np.int64)
    step = np.array([[2**31 - 1, 1], [0, 2**31 - 5]], np.int32)
    for _ in range(3):
        total += step
    assert total[0, 0] == 3 * (2**31 - 1)
    # iou_0 = 3(2³¹−1) / (3·2³¹); float32 or int32 sums would be off
    np.testing.assert_allclose(ev.mean_iou(total).per_class[0], (2**31 - 1) / 2**31, rtol=1e-15)


def test_host_labels_are_checked():
    good, bad = np.array([[0, 1]]), np.array([[0, 2]])
    with pytest.raises(UserError, match=r"ground-truth label must be in 0\.\.1, but one is 2"):
        ev.confusion_matrix(bad, good, 2)
    with pytest.raises(UserError, match="predicted label"):
        ev.confusion_matrix(good, bad, 2)
    with pytest.raises(UserError, match="ignored label must not be a class"):
        ev.confusion_matrix(good, good, 459)
    assert ev.confusion_matrix(good, good, 459, None).sum() == 2


def test_device_labels_outside_are_dropped():
    true, pred = jnp.array([0, 1, 5, -1, 0]), jnp.array([0, 1, 0, 0, 7])
    np.testing.assert_array_equal(ev.confusion_matrix(true, pred, 2), [[1, 0], [0, 1]])


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_nothing_counted_is_nan_without_a_warning(convert):
    empty = convert(np.zeros((3, 3), np.int32))
    for scores in (ev.mean_iou(empty), ev.mean_accuracy(empty)):
        assert np.isnan(scores.per_class).all()
        assert np.isnan(scores.mean)
    assert np.isnan(ev.pixel_accuracy(empty))


def test_mean_iou_under_jit():
    confusion = np.array([[3, 1], [0, 0]], np.int32)
    scores = jax.jit(ev.mean_iou)(confusion)
    np.testing.assert_allclose(scores.per_class, [3 / 4, 0])


def test_seen_unseen_harmonic_by_hand():
    confusion = np.diag([8, 6, 2]) + np.array([[0, 2, 0], [0, 0, 2], [0, 0, 0]])
    # IoU: 8/10, 6/(8+8−6), 2/(2+4−2) = 0.8, 0.6, 0.5
    scores = ev.seen_unseen_harmonic(confusion, [2])
    np.testing.assert_allclose(scores, [0.7, 0.5, 2 * 0.7 * 0.5 / 1.2])
    scores = ev.seen_unseen_harmonic(jnp.asarray(confusion), (1, 2))
    np.testing.assert_allclose(scores, [0.8, 0.55, 2 * 0.8 * 0.55 / 1.35])


def test_seen_unseen_harmonic_at_the_edges():
    wrong_everywhere = np.array([[0, 4], [4, 0]])
    assert ev.seen_unseen_harmonic(wrong_everywhere, [1]) == (0, 0, 0)
    absent = np.array([[4, 0], [0, 0]])  # no unseen pixel: no unseen score, not a zero
    assert np.isnan(ev.seen_unseen_harmonic(absent, [1]).harmonic)
    for bad in ([], [0, 1], [2], [-1], [0, 0]):
        with pytest.raises(UserError, match="unseen classes"):
            ev.seen_unseen_harmonic(wrong_everywhere, bad)
