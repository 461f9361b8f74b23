"""The corruptions against the outputs of the reference (golden/make_corruptions.py), or their definitions."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskclip_jax.data.corruptions.corrupt as corruptions
from maskclip_jax.data.corruptions.corrupt import CORRUPTIONS, LEVELS, corrupt, corrupt_batch
from maskclip_jax.data.corruptions.jpeg import quantisation_tables
from maskclip_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "corruptions.npz", allow_pickle=False)
KEY = jax.random.key(0)
LEVEL_NUMBERS = jnp.arange(1, 6)


def every_level(name: str, monkeypatch) -> np.ndarray:
    """All levels of the golden picture with the golden noise, by `vmap`."""
    noise = {"gaussian_noise": "normal_image", "speckle_noise": "normal_image", "spatter": "normal_plane"}
    if name in noise:
        monkeypatch.setitem(corruptions._DRAWS, name, lambda key, shape: jnp.asarray(GOLDEN[noise[name]]))
    return np.asarray(jax.jit(jax.vmap(lambda level: corrupt(GOLDEN["image"], name, level, KEY)))(LEVEL_NUMBERS))


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise", "gaussian_blur", "defocus_blur", "spatter"])
def test_pixels_are_those_of_the_reference(name, monkeypatch):
    found, expected = every_level(name, monkeypatch).astype(int), GOLDEN[name].astype(int)
    difference = np.abs(found - expected)
    assert difference.max() <= (1 if name != "spatter" else 4)  # a shade of water that rounds the other way
    assert difference.mean() < (0.05 if name == "defocus_blur" else 0.005)
    assert np.abs(expected - GOLDEN["image"]).mean() > 1  # and they have done something


def test_jpeg_is_that_of_libjpeg(monkeypatch):
    """Coefficients that lie between two steps may fall to the other side (libjpeg's DCT is one of integers)."""
    difference = np.abs(every_level("jpeg", monkeypatch).astype(int) - GOLDEN["jpeg_compression"])
    assert (difference == 0).mean(axis=(1, 2, 3)).min() > 0.8
    assert difference.mean(axis=(1, 2, 3)).max() < 0.7


def test_quantisation_tables():
    """Quality 50 is Annex K's, 100 all ones, 25 twice Annex K's (at most 255)."""
    assert quantisation_tables(50)[0, 0].tolist() == [16, 11, 10, 16, 24, 40, 51, 61]
    assert (quantisation_tables(100) == 1).all()
    np.testing.assert_array_equal(quantisation_tables(25), np.minimum(2 * quantisation_tables(50), 255))


@pytest.mark.parametrize("level", [1, 5])
def test_shot_noise_counts_photons(level):
    photons = LEVELS["shot_noise"][level - 1]
    x = jnp.full((64, 64, 3), 0.4)
    found = np.asarray(corruptions.shot_noise(x, jnp.asarray(level), KEY))
    counts = found * photons
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    assert abs(found.mean() - 0.4) < 5 * np.sqrt(0.4 / photons / found.size)
    assert abs(found.var() / (0.4 / photons) - 1) < 0.08


@pytest.mark.parametrize("level", [1, 5])
def test_impulse_noise_is_black_or_white(level):
    share = LEVELS["impulse_noise"][level - 1]
    found = np.asarray(corrupt(np.full((96, 96, 3), 100, np.uint8), "impulse_noise", level, KEY))
    hit = found != 100
    assert set(np.unique(found[hit])) == {0, 255}
    assert abs(hit.mean() - share) < 5 * np.sqrt(share / found.size)
    assert abs((found[hit] == 255).mean() - 0.5) < 0.1
    assert (hit.any(-1) & ~hit.all(-1)).any()  # channels are struck one by one


def test_keys_and_batches():
    images = np.stack([GOLDEN["image"][:16, :16]] * 2)
    first, second = np.asarray(corrupt_batch(images, "gaussian_noise", 2, KEY))
    assert (first != second).any()
    again = np.asarray(corrupt_batch(images, "gaussian_noise", 2, KEY))
    np.testing.assert_array_equal(again, [first, second])
    assert (np.asarray(corrupt_batch(images, "gaussian_noise", 2, jax.random.key(1))) != again).any()


def test_higher_levels_change_more():
    """Every kind at once; the level is traced, so each kind is one program."""
    for name in ("shot_noise", "impulse_noise"):
        found = np.asarray(jax.vmap(lambda level, name=name: corrupt(GOLDEN["image"], name, level, KEY))(LEVEL_NUMBERS))
        change = np.abs(found.astype(int) - GOLDEN["image"]).mean(axis=(1, 2, 3))
        assert (np.diff(change) > 0).all(), name


def test_there_are_eight_with_five_levels():
    assert len(CORRUPTIONS) == 8
    assert all(len(levels) == 5 for levels in LEVELS.values())


@pytest.mark.parametrize(("name", "level"), [("rain", 1), ("jpeg", 0), ("jpeg", 6)])
def test_one_line_for_what_is_none(name, level):
    with pytest.raises(UserError, match="a corruption") as error:
        corrupt(GOLDEN["image"], name, level, KEY)
    assert "\n" not in str(error.value)
