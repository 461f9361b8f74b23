"""Class-balanced selection of pseudo labels."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.toy_world import label_scenes
from experiments.toy_world.label_scenes import CANDIDATES, Labeller, View, balancing_bias, read_view, read_views, surest
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.data.sources import open_source
from maskclip_jax.evaluate.engine import Reader
from maskclip_jax.segment.refine import Logits


def test_of_every_class_the_surest_share_stays():
    labels = np.array([[[0, 0, 0, 0], [7, 7, 7, 7]]], np.uint8)
    sure = np.array([[[250, 240, 230, 220], [10, 40, 20, 30]]], np.uint8)  # class 7 is never as sure as class 0
    keep = [0.5] * 8
    found = surest(labels, sure, keep)
    np.testing.assert_array_equal(found, [[[0, 0, 255, 255], [255, 7, 255, 7]]])
    np.testing.assert_array_equal(surest(labels, sure, [1.0] * 8), labels)
    np.testing.assert_array_equal(surest(labels, sure, [1.0, *keep[1:]])[0, 0], labels[0, 0])


def labeller(*views: View) -> Labeller:
    """Its scores are a pixel's own colours, and a constant for all further classes, at stride 4."""

    def scores(variables, x, grid):
        cells = x[:, 2::4, 2::4]
        return Logits(jnp.concatenate([cells, jnp.full((*cells.shape[:3], CANDIDATES), -3.0)], -1))

    size = Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", short_side=None, long_side=None, multiple=4)
    return Labeller(Reader(scores, lambda v, s: s, size), {}, 4.0, 4, views)


def halves() -> np.ndarray:
    """Red on the left, green on the right, blue in a corner."""
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, :, :24, 0] = image[:, :, 24:, 1] = 255
    image[:, 48:, 48:] = (0, 0, 255)
    return image


def test_views_lie_on_each_other():
    """Mirrored, moved and enlarged, a view's scores come back to the pixels they are of."""
    image = halves()
    truth = image[0].argmax(-1)
    inside = np.pad(np.ones((56, 56), bool), 4)
    for edge in (24, 48):  # within two cells of a border of colours, cells decide
        inside[:, edge - 8 : edge + 8] = inside[edge - 8 : edge + 8] = False
    for view in (View(64), View(64, True), View(64, False, 2, 1), View(64, True, 3, 2), View(96)):
        made = labeller(view)
        found = np.asarray(read_view(made, {}, jnp.asarray(image / 255.0, jnp.float32), view))[0]
        assert found.shape == (64, 64, 3 + CANDIDATES)
        np.testing.assert_array_equal(found.argmax(-1)[inside], truth[inside])


def test_pamr_moves_borders_to_the_images_own():
    image, views = halves(), (View(64, False, 2, 2),)
    wrong = {}
    for steps in (0, 10):
        labels, sure = read_views(labeller(*views), {}, jnp.asarray(image), jnp.zeros(3 + CANDIDATES), 0.0, steps)
        assert labels.shape == sure.shape == (1, 64, 64)
        assert 0 < float(sure.min()) <= float(sure.max()) <= 1
        wrong[steps] = int((np.asarray(labels)[0] != image[0].argmax(-1)).sum())
    assert wrong[10] < wrong[0]


def test_balancing_lets_a_weak_class_win_as_often_as_a_strong_one():
    """Class 0 is stuff and keeps what it has; of the rest, 1 is preferred to 2 everywhere, 2 where it is likelier."""
    spread = np.linspace(-1, 1, 400)
    logits = np.stack([np.where(np.arange(400) < 200, 9.0, -9.0), np.full(400, 2.0), spread], axis=-1)
    assert np.bincount(logits.argmax(-1), minlength=3).tolist() == [200, 200, 0]
    bias = balancing_bias(logits, [False, True, True], rounds=200, rate=0.1)
    assert bias[0] == 0
    won = np.bincount((logits + bias).argmax(-1), minlength=3)
    assert won[0] == 200
    assert abs(int(won[1]) - int(won[2])) <= 4


def test_bias_decides_where_the_teacher_wavers():
    image, lean = halves(), jnp.zeros(3 + CANDIDATES).at[2].set(9.0)
    plain, leaning = (
        read_views(labeller(View(64)), {}, jnp.asarray(image), bias, 0.0)[0] for bias in (jnp.zeros_like(lean), lean)
    )
    assert set(np.unique(plain)) == {0, 1, 2}
    assert set(np.unique(leaning)) == {2}


@pytest.mark.slow
def test_masks_of_the_shipped_scenes(tmp_path, monkeypatch, capsys):
    """Three scenes through the command; what was read is not read twice; too few scenes say nothing about shares."""
    shipped = [open_source("scenes")[i] for i in range(3)]
    (tmp_path / "scenes").mkdir()
    np.save(tmp_path / "scenes" / "images.npy", np.stack([scene.image for scene in shipped]))

    def masks(name, *options):
        arguments = "--model embedded-resnet --pamr 2 --prompt-denoising 0 --keep 1 --keep-stuff 1".split()
        arguments += ["--scenes", str(tmp_path / "scenes"), "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["label_scenes", *arguments, *options])
        label_scenes.main()
        return np.stack([np.asarray(Image.open(tmp_path / name / f"{i:06d}.png")) for i in range(3)])

    found = masks("plain")
    assert np.mean(found == np.stack([scene.labels for scene in shipped])) > 0.6  # of 66 classes
    assert json.loads((tmp_path / "plain" / "labels.json").read_text())["pamr"] == 2
    with pytest.raises(SystemExit, match="2"):
        masks("few", "--balance", "0.7")
    assert "counts on 500 scenes, got 3" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()

    monkeypatch.setattr(label_scenes, "BALANCED_ON", 3)
    balanced = masks("balanced", "--balance", "0.7")
    assert (balanced != found).any()
    (parts,) = (tmp_path / "balanced").glob("parts-*")
    assert sorted(path.name for path in parts.iterdir()) == ["000000.npz", "bias.npy"]
    monkeypatch.setattr(label_scenes, "read_view", None)  # nothing is read again
    np.testing.assert_array_equal(masks("balanced", "--balance", "0.7"), balanced)
