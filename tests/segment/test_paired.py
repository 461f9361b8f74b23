"""A second backbone beside a CLIP: where its S enters each kind of tower, and that pictures of any size agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_clip import compiled_apply, random_pretrained, random_variables

from maskclip_jax.checkpoints.pretrained import Reading
from maskclip_jax.encoders.config import SIGLIP_VIT, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError
from maskclip_jax.segment.affinity import pooling_weights, proxy_attention
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.paired import paired
from maskclip_jax.segment.predict import segment_images
from maskclip_jax.segment.propagation import lposs

TEXT = TextConfig(vocab_size=64, context_length=40, width=16, layers=1, heads=2, mlp_width=32)
VIT = ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32)
TOWERS = {
    "vit": VIT,
    "pooling head": dataclasses.replace(VIT, **SIGLIP_VIT),
    "resnet": ResNetConfig(image_size=64, width=4, layers=(1, 1, 1, 1), heads=4, dense_stride=16),
}
ASKING = [name for name, method in METHODS.items() if method.affinity]
CLASSES = "a; b; c"


def backbone(patch_size, seed=7):
    """A ViT of other patches, sizes and statistics, as `load_backbone` gives it."""
    vision = ViTConfig(image_size=20, patch_size=patch_size, width=12, layers=1, heads=2, mlp_width=16)
    other = random_pretrained(CLIPConfig(vision, TEXT, 12), list, seed=seed, reading=Reading())
    return dataclasses.replace(other, preprocess=dataclasses.replace(other.preprocess, mean=(0.5, 0.4, 0.3)))


@functools.cache
def reader(config, name):
    options = dataclasses.asdict(METHODS[name])
    return jax.jit(lambda v, x, a: CLIP(config).apply(v, x, affinity=a, method="encode_dense", **options).features)


def read(config, name, affinity=None):
    """Features of two images of 2 × 2 cells, by a preset, of the tower alone."""
    side = 2 * config.stride
    images = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    return np.asarray(reader(config, name)(random_variables(config), images, affinity)).reshape(2, 4, -1)


@pytest.mark.parametrize("tower", TOWERS)
def test_where_the_matrix_enters(tower):
    """One that exchanges patches exchanges their features; one that averages all values leaves one feature."""
    config = CLIPConfig(TOWERS[tower], TEXT, 16)
    order = np.array([2, 0, 3, 1])
    own, exchange = (jnp.broadcast_to(jnp.eye(4)[rows], (2, 4, 4)) for rows in (np.arange(4), order))
    values = read(config, "proxyclip", own)
    np.testing.assert_allclose(read(config, "proxyclip", exchange), values[:, order], atol=1e-5)
    if tower == "vit":
        np.testing.assert_allclose(values, read(config, "values"), atol=1e-5)
        plain = read(config, "maskclip")
        np.testing.assert_allclose(read(config, "clip_dinoiser", exchange), plain[:, order], atol=1e-5)
    mean = read(config, "proxyclip", jnp.full((2, 4, 4), 0.25))
    np.testing.assert_allclose(mean, np.broadcast_to(mean[:, :1], mean.shape), atol=1e-5)
    assert np.abs(mean - values).max() > 0.01


def test_features_are_pooled_before_they_are_normalised():
    config = CLIPConfig(VIT, TEXT, 16)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16, 16, 3)), jnp.float32)
    dense = lambda m, x: m.visual.dense(x, None)[0]  # noqa: E731
    raw = np.asarray(compiled_apply(CLIP(config), random_variables(config), images, method=dense)).reshape(2, 4, -1)
    weights = np.random.default_rng(2).dirichlet(np.ones(4), size=(2, 4)).astype(np.float32)
    wanted = weights @ raw
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(read(config, "clip_dinoiser", jnp.asarray(weights)), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ASKING)
def test_a_pair_shows_both_towers_the_same_picture(pretrained, name):
    """Patches of one size, so that nothing is resized, and images normalised for each."""
    clip, other = pretrained("vit"), backbone(8)
    pictures = np.random.default_rng(3).uniform(size=(2, 16, 24, 3)).astype(np.float32)
    ours, theirs = (jnp.asarray((pictures - p.preprocess.mean) / p.preprocess.std, jnp.float32) for p in (clip, other))
    both, reading = paired(clip, name, other), dataclasses.asdict(METHODS[name])
    apply = jax.jit(lambda v, x: both.model.apply(v, x, method="encode_dense", **reading).features)
    found = apply(both.variables, ours)
    tokens = compiled_apply(other.model, other.variables, theirs, method="encode_tokens")
    make = {"proxyclip": proxy_attention, "clip_dinoiser": pooling_weights}.get(name)
    affinity = jax.jit(make)(tokens) if make else None
    own = reading | {"propagate": False}
    read = jax.jit(lambda v, x, a: clip.model.apply(v, x, method="encode_dense", **own | {"affinity": a}).features)
    wanted = read(clip.variables, ours, affinity)
    wanted = wanted if make else jax.jit(functools.partial(lposs, cell=8))(wanted, tokens)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name"), [("vit", "lposs"), pytest.param("resnet", "proxyclip", marks=pytest.mark.slow)]
)
def test_another_patch_size_in_a_padded_batch(pretrained, kind, name):
    """Patches of 5 beside cells of 8 or 16 pixels: each image gets what it gets alone."""
    pair, reading = paired(pretrained(kind), name, backbone(5)), dataclasses.asdict(METHODS[name])
    stride, rng = pair.config.stride, np.random.default_rng(4)
    read = jax.jit(lambda v, x, grid: pair.model.apply(v, x, grid=grid, method="encode_dense", **reading).features)
    image = rng.normal(size=(1, 2 * stride, 3 * stride, 3)).astype(np.float32)
    batch = np.full((2, 4 * stride, 3 * stride, 3), 7, np.float32)
    batch[0, : 2 * stride] = image
    padded = read(pair.variables, batch, np.array([[2, 3], [4, 2]]))
    np.testing.assert_allclose(padded[0, :2], read(pair.variables, image, None)[0], atol=1e-4)
    assert np.isfinite(padded).all()


def test_images_and_windows_of_any_size(pretrained, images):
    clip, pictures = pretrained("vit"), images((30, 45))
    options = {"method": "clip_dinoiser", "affinity": backbone(5), "return_probabilities": True}
    (whole,) = segment_images(pictures, CLASSES, clip, **options)
    (plain,) = segment_images(pictures, CLASSES, clip, return_probabilities=True)
    (window,) = segment_images(pictures, CLASSES, clip, window=32, **options)
    for other in (plain, window):
        assert np.abs(whole.probabilities - other.probabilities).max() > 1e-3


def test_spreading_over_pixels_needs_no_backbone(pretrained, images):
    clip, (picture,) = pretrained("vit"), images((32, 40))
    picture[:] = 40
    picture[:, 20:] = 220  # two colours: the masks become two
    (spread,) = segment_images([picture], CLASSES, clip, spread=30)
    halves = spread.labels[:, :20], spread.labels[:, 20:]
    assert all(len(np.unique(half)) == 1 for half in halves)


def test_what_does_not_go_together_is_one_line(pretrained):
    cases = {
        "add --affinity": {"method": "lposs"},
        "leave it out": {"affinity": "embedded"},
        "whole number": {"spread": -1},
    }
    for line, options in cases.items():
        with pytest.raises(UserError, match=line):
            Options(**options)
    for other in ("embedded-resnet", pretrained("resnet")):
        with pytest.raises(UserError, match="ResNet"):
            paired(pretrained("vit"), "lposs", other)
    with pytest.raises(UserError, match="add --affinity"):
        read(CLIPConfig(VIT, TEXT, 16), "proxyclip")
