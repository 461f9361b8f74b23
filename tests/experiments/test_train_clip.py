"""The embedded CLIP's training reads its towers as the library does; its losses do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_clip import compiled_apply

from experiments.toy_world.batches import draw_batch, multi_positive, uniformity, unnamed
from experiments.toy_world.prompts import CLASSES, PHRASES
from experiments.toy_world.train_clip import both_readings
from maskclip_jax.encoders.config import CLIPConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP


@pytest.fixture(scope="module")
def tiny():
    config = CLIPConfig(
        ViTConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=32),
        TextConfig(40, 8, width=16, layers=1, heads=2, mlp_width=32),
        embed_dim=8,
    )
    model, key = CLIP(config), jax.random.key(0)
    images = jax.random.normal(key, (2, 16, 24, 3))
    return model, jax.jit(model.init)(key, images, jnp.zeros((1, 8), jnp.int32)), images


def test_both_readings_are_the_librarys(tiny):
    model, variables, images = tiny
    embedding, patches = compiled_apply(model, variables, images, keep=None, method=both_readings)
    np.testing.assert_allclose(embedding, compiled_apply(model, variables, images, method="encode_image"), atol=1e-5)
    dense = compiled_apply(model, variables, images, method="encode_dense").features
    unit = patches / jnp.linalg.norm(patches, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit.reshape(dense.shape), dense, atol=1e-5)


def test_dropped_patches_have_no_say(tiny):
    model, variables, images = tiny
    keep = jnp.tile(jnp.arange(0, 24, 2)[None], (2, 1))
    read = jax.jit(lambda images: model.apply(variables, images, keep, method=both_readings))
    embedding, patches = read(images)
    assert patches.shape == (2, 12, 8)
    blocks = images.reshape(2, 4, 4, 6, 4, 3).at[:, :, :, 1::2].set(7.0)  # columns 1, 3, 5 of patches are not kept
    again, _ = read(blocks.reshape(images.shape))
    np.testing.assert_array_equal(embedding, again)


def test_multi_positive_by_hand():
    """Two right phrases do not compete with each other, and an unknown one with nobody."""
    scores = jnp.asarray([[2.0, 1.0, 0.5, 9.0]])
    right = jnp.asarray([[True, True, False, False]])
    wrong = jnp.asarray([[False, False, True, False]])
    expected = np.mean([np.log(1 + np.exp(0.5 - s)) for s in (2.0, 1.0)])
    assert float(jax.jit(multi_positive)(scores, right, wrong)) == pytest.approx(expected, rel=1e-6)


def test_unnamed_by_hand():
    """The position most like an object is one, the other is stuff; an unknown phrase counts on neither side."""
    scores = jnp.asarray([[[3.0, 1.0, 0.5, 9.0], [-1.0, 2.0, 4.0, 9.0]]])
    right = jnp.asarray([[[True, True, False, False]]])
    wrong = jnp.asarray([[[False, False, True, False]]])
    stuff = jnp.asarray([False, True, False, False])
    shown = 1 / (1 + np.exp([-2.5, 2.5]))  # objects by 2 and -3 nats, and -0.5 lies between them
    s = np.asarray(scores[0])
    expected = np.log(np.exp(s[:, :3]).sum(1)) - shown * s[:, 0] - (1 - shown) * s[:, 1]
    assert float(jax.jit(unnamed)(scores, right, wrong, stuff, 0.5)) == pytest.approx(expected.mean(), rel=1e-6)


def test_stuff_that_is_named_does_not_answer_for_objects():
    """Of two positions one shows an object, so that calling both stuff costs more than calling one the object."""
    right = jnp.asarray([[[True, True, False]]])
    stuff = jnp.asarray([False, True, False])
    run = jax.jit(unnamed)
    cost = lambda first: float(run(jnp.asarray([[first, [0.0, 5.0, 0.0]]]), right, ~right, stuff, 0.5))  # noqa: E731
    assert cost([5.0, 0.0, 0.0]) < cost([1.0, 5.0, 0.0]) - 1


def test_a_batch_holds_all_names_and_the_coloured_phrases_that_are_named():
    classes, phrases, scenes = len(CLASSES), len(PHRASES), 12
    named = np.zeros((scenes, phrases), bool)
    named[:, 3] = named[:, [100, 200]] = True
    corpus = {
        "images": jnp.arange(scenes, dtype=jnp.uint8)[:, None, None, None] * jnp.ones((1, 4, 4, 3), jnp.uint8),
        "named": jnp.asarray(named),
        "unknown": jnp.zeros((scenes, phrases), bool),
        "captions": jnp.zeros((scenes, 2, 5), jnp.int32),
        "phrases": jnp.arange(phrases)[:, None, None] * jnp.ones((1, 3, 4), jnp.int32),
        "wide": jnp.asarray(8),
    }
    closeups = (0.0, 1.0)
    draw = jax.jit(lambda progress: draw_batch(jax.random.key(0), corpus, 8, closeups, progress))
    batch = draw(0.0)
    slots = np.asarray(batch["phrases"])[:, 0]
    assert slots[:classes].tolist() == list(range(classes))
    assert {100, 200} <= set(slots[classes:].tolist())
    assert batch["named"][:, [3]].all()
    assert np.asarray(batch["named"]).sum() == 3 * 8
    assert batch["images"].max() < 8  # no close-up at a share of zero, nothing else at a share of one
    assert draw(1.0)["images"].min() >= 8


def test_uniformity_is_least_where_nouns_differ():
    noun = jnp.arange(3)
    same = jnp.tile(jnp.asarray([[1.0, 0.0]]), (3, 1))
    angles = jnp.arange(3) * 2 * jnp.pi / 3
    apart = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    assert float(uniformity(same, noun)) == pytest.approx(3.0)
    assert float(uniformity(apart, noun)) == pytest.approx(-1.5, abs=1e-5)
