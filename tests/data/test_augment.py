"""Augmentation: hand-worked pixels, colorsys as the judge of colours, and keys that decide everything."""

import colorsys
import dataclasses

import numpy as np
import pytest

from maskclip_jax.data.augment import (
    AugmentConfig,
    augment,
    example_rng,
    pad,
    photometric_distortion,
    random_crop,
    random_scale,
    resize,
    scale_saturation,
    turn_hue,
)
from maskclip_jax.data.preprocess import resize_as_opencv

STILL = AugmentConfig(scale=(1.0, 1.0), flip=0.0, category_max_ratio=1.0, photometric=False)


def picture(height=20, width=30, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return image, rng.integers(0, 5, (height, width)).astype(np.int32)


def test_nothing_but_padding():
    image, labels = picture()
    out, out_labels = augment(image, labels, example_rng(0, 0, 0), STILL, crop_size=32, fill=(9, 8, 7))
    assert (out.shape, out.dtype, out_labels.shape, out_labels.dtype) == ((32, 32, 3), np.uint8, (32, 32), np.int32)
    np.testing.assert_array_equal(out[:20, :30], image)
    np.testing.assert_array_equal(out_labels[:20, :30], labels)
    assert (out[20:] == [9, 8, 7]).all()
    assert (out[:, 30:] == [9, 8, 7]).all()
    assert (out_labels[20:] == 255).all()
    assert (out_labels[:, 30:] == 255).all()


def test_the_key_decides():
    image, labels = picture(60, 70)
    config = AugmentConfig()
    draw = lambda *key: augment(image, labels, example_rng(*key), config, crop_size=40)  # noqa: E731
    first = draw(1, 2, 3)
    for a, b in zip(first, draw(1, 2, 3), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert any((a != b).any() for a, b in zip(first, draw(*other), strict=True)), other


def test_label_maps_share_the_geometry():
    """Labels that are a function of the image's own pixels stay that function, through scale 1, crops and flips."""
    image, _ = picture(50, 60)
    image[..., 2] = np.arange(60)  # a column knows where it was
    labels = np.stack([image[..., 0] // 64, image[..., 0] // 32], -1).astype(np.int32)
    config = dataclasses.replace(STILL, flip=0.5)
    flips = 0
    for index in range(20):
        out, maps = augment(image, labels, example_rng(0, 0, index), config, crop_size=24)
        assert maps.shape == (24, 24, 2)
        np.testing.assert_array_equal(maps[..., 0], out[..., 0] // 64)
        np.testing.assert_array_equal(maps[..., 1], out[..., 0] // 32)
        flips += out[0, 0, 2] > out[0, 1, 2]
    assert 3 < flips < 17


def test_scale_follows_the_short_side_and_its_cap():
    image, labels = picture(20, 100)
    for config, wanted in (
        (dataclasses.replace(STILL, scale=(2.0, 2.0)), (40, 200)),
        (dataclasses.replace(STILL, scale=(0.5, 0.5), short_side=40, long_side=1000), (20, 100)),
        (dataclasses.replace(STILL, scale=(1.5, 1.5), short_side=40, long_side=100), (30, 150)),  # 150 = 1.5 · 100
        (dataclasses.replace(STILL, scale=(1.0, 1.0), within=(520, 520)), (104, 520)),
        (dataclasses.replace(STILL, scale=(0.5, 0.5), within=(520, 520)), (52, 260)),
        (dataclasses.replace(STILL, scale=(2.0, 2.0), within=(10, 520)), (20, 100)),
    ):
        out, out_labels = random_scale(image, labels, np.random.default_rng(0), config)
        assert out.shape[:2] == out_labels.shape == wanted


def test_scales_are_drawn_from_the_whole_range():
    image, labels = picture(100, 100)
    config = dataclasses.replace(STILL, scale=(0.5, 2.0))
    sides = [random_scale(image, labels, example_rng(0, 0, i), config)[0].shape[0] for i in range(60)]
    assert 50 <= min(sides) < 70
    assert 180 < max(sides) <= 200


def test_the_released_resize_is_opencvs():
    image, labels = picture(20, 30)
    opencv = dataclasses.replace(STILL, scale=(0.5, 0.5), interpolation="opencv")
    out, small = random_scale(image, labels, np.random.default_rng(0), opencv)
    np.testing.assert_array_equal(out, resize_as_opencv(image, (10, 15)))
    plain, same = random_scale(image, labels, np.random.default_rng(0), dataclasses.replace(STILL, scale=(0.5, 0.5)))
    np.testing.assert_array_equal(small, same)
    assert (out != plain).any()


def test_labels_are_resized_to_the_nearest():
    labels = np.array([[0, 1], [2, 255]])
    image = np.zeros((2, 2, 3), np.uint8)
    np.testing.assert_array_equal(resize(image, labels, (4, 4))[1], labels.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(resize(image, labels, (3, 2))[1], [[0, 1], [2, 255], [2, 255]])  # ties go up


def test_a_crop_is_drawn_again_while_one_class_rules():
    """One class fills all but a corner: with retries the corner is in the crop far more often than without."""
    labels = np.zeros((40, 40), np.int32)
    labels[:16, :16] = 1
    image = np.zeros((40, 40, 3), np.uint8)

    def mixed(ratio):
        shares = []
        for i in range(200):
            _, crop = random_crop(image, labels, example_rng(0, 0, i), size=12, category_max_ratio=ratio, retries=10)
            shares.append(max((crop == 0).mean(), (crop == 1).mean()))
        return np.mean(np.array(shares) <= 0.75)

    plain = mixed(1.0)
    assert 0.02 < plain < 0.3
    assert mixed(0.75) > 1 - 2 * (1 - plain) ** 11 > plain


def windows(labels, tries=60, **options):
    """Label crops of 12 pixels, each from a generator of its own."""
    image = np.zeros((*labels.shape, 3), np.uint8)
    options = {"size": 12, "category_max_ratio": 0.75} | options
    return [random_crop(image, labels, example_rng(0, 0, i), **options)[1] for i in range(tries)]


@pytest.mark.parametrize("other", [0, 254])
def test_unlabelled_pixels_are_one_class(other):
    """Left half of one class, right half of another or unlabelled: a crop across the border is looked for."""
    labels = np.full((12, 60), 3, np.int32)
    labels[:, 30:] = other
    mixed = lambda crops: np.mean([0.25 <= (crop == 3).mean() <= 0.75 for crop in crops])  # noqa: E731
    assert mixed(windows(labels, category_max_ratio=1.0)) < 0.3
    assert mixed(windows(labels)) > 0.75
    assert (mixed(windows(labels, count_unlabelled=False)) > 0.75) == (other == 0)


def test_a_crop_wants_two_classes():
    """Ten small patches of one class each: no class may have more than all of a crop, so that only the count tells."""
    labels = np.full((12, 120), 255, np.int32)
    for i in range(10):
        labels[:, 12 * i : 12 * i + 3] = i % 5
    two = lambda crops: np.mean([len(set(np.unique(crop)) - {255}) == 2 for crop in crops])  # noqa: E731
    loose = {"category_max_ratio": 0.9999}
    assert two(windows(labels, **loose, least_classes=1)) > 0.8  # a share of all is one class: drawn again too
    assert two(windows(labels, **loose, least_classes=3)) < 0.5  # there is none with three: the last draw stays
    assert two(windows(labels, category_max_ratio=1.0)) < 0.5


@pytest.mark.parametrize(("ratio", "draws"), [(0.75, 11), (1.0, 1)])
def test_ignored_pixels_are_no_class(ratio, draws):
    """A class beside nothing but 255 has every crop to itself: ten more are drawn, and the last one stays."""
    labels = np.full((12, 60), 255, np.int32)
    labels[:, :30] = 3
    drawn = []

    class Counting(np.random.Generator):
        def integers(self, high):
            drawn.append(high)
            return 0

    random_crop(
        np.zeros((12, 60, 3), np.uint8), labels, Counting(np.random.PCG64(0)), size=12, category_max_ratio=ratio
    )
    assert drawn == [1, 49] * draws


def test_saturation_and_hue_are_those_of_hsv():
    image, _ = picture(6, 7, seed=3)
    image[0, 0] = image[0, 1] = 0
    image[0, 2] = 200  # grey has no hue
    pixels = image.astype(np.float32)
    for factor in (0.5, 1.0, 1.5):
        expected = _in_hsv(pixels, lambda h, s, v, f=factor: (h, min(1, s * f), v))
        np.testing.assert_allclose(scale_saturation(pixels, factor), expected, atol=1e-3)
    for degrees in (-36.0, 0.0, 10.0, 180.0):
        expected = _in_hsv(pixels, lambda h, s, v, d=degrees: ((h + d / 360) % 1, s, v))
        np.testing.assert_allclose(turn_hue(pixels, degrees), expected, atol=2e-3)


def _in_hsv(pixels, change):
    out = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(p / 255)))) for p in pixels.reshape(-1, 3).astype(float)]
    return 255 * np.array(out).reshape(pixels.shape)


def test_distortion_is_itself_without_range_and_each_part_comes_half_the_time():
    image, _ = picture(8, 8)
    still = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    for i in range(8):
        out = photometric_distortion(image, example_rng(0, 0, i), **still)
        assert np.abs(out.astype(int) - image).max() <= 1
    for part in ({"brightness": 32.0}, {"contrast": (0.5, 0.6)}, {"saturation": (0.5, 0.6)}, {"hue": 36.0}):
        changed = [
            np.abs(photometric_distortion(image, example_rng(0, 0, i), **(still | part)).astype(int) - image).max() > 1
            for i in range(60)
        ]
        assert 15 < sum(changed) < 45, part


def test_brightness_and_contrast_clip():
    image = np.array([[[0, 128, 255]]], np.uint8)
    still = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0}
    outs = {
        tuple(photometric_distortion(image, example_rng(0, 0, i), **(still | {"contrast": (1.5, 1.5)})).ravel())
        for i in range(20)
    }
    assert outs == {(0, 128, 255), (0, 192, 255)}


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (1, 1)])
def test_pad_fills_the_square(shape):
    image, labels = picture(*shape)
    square, padded = pad(image, labels, 5)
    assert square.shape == (5, 5, 3)
    assert (padded == 255).sum() == 25 - shape[0] * shape[1]
