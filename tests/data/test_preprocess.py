"""Resize rules, padding, and the resampling matrices against scalar transcriptions of the formulas."""

import math

import numpy as np
import pytest
from PIL import Image

from maskclip_jax.data import preprocess as pp
from maskclip_jax.errors import UserError

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HF = {  # openai/clip-vit-base-patch16
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP["mean"]),
    "image_std": list(CLIP["std"]),
    "resample": 3,
    "size": 224,
}


def test_from_hf():
    result = pp.Preprocess.from_hf(HF)
    assert (result.mean, result.std, result.interpolation, result.image_size) == (*CLIP.values(), "bicubic", 224)
    assert (result.short_side, result.long_side, result.within) == (512, 2048, None)
    newer = HF | {"size": {"shortest_edge": 336}, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}
    result = pp.Preprocess.from_hf(newer, short_side=None)
    assert (result.image_size, result.interpolation, result.short_side) == (336, "bilinear", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [1, 2]}, "image_std"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 1}, "resample"),
        ({"size": {"height": 224, "width": 336}}, "size"),
        ({"image_mean": [123.675, 116.28, 103.53]}, "divide by 255"),
    ],
)
def test_from_hf_refuses(change, message):
    with pytest.raises(UserError, match=message):
        pp.Preprocess.from_hf(HF | change)


@pytest.mark.parametrize(
    ("size", "side"),
    [
        (None, None),
        (224, 224),
        ([224, 224], 224),
        ({"shortest_edge": 224}, 224),
        ({"shortest_edge": 224, "longest_edge": 336}, 224),
        ({"longest_edge": 336}, None),  # the side follows from the image
        ({"height": 96, "width": 96}, 96),
    ],
)
def test_sizes_of_all_kinds(size, side):
    assert pp.Preprocess.from_hf(HF | {"size": size}).image_size == side
    left_out = {key: value for key, value in HF.items() if key != "size"}
    assert pp.Preprocess.from_hf(left_out).image_size is None


ABSURD = [None, True, -1, 0, 1.5, 10**30, 1e308, "x", [], {}, [[]], ["x"] * 3, [True] * 3, [10**400] * 3]


@pytest.mark.parametrize("key", ["image_mean", "image_std", "resample", "size", "rescale_factor", "do_normalize"])
def test_absurd_values_are_one_line(key):
    legal = [("size", None), ("do_normalize", None), ("do_normalize", True), ("rescale_factor", None)]
    for value in ABSURD:
        if (key, value) not in legal:
            with pytest.raises(UserError, match=r"^.{1,300}$"):
                pp.Preprocess.from_hf(HF | {key: value})


@pytest.mark.parametrize("missing", ["image_mean", "image_std", "resample"])
def test_from_hf_needs_its_keys(missing):
    with pytest.raises(UserError, match=f"lacks {missing}"):
        pp.Preprocess.from_hf({key: value for key, value in HF.items() if key != missing})


def test_from_open_clip():
    assert pp.Preprocess.from_open_clip({k: list(v) for k, v in CLIP.items()}) == pp.Preprocess(**CLIP)
    full = CLIP | {"size": [240, 240], "mode": "RGB", "interpolation": "bilinear", "resize_mode": "shortest"}
    result = pp.Preprocess.from_open_clip(full | {"fill_color": 0})
    assert (result.image_size, result.interpolation) == (240, "bilinear")
    for bad, message in (
        (full | {"speed": 1}, "speed"),
        ({"mean": CLIP["mean"]}, "lacks std"),
        (full | {"mode": "L"}, "RGB"),
        (full | {"interpolation": "random"}, "random"),
    ):
        with pytest.raises(UserError, match=message):
            pp.Preprocess.from_open_clip(bad)


def test_a_size_rule_is_one_rule():
    with pytest.raises(UserError, match="short_side or within"):
        pp.Preprocess(**CLIP, within=(520, 520))
    with pytest.raises(UserError, match="at least one pixel"):
        pp.Preprocess(**CLIP, short_side=0)


@pytest.mark.parametrize(
    ("size", "rule", "expected"),
    [
        ((375, 500), {"short_side": 512, "long_side": 2048}, (512, 683)),  # VOC: 500·512/375 = 682.67
        ((500, 375), {"short_side": 512, "long_side": 2048}, (683, 512)),
        ((100, 1000), {"short_side": 512, "long_side": 2048}, (205, 2048)),  # the long side caps: 100·2.048 = 204.8
        ((375, 500), {"within": (520, 520)}, (390, 520)),  # Pascal Context
        ((500, 333), {"within": (520, 520)}, (520, 346)),  # 333·1.04 = 346.32
        ((37, 501), {}, (37, 501)),
        ((37, 501), {"long_side": 100}, (7, 100)),
        ((1, 1), {"short_side": 512, "long_side": 2048}, (512, 512)),
        ((1, 5000), {"short_side": 512, "long_side": 2048}, (1, 2048)),
    ],
)
def test_resize_shape(size, rule, expected):
    assert pp.resize_shape(*size, **rule) == expected


