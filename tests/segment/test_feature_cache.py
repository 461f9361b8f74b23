"""Kept features answer as `segment_images` does, whatever words and thresholds are read from them."""

import jax
import numpy as np
import pytest

from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment.feature_cache import class_probability, keep_features, read_features, room_for
from maskclip_jax.segment.predict import prediction_settings, segment_images

FEW = ["dog", "cat,kitten", "tree"]
MORE = [*FEW, "fire truck", "sky"]
TOWER = {"whole": {}, "windows": {"window": 24, "stride": 16}}
READING = {
    "refined": {"prompt_denoising": 0.25, "key_smoothing": 0.4},
    "background": {"prompt_denoising": 0.25, "background": "wall, floor", "background_threshold": 0.2},
    "threshold": {"background_threshold": 0.445},
}


def picture(height=41, width=59, seed=0):
    """Four flat quarters under noise: smoothing leaves more than one class."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 200, (2, 2, 3)).repeat(-(-height // 2), 0).repeat(-(-width // 2), 1)[:height, :width]
    return (quarters + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)


ROUNDING = 1e-4  # two programs: cosines differ by some 1e-7, logits by 100 times that, and near a tie labels too


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize(
    ("kind", "tower", "reading"),
    [
        ("vit", "whole", "refined"),
        ("vit", "windows", "refined"),
        ("vit", "windows", "background"),
        ("resnet", "whole", "threshold"),
    ],
)
def test_the_answer_is_that_of_segment_images(pretrained, kind, tower, reading):
    p = pretrained(kind)
    options = {"templates": "single", **TOWER[tower], **READING[reading]}
    # The features are kept with other words and no thresholds at all.
    kept = keep_features(picture(), prediction_settings(FEW, p, templates="single", **TOWER[tower]))
    settings = prediction_settings(MORE, p, return_probabilities=True, **options)
    (wanted,) = segment_images([picture()], MORE, p, return_probabilities=True, **options)
    found = read_features(kept, settings)
    assert (found.labels != wanted.labels).mean() < 1e-3
    np.testing.assert_allclose(found.confidence, wanted.confidence, atol=ROUNDING)
    assert found.scores.keys() == wanted.scores.keys()
    assert len(np.unique(wanted.labels)) > 1

    roomy = read_features(kept, settings, columns=room_for(len(settings.word_class)))
    assert (roomy.labels != wanted.labels).mean() < 1e-3
    if reading == "refined":  # where smoothing leaves nothing, "all alike" is shared by the columns there is room for
        some = roomy.confidence != np.float32(1 / 8)
        np.testing.assert_allclose(roomy.confidence[some], wanted.confidence[some], atol=ROUNDING)
    else:
        np.testing.assert_allclose(roomy.confidence, wanted.confidence, atol=ROUNDING)
        for index in range(len(settings.names)):
            heat = class_probability(kept, settings, index, columns=room_for(len(settings.word_class)))
            np.testing.assert_allclose(heat, wanted.probabilities[..., index], atol=ROUNDING)


def test_other_attentions_are_kept_too(pretrained):
    pytest.importorskip("maskclip_jax.encoders.dense", reason="the library has no other attentions")
    p = pretrained("vit")
    options = {"templates": "single", "method": "clearclip"}
    settings = prediction_settings(FEW, p, **options)
    found = read_features(keep_features(picture(), settings), settings)
    (wanted,) = segment_images([picture()], FEW, p, **options)
    assert (found.labels != wanted.labels).mean() < 1e-3
    np.testing.assert_allclose(found.confidence, wanted.confidence, atol=ROUNDING)


def test_other_sizes_show_the_same(pretrained):
    p = pretrained("vit")
    settings = prediction_settings(FEW, p, templates="single")
    kept = keep_features(picture(64, 96), settings)
    large, small = read_features(kept, settings), read_features(kept, settings, size=(32, 48))
    assert small.labels.shape == small.confidence.shape == (32, 48)
    # each pixel of the small answer lies between four of the large one: they agree but at borders
    assert (small.labels == large.labels[::2, ::2]).mean() > 0.9


def test_words_and_thresholds_compile_nothing_new(pretrained):
    """One program for the tower, and one (with smoothing, two) for all words there is room for."""
    p = pretrained("vit")
    rows = np.eye(12, dtype=np.float32)

    def read(words, seed, **options):
        settings = prediction_settings(words, p, classifier=rows[: len(words)], **options)
        return read_features(keep_features(picture(seed=seed), settings), settings, columns=8)

    read(FEW, 0)
    read(FEW, 0, key_smoothing=0.5)
    with count_compiles() as count:
        found = read(MORE, 1, prompt_denoising=0.4)
        read([*MORE, "sea"], 2, prompt_denoising=0.2, key_smoothing=0.7)
    assert count.programs == 0
    assert found.classes == ("dog", "cat", "tree", "fire truck", "sky")


def test_room(pretrained):
    assert [room_for(n) for n in (1, 8, 9, 16, 17, 256)] == [8, 8, 16, 16, 32, 256]
    settings = prediction_settings(MORE, pretrained("vit"), templates="single")
    kept = keep_features(picture(), settings)
    with pytest.raises(ValueError, match="must hold all words, but 4 are fewer than 5"):
        read_features(kept, settings, columns=4)
