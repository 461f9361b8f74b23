"""Images of several sizes in one padded batch come out as they would alone, whatever the padding holds: in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_clip import random_variables

from maskclip_jax.checkpoints import architecture
from maskclip_jax.encoders.config import CLIPConfig, Fidelity, ViTConfig, variant
from maskclip_jax.encoders.model import CLIP

READINGS = [("vit", None), ("resnet", 32), ("resnet", 16), ("resnet", 8)]


def at_stride(config, dense_stride):
    if dense_stride is None:
        return config
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, dense_stride=dense_stride))


def dense(config, attention="value"):
    """`encode_dense` in the dtype of the images: in float64 what differs by 1e-10 is not rounding."""
    reading = {"attention": attention, "method": "encode_dense"}
    return jax.jit(lambda v, x, grid=None: CLIP(config, x.dtype).apply(v, x, grid=grid, **reading))


@pytest.mark.parametrize("attention", ["value", "qk"])
@pytest.mark.parametrize(("kind", "dense_stride"), READINGS)
def test_padding_changes_nothing_inside(checkpoints, kind, dense_stride, attention):
    config, variables = checkpoints.random_clip(kind)
    config = at_stride(config, dense_stride)
    unit = config.multiple  # images are padded to this already; the batch pads them further, to the bucket
    rng = np.random.default_rng(2)
    sizes, bucket = [(2 * unit, 3 * unit), (3 * unit, unit)], (3 * unit, 4 * unit)
    images = [rng.normal(size=(*size, 3)) for size in sizes]
    batch = np.full((2, *bucket, 3), 7.0)  # not zeros: nothing of it may reach the image
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    grid = jnp.asarray(sizes) // config.stride
    with jax.enable_x64(True):
        variables, apply = jax.tree.map(np.float64, variables), dense(config, attention)
        padded = apply(variables, jnp.asarray(batch), grid)
        for i, image in enumerate(images):
            alone = apply(variables, jnp.asarray(image)[None])
            h, w = np.asarray(grid[i])
            assert alone.features.shape[1:3] == (h, w)
            np.testing.assert_allclose(padded.features[i, :h, :w], alone.features[0], atol=1e-10)
            keys = padded.keys[i].reshape(bucket[0] // config.stride, -1, padded.keys.shape[-1])[:h, :w]
            expected = alone.keys[0].reshape(h, w, -1)
            assert np.abs(keys - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("dense_stride", [32, 8])
def test_a_resnet_reads_images_unpadded(checkpoints, dense_stride):
    """The released habit: odd sides are no multiples of anything, alone and in a padded batch, which still masks."""
    config, variables = checkpoints.random_clip("resnet")
    config = dataclasses.replace(at_stride(config, dense_stride), fidelity=Fidelity(resnet_input="unpadded"))
    assert config.multiple == 1
    sizes = [(70, 95), (61, 127)]
    rng = np.random.default_rng(4)
    images = [rng.normal(size=(*size, 3)) for size in sizes]
    batch = np.full((2, 96, 128, 3), 7.0)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    with jax.enable_x64(True):
        variables, apply = jax.tree.map(np.float64, variables), dense(config)
        padded = apply(variables, jnp.asarray(batch), jnp.asarray(sizes))
        for i, image in enumerate(images):
            alone = apply(variables, jnp.asarray(image)[None]).features[0]
            h, w = (config.cells(side) for side in image.shape[:2])
            assert alone.shape[:2] == (h, w) == tuple(((n + 1) // 2) // (dense_stride // 2) for n in image.shape[:2])
            np.testing.assert_allclose(padded.features[i, :h, :w], alone, atol=1e-10)


def test_cells_of_an_unpadded_image():
    released = dataclasses.replace(variant("RN50"), fidelity=Fidelity.released())
    assert [released.cells(n) for n in (512, 683, 31, 30, 2048)] == [16, 21, 1, 0, 64]
    assert [released.padded(n) for n in (683, 31, 1)] == [683, 32, 32]
    assert [variant("RN50").cells(n) for n in (1, 16)] == [1, 16]
    assert [variant("RN50").padded(n) for n in (683, 31, 1)] == [704, 32, 32]
    vit = dataclasses.replace(variant("ViT-L/14"), fidelity=Fidelity.released())
    assert (vit.multiple, vit.cells(5), vit.padded(15)) == (14, 5, 28)


@pytest.mark.parametrize("dense_stride", [8, 16, 32])
def test_a_finer_stride_of_the_resnet(checkpoints, dense_stride):
    """Shape; the same features for an image moved by one cell (away from the borders); the same weights throughout."""
    config, variables = checkpoints.random_clip("resnet")
    config = at_stride(config, dense_stride)
    rng = np.random.default_rng(3)
    # The receptive field of this ResNet is below 300 px a side: only at the centre does no border play a role.
    wide = jnp.asarray(rng.normal(size=(1, 448, 448 + 32, 3)), jnp.float32)
    apply = dense(config)
    left, right = apply(variables, wide[:, :, :448]).features, apply(variables, wide[:, :, 32:]).features
    assert left.shape == (1, 448 // dense_stride, 448 // dense_stride, config.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(left, axis=-1), 1, atol=1e-5)
    shift, centre = 32 // dense_stride, slice(208 // dense_stride, 240 // dense_stride + 1)
    moved = slice(centre.start + shift, centre.stop + shift)
    np.testing.assert_allclose(left[:, centre, moved], right[:, centre, centre], atol=1e-5)
    assert np.abs(left[:, centre, centre] - right[:, centre, centre]).max() > 1e-3


def test_a_stride_that_becomes_a_dilation_keeps_the_scale(checkpoints):
    """On a constant image every stride answers the same at the centre: dilation replaces stride, weights stay."""
    config, variables = checkpoints.random_clip("resnet")
    image = jnp.broadcast_to(jnp.asarray([0.3, -1.0, 0.8]), (1, 448, 448, 3))
    centres = []
    for dense_stride in (8, 16, 32):
        features = dense(at_stride(config, dense_stride))(variables, image).features
        centres.append(features[0, features.shape[1] // 2, features.shape[2] // 2])
    np.testing.assert_allclose(centres[0], centres[2], atol=1e-5)
    np.testing.assert_allclose(centres[1], centres[2], atol=1e-5)


def test_position_embeddings_by_count_inside_a_padded_batch():
    # The released habit: 16×64 pixels in patches of 8 have the 16 tokens of the trained grid, and get its embeddings.
    vision = ViTConfig(image_size=32, patch_size=8, width=64, layers=2, heads=1, mlp_width=64)
    config = CLIPConfig(vision, architecture.NO_TEXT, 16, dataclasses.replace(Fidelity(), position_resize="count"))
    images, variables = np.random.default_rng(0).normal(size=(1, 16, 64, 3)), random_variables(config)
    with jax.enable_x64(True):
        apply, variables = dense(config), jax.tree.map(np.float64, variables)
        alone = apply(variables, images).features
        padded = np.pad(images, ((0, 0), (0, 24), (0, 8), (0, 0)))
        inside = apply(variables, padded, np.array([[2, 8]])).features[:, :2, :8]
        np.testing.assert_allclose(inside, alone, atol=1e-10)
        resized = dense(dataclasses.replace(config, fidelity=Fidelity()))(variables, images)
    assert np.abs(resized.features - alone).max() > 1e-3
