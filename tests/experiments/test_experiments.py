"""The parts of the experiments that compute something of their own, on inputs worked out by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import scoring
from experiments.harness.records import Missing, Settings
from experiments.tables import ablations, fine_grained, robustness, transforms
from maskclip_jax.data.corruptions.corrupt import corrupt
from maskclip_jax.data.sources import ArraySource
from maskclip_jax.data.vocabulary import SCENE_CLASSES

ROOT = Path(__file__).resolve().parents[2]


def test_truth_of_coloured_things():
    """A red car counts as such, a plain dog (it has a colour of its own) not at all, grass as grass."""
    car, dog, grass = (SCENE_CLASSES.index(n) for n in ("car", "dog", "grass"))
    labels = np.array([[car, dog], [grass, grass]])
    scene = fine_grained.Coloured(np.zeros((2, 2, 3), np.uint8), labels, {car: "red car"}, (dog,))
    names = fine_grained.prompts()
    assert names.count("red car") == 1
    assert "dog" not in names
    expected = [[names.index("red car"), -1], [names.index("grass")] * 2]
    np.testing.assert_array_equal(fine_grained.truth(scene, names), expected)


def test_agreement_counts_noun_and_colour():
    answers = ["red car", "blue car", "red book", "grass"]
    assert fine_grained._agreement("red car", answers).tolist() == [4, 1, 2, 2]


def test_coloured_scenes_have_their_things():
    scenes = fine_grained.coloured_scenes(6)
    assert scenes
    for scene in scenes:
        assert all((scene.labels == label).any() for label in scene.phrases)
        assert all(SCENE_CLASSES[label] == phrase.split()[1] for label, phrase in scene.phrases.items())


def test_corrupted_sources_are_what_corrupt_gives():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    source = robustness.CorruptedSource(ArraySource(images, np.zeros((2, 16, 16), np.uint8)), "speckle_noise", 2)
    assert len(source) == 2
    key = jax.random.fold_in(jax.random.key(0), 1)
    np.testing.assert_array_equal(source[1].image, corrupt(images[1], "speckle_noise", 2, key))
    np.testing.assert_array_equal(source[1].image, source[1].image)
    assert (source[0].labels == 0).all()


def test_key_similarity_of_two_classes():
    """Keys of one class alike, of the two at right angles: smoothing would average over a class alone."""
    keys = jnp.array([[1.0, 0], [2.0, 0], [0, 3.0], [0, 1.0]])
    same, other, weight, share = ablations._similarities(keys, jnp.array([0, 0, 1, 1]))
    np.testing.assert_allclose([same, other, weight, share], [1, 0, 1, 0.5], atol=1e-6)


def test_tuning_learns_from_its_scenes_and_leaves_other_classes():
    """Two classes whose words point the wrong way: after tuning their pixels are told apart; the third word stays."""
    features = jnp.zeros((64, 1, 2, 3)).at[:, :, 0, 0].set(1).at[:, :, 1, 1].set(1)
    labels = jnp.tile(jnp.array([[[0, 1]]]), (64, 1, 1))
    start = jnp.array([[0.70, 0.71, 0.0], [0.71, 0.70, 0.0], [0.0, 0.0, 1.0]])
    start /= jnp.linalg.norm(start, axis=-1, keepdims=True)
    logits_of = lambda f, t: 20 * jnp.einsum("bhwe,ce->bhwc", f, t)  # noqa: E731
    tuned = jax.jit(transforms.tune, static_argnums=0)(logits_of, features, labels, start)
    assert (logits_of(features, start).argmax(-1) != labels).all()
    assert (logits_of(features, tuned).argmax(-1) == labels).all()
    np.testing.assert_allclose(tuned[2], start[2], atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(tuned, axis=-1), 1, atol=1e-5)


def test_confusion_as_a_product_of_indicators():
    labels = jnp.array([[0, 1], [255, 1]])
    found = np.asarray(transforms.count(labels, jnp.array([[0, 2], [3, 1]])))
    assert found[0, 0] == found[1, 2] == found[1, 1] == 1
    assert found.sum() == 3


def test_data_that_is_not_here_is_said_to_be_missing():
    with pytest.raises(Missing, match="voc20 is not here: put it at data/voc20/val"):
        scoring.open_data("voc20")


def test_a_student_that_is_not_here_is_said_to_be_missing(tmp_path):
    cell = scoring.student_cell(Settings(runs=tmp_path), "x", "zero_shot", seed=2)
    assert cell.config["inputs"] is None
    with pytest.raises(Missing, match=r"zero_shot --set seed=2 --out .*zero_shot-2"):
        cell.compute()
