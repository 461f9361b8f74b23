"""A trained student's masks: the pixels that its evaluation counts, in the images' own sizes; `segment --model RUN`."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_distill import CLASSES, text_rows, trained_student
from tiny_run import run_config, train, write_data

from maskclip_jax import cli
from maskclip_jax.data.sources import Example
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.predict import chosen_labels, iter_student_segmentations
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.metrics import confusion_matrix
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.predict import segment_images

SIZES = ((32, 32), (40, 56), (32, 32), (21, 33), (64, 32))


@pytest.fixture(scope="module")
def trained():
    return trained_student()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3), np.uint8).repeat(4, 0).repeat(4, 1)[:h, :w] for h, w in SIZES
    ]


def test_a_student_is_given_as_a_clip_is(trained, pictures):
    found = segment_images(pictures, CLASSES[:2], trained, Options(batch_size=2), short_side=32)
    options = {"classes": CLASSES[:2], "batch_size": 2, "short_side": 32}
    for one, other in zip(found, iter_student_segmentations(pictures, trained, **options), strict=True):
        assert one.classes == other.classes == tuple(CLASSES[:2])
        np.testing.assert_array_equal(one.labels, other.labels)
    for wrong, words in (({"key_smoothing": True}, "got key_smoothing"), ({"classifier": text_rows()}, "classifier")):
        with pytest.raises(UserError, match=words):
            segment_images(pictures, None, trained, **wrong)


class Labelled(list):
    """Images with annotation, as a data source."""


def test_masks_are_what_evaluation_counts(trained, pictures):
    found = list(iter_student_segmentations(pictures, trained, return_probabilities=True))
    rng = np.random.default_rng(4)
    truth = [rng.integers(0, len(CLASSES), size).astype(np.uint8) for size in SIZES]
    expected = evaluate_student(
        trained.config,
        trained.variables,
        trained.text,
        Labelled(Example(i, t, "x") for i, t in zip(pictures, truth, strict=True)),
    )
    counted = sum(confusion_matrix(t, f.labels, len(CLASSES)) for t, f in zip(truth, found, strict=True))
    assert len(np.unique(np.concatenate([f.labels.ravel() for f in found]))) > 1
    assert np.abs(np.asarray(counted) - expected.confusion).sum() <= 4  # pixels at a tie may fall either way
    for picture, result in zip(pictures, found, strict=True):
        assert result.labels.shape == picture.shape[:2]
        np.testing.assert_allclose(result.probabilities.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(result.probabilities.max(-1), result.confidence, atol=1e-6)
        assert sum(score.area for score in result.scores.values()) == pytest.approx(1)


def test_some_of_its_classes_compete_alone(trained, pictures):
    everything = list(iter_student_segmentations(pictures, trained, return_probabilities=True))
    names = [str(CLASSES[3]), str(CLASSES[1])]
    for all_, two in zip(everything, iter_student_segmentations(pictures, trained, classes=names), strict=True):
        assert two.classes == tuple(names)
        np.testing.assert_array_equal(two.labels, all_.probabilities[..., [3, 1]].argmax(-1))
    with pytest.raises(UserError, match=r"has the 5 classes it was trained on.*zebra"):
        chosen_labels(trained.config, ["zebra"])
    with pytest.raises(UserError, match="needs a student with a background"):
        next(iter_student_segmentations(pictures, trained, background_threshold=0.5))


def test_short_side_and_batches(trained, pictures):
    """Batches change nothing; a short side gives the mask of the resized image, in the original size."""
    one = list(iter_student_segmentations(pictures, trained, batch_size=1))
    for a, b in zip(one, iter_student_segmentations(pictures, trained, batch_size=4), strict=True):
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-5)
    larger = next(iter_student_segmentations(pictures, trained, short_side=64))
    assert larger.labels.shape == SIZES[0]
    assert (larger.labels != one[0].labels).any()


def status(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    return stop.value.code


def test_from_the_command_line(tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out"
    config = run_config(write_data(tmp_path), steps=2, evaluate_every=2)
    train(config, workdir)
    photo = tmp_path / "photo.png"
    with np.load(config.train_data) as data:
        Image.fromarray(data["images"][0]).save(photo)
    assert status(["segment", str(photo), "--model", str(workdir), "--out", str(out)]) == 0
    assert "% of the image" in capsys.readouterr().out
    labels = np.asarray(Image.open(out / "photo_labels.png"))
    assert labels.shape == (36, 44)
    found = json.loads((out / "photo.json").read_text())["classes"]
    assert [c["class"] for c in found] == [str(c) for c in CLASSES]
    assert found[int(labels[0, 0])]["area"] > 0
    for options, message in (
        (["--prompt-denoising", "0.5"], "a student is read as it was trained, got --prompt-denoising"),
        (["--classes", "zebra"], "a student has the 5 classes"),
    ):
        refused = tmp_path / "refused"
        assert status(["segment", str(photo), "--model", str(workdir), "--out", str(refused), *options]) == 2
        assert message in capsys.readouterr().err
        assert not refused.exists()
    scores = tmp_path / "scores.json"
    assert status(["evaluate", config.train_data, "--model", str(workdir), "--out", str(scores)]) == 0
    assert json.loads(scores.read_text())["settings"]["scales"] == [1.0]
    capsys.readouterr()
    assert status(["segment", str(photo), "--out", str(out)]) == 2
    assert "--classes is missing" in capsys.readouterr().err