def test_prepare_normalises_then_pads_with_zeros():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    image = pp.prepare(rgb, pp.Preprocess(**CLIP, short_side=None), 4)
    assert (image.pixels.shape, image.valid, image.original) == ((8, 8, 3), (5, 7), (5, 7))
    assert image.pixels.dtype == np.float32
    expected = (rgb / 255 - np.array(CLIP["mean"])) / np.array(CLIP["std"])
    np.testing.assert_allclose(image.pixels[:5, :7], expected, atol=1e-6)
    assert not image.pixels[5:].any()
    assert not image.pixels[:, 7:].any()


def test_prepare_resizes_as_clip_does():
    rgb = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    rule = pp.Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), short_side=12, multiple=8)
    image = pp.prepare(rgb, rule)
    assert (image.pixels.shape, image.valid, image.original) == ((16, 16, 3), (12, 16), (30, 40))
    expected = np.asarray(Image.fromarray(rgb).resize((16, 12), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(image.pixels[:12], expected / 255, atol=1e-6)


def test_pad_image_keeps_what_it_holds():
    image = pp.prepare(np.full((3, 4, 3), 200, np.uint8), pp.Preprocess(**CLIP, short_side=None), 4)
    padded = pp.pad_image(image, (8, 12))
    assert (padded.pixels.shape, padded.valid) == ((8, 12, 3), (3, 4))
    np.testing.assert_array_equal(padded.pixels[:4, :4], image.pixels)
    assert not padded.pixels[4:].any()
    with pytest.raises(ValueError, match="at least its own"):
        pp.pad_image(padded, (4, 12))


def _keys_scalar(x, a=-0.75):
    """Keys (1981), equation 4 with a free a."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def _bicubic_scalar(signal, n_out):
    n_in, result = len(signal), []
    for i in range(n_out):
        centre = (i + 0.5) * n_in / n_out - 0.5
        total = 0.0
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            total += _keys_scalar(centre - j) * signal[min(max(j, 0), n_in - 1)]
        result.append(total)
    return np.array(result)


def _bilinear_scalar(signal, n_out):
    n_in, result = len(signal), []
    for i in range(n_out):
        centre = max((i + 0.5) * n_in / n_out - 0.5, 0.0)
        j = math.floor(centre)
        after = min(j + 1, n_in - 1)
        result.append((1 - (centre - j)) * signal[j] + (centre - j) * signal[after])
    return np.array(result)


@pytest.mark.parametrize("sizes", [(4, 6), (4, 10), (14, 32), (7, 3), (24, 5), (1, 5), (5, 1), (2, 9)])
def test_interpolation_matrix_against_the_scalar_formula(sizes):
    signal = np.random.default_rng(0).normal(size=sizes[0])
    for method, scalar in (("bicubic", _bicubic_scalar), ("bilinear", _bilinear_scalar)):
        matrix = pp.interpolation_matrix(*sizes, method=method)
        assert matrix.dtype == np.float32
        assert matrix.shape == sizes[::-1]
        np.testing.assert_allclose(matrix @ signal, scalar(signal, sizes[1]), atol=1e-6)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)  # a constant stays a constant


# torch.nn.functional.interpolate(tensor([[[[1., 2., 4., 8.]]]]), size=(1, 6), mode=…, align_corners=False): computed by
# hand from its definition: centres (i + ½)·4/6 − ½ = −1/6, ½, 7/6, 11/6, 5/2, 19/6.
def test_interpolation_matrix_by_hand():
    signal = np.array([1.0, 2.0, 4.0, 8.0])
    bilinear = pp.interpolation_matrix(4, 6) @ signal
    np.testing.assert_allclose(bilinear, [1, 1.5, 2 + 2 / 6, 4 - 2 / 6, 6, 8], atol=1e-6)
    # at ½: weights −3/32·(1, −19/3…): Keys(3/2) = −0.09375, Keys(1/2) = 0.59375
    half = -0.09375 * (1 + 4) + 0.59375 * (1 + 2)
    assert (pp.interpolation_matrix(4, 6, method="bicubic") @ signal)[1] == pytest.approx(half, abs=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_same_size_is_the_identity(method):
    np.testing.assert_array_equal(pp.interpolation_matrix(7, 7, method=method), np.eye(7, dtype=np.float32))


@pytest.mark.parametrize(("valid", "patch"), [(520, 16), (37, 8), (5, 8), (64, 16), (33, 32)])
def test_upsample_and_crop(valid, patch):
    """At the original size it is: upsample the padded grid to padded pixels, then crop."""
    grid = -(-valid // patch)
    direct = pp.interpolation_matrix(grid, grid * patch)[:valid]
    np.testing.assert_allclose(pp.upsample_matrix(grid, patch, valid, valid), direct, atol=1e-6)


def test_upsample_to_another_size_keeps_places():
    """A ramp over the grid is a ramp over the original: value = position, wherever the border does not clamp."""
    grid, patch, valid, original = 8, 16, 120, 75
    ramp = (np.arange(grid) + 0.5) * patch  # the position of each cell's centre in the resized image
    got = pp.upsample_matrix(grid, patch, valid, original) @ ramp
    places = (np.arange(original) + 0.5) * valid / original
    np.testing.assert_allclose(got, np.clip(places, ramp[0], ramp[-1]), rtol=1e-5)


def test_released_stretch_is_off_by_the_padding():
    """method.md §5: 520 px are 33 patches = 528 px, and the released code squeezes these 528 px into 520."""
    ramp = (np.arange(33) + 0.5) * 16
    aligned = pp.upsample_matrix(33, 16, 520, 520) @ ramp
    stretched = pp.upsample_matrix(33, 16, 520, 520, aligned=False) @ ramp
    np.testing.assert_allclose(stretched, pp.interpolation_matrix(33, 520) @ ramp)
    error = np.abs(stretched - aligned)[8:-16]
    assert 7.5 < error.max() <= 8
    np.testing.assert_allclose(aligned[8:-16], np.arange(8, 504) + 0.5, rtol=1e-5)


def test_columns_of_a_bucket_weigh_nothing():
    narrow = pp.upsample_matrix(5, 8, 37, 37)
    wide = pp.upsample_matrix(5, 8, 37, 37, columns=9)
    np.testing.assert_array_equal(wide[:, :5], narrow)
    assert not wide[:, 5:].any()
    for arguments, message in (((4, 8, 37, 37), "cover"), ((5, 8, 37, 37), "hold the grid")):
        with pytest.raises(ValueError, match=message):
            pp.upsample_matrix(*arguments, columns=4)


@pytest.mark.parametrize("size", [(7, 9), (64, 20), (33, 100), (1, 1), (40, 50)])
def test_opencv_resize_is_bilinear_without_antialias(size):
    """Two samples a pixel along each axis, whatever the scale; in fixed point it is off by one at most."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    got = pp.resize_as_opencv(picture, size)
    rows, columns = (pp.interpolation_matrix(n, m) for n, m in zip((40, 50), size, strict=True))
    exact = np.einsum("yh,xw,hwc->yxc", rows, columns, picture)
    assert got.shape == (*size, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - exact).max() <= 1
    if size == (40, 50):
        np.testing.assert_array_equal(got, picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_opencv_resize_of_the_smallest_images(shape):
    picture = np.full((*shape, 3), 201, np.uint8)
    assert set(np.unique(pp.resize_as_opencv(picture, (9, 11)))) <= {200, 201}
    white = np.full((*shape, 3), 255, np.uint8)
    assert (pp.resize_as_opencv(white, (9, 11)) >= 254).all()


def test_upsampling_in_two_steps():
    """The released code: grid -> pixels of the resized image -> pixels of the original."""
    first, second = pp.upsample_matrix(5, 8, 37, 37, aligned=False), pp.interpolation_matrix(37, 91)
    got = pp.upsample_matrix(5, 8, 37, 91, aligned=False, steps=2, columns=6)
    np.testing.assert_allclose(got[:, :5], second @ first, atol=1e-6)
    assert not got[:, 5:].any()
    assert np.abs(got[:, :5] - pp.upsample_matrix(5, 8, 37, 91, aligned=False)).max() > 0.01
    np.testing.assert_array_equal(pp.upsample_matrix(5, 8, 37, 37, steps=2), pp.upsample_matrix(5, 8, 37, 37))
    with pytest.raises(ValueError, match="cover"):
        pp.upsample_matrix(3, 8, 37, 37, partial=True)
    assert pp.upsample_matrix(4, 8, 37, 37, partial=True).shape == (37, 4)
