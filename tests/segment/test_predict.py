"""Prediction end to end: against one image alone, the released code, and loops over pixels."""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pixel_loops import CLASSES, settings_of, softmax, upsampled

from maskclip_jax.checkpoints.load import load_visual
from maskclip_jax.data.preprocess import interpolation_matrix, prepare, upsample_matrix
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.errors import UserError
from maskclip_jax.ops.compile_count import count_compiles
from maskclip_jax.segment import grid
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.grid import batch_size_for, bucket_shapes, pixel_matrix
from maskclip_jax.segment.predict import (
    predict_probabilities,
    predict_scores,
    segment_images,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def alone(p, image, classifier, **options):
    """Scores of one unpadded image, and the matrices that upsample them: no bucket, no batch, no grid."""
    prepared = prepare(image, p.preprocess, p.config.multiple, least=p.config.stride)
    scores = jax.jit(lambda v, x: predict_scores(p.model, v, x, classifier, **options))(
        p.variables, prepared.pixels[None]
    )
    scores = np.asarray(scores.values)[0]
    matrices = (
        pixel_matrix(p.config, cells, valid, original)
        for cells, valid, original in zip(scores.shape[:2], prepared.valid, prepared.original, strict=True)
    )
    return scores, *matrices


READINGS = {
    "raw": {},
    "refined": {"prompt_denoising": 0.4, "key_smoothing": 0.9},
    "naive": {"method": "clip"},
}


@pytest.mark.parametrize(
    ("kind", "fidelity", "reading"),
    [
        ("vit", "clip", "raw"),
        ("vit", "clip", "refined"),
        ("vit", "clip", "naive"),
        ("vit", "released", "refined"),
        ("resnet", "released", "refined"),
        ("resnet", "clip", "refined"),
        ("resnet", "clip", "naive"),
    ],
)
def test_buckets_and_batches_change_nothing(pretrained, images, monkeypatch, kind, fidelity, reading):
    p = pretrained(kind, fidelity)
    settings = settings_of(p, batch_size=3, **READINGS[reading])
    pictures = images((40, 50), (33, 90))  # 32 × 40 and 32 × 87 pixels before padding
    monkeypatch.setattr(grid, "bucket_shapes", lambda *_: [(64, 128)] * 2)  # far larger: padding on all sides
    core = {**settings.refinement, "method": settings.method}
    results = dict(grid.whole_scores(pictures, settings))
    assert sorted(results) == [0, 1]
    for i, picture in enumerate(pictures):
        scores, rows, columns = alone(p, picture, settings.classifier, **core)
        found = results[i].scores.values
        assert found.shape == scores.shape
        assert np.abs(found - scores).max() <= 1e-5 * max(1, np.abs(scores).max())
        np.testing.assert_array_equal(results[i].rows, rows)
        np.testing.assert_array_equal(results[i].columns, columns)


def test_an_image_in_its_original_size(pretrained, images):
    p = pretrained("vit")
    (picture,) = images((50, 71))
    classifier = text_classifier(p, CLASSES, "single")
    logits = upsampled(*alone(p, picture, classifier))
    p_scale = np.exp(np.asarray(p.variables["params"]["logit_scale"]))
    (out,) = segment_images([picture], CLASSES, p, templates="single", return_probabilities=True)
    assert out.classes == ("dog", "cat", "tree", "fire truck")
    assert out.labels.shape == (50, 71)
    assert out.labels.dtype == np.uint8
    np.testing.assert_array_equal(out.labels, logits.argmax(-1))
    np.testing.assert_allclose(out.probabilities, softmax(p_scale * logits), atol=1e-4)
    np.testing.assert_allclose(out.confidence, out.probabilities.max(-1), atol=1e-6)
    assert sum(score.area for score in out.scores.values()) == pytest.approx(1)
    for i, (name, score) in enumerate(out.scores.items()):
        mine = out.labels == i
        assert name == out.classes[i]
        assert score.area == pytest.approx(mine.mean())
        assert score.confidence == pytest.approx(out.confidence[mine].mean()) if mine.any() else math.isnan(score[1])


@pytest.fixture(scope="module")
def released_vit():
    with np.load(GOLDEN / "official_vit_tiny.npz") as file:
        arrays = dict(file)
    model, variables = load_visual({k[2:]: v for k, v in arrays.items() if k.startswith("w/")}, fidelity="released")
    return arrays, model, variables


RELEASED = {  # name in the file: denoised, smoothing threshold, naive
    "logits": (False, None, False),
    "naive_logits": (False, None, True),
    "pd": (True, None, False),
    "ks1": (False, 1.0, False),
    "ks0.5": (False, 0.5, False),
    "ks1_pd": (True, 1.0, False),
}


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_the_released_code_inside_a_padded_batch(released_vit, shape):
    """Golden scores, with the golden images in the corner of a larger bucket."""
    arrays, model, variables = released_vit
    images = np.moveaxis(arrays[f"{shape}/image_nchw"], 1, -1)
    h, w, patch = images.shape[1] // 8, images.shape[2] // 8, model.config.stride
    padded = np.pad(images, ((0, 0), (0, 2 * patch), (0, 3 * patch), (0, 0)), constant_values=5)

    @jax.jit
    def everything(variables, images, grid, threshold):
        return {
            name: predict_scores(
                model,
                variables,
                images,
                arrays["text"],
                grid=grid,
                method=METHODS["clip" if naive else "maskclip"],
                denoising=threshold if denoised else None,
                smoothing=smoothing,
            )
            for name, (denoised, smoothing, naive) in RELEASED.items()
        }

    ours = everything(variables, padded, np.array([[h, w]] * len(images)), arrays["pd_threshold"])
    for name in RELEASED:
        golden = np.moveaxis(arrays[f"{shape}/{name}_nchw"], 1, -1)
        assert np.abs(np.asarray(ours[name].values)[:, :h, :w] - golden).max() < 2e-5 * np.abs(golden).max(), name


def test_the_released_upsampling_stretches(pretrained, images):
    p = pretrained("vit", "released")
    picture = images((33, 90))[0]  # 32 × 87 pixels, so 4 × 11 cells of which the last is not full
    out = segment_images([picture], CLASSES, p, templates="single", return_probabilities=True)[0]
    scores, rows, columns = alone(p, picture, text_classifier(p, CLASSES, "single"))
    assert scores.shape[:2] == (4, 11)
    resized = upsampled(scores, interpolation_matrix(4, 32), interpolation_matrix(11, 87))
    stretched = upsampled(resized, interpolation_matrix(32, 33), interpolation_matrix(87, 90))
    np.testing.assert_allclose(upsampled(scores, rows, columns), stretched, atol=1e-5)
    np.testing.assert_allclose(out.probabilities, softmax(100 * stretched), atol=2e-3)
    aligned = upsample_matrix(11, 8, 87, 90)
    assert np.abs(aligned - columns).max() > 0.1


def test_any_size_in_order_and_counted(pretrained, images):
    p = pretrained("resnet")
    sizes = [(1, 1), (3, 200), (40, 50), (20, 100)]
    pictures = images(*sizes)
    seen = []
    out = segment_images(pictures, CLASSES, p, templates="single", batch_size=3, progress=lambda *a: seen.append(a))
    assert [o.labels.shape for o in out] == sizes
    assert seen == [(i, 4) for i in range(1, 5)]
    for picture, together in zip(pictures, out, strict=True):
        (single,) = segment_images([picture], CLASSES, p, templates="single")
        np.testing.assert_allclose(single.confidence, together.confidence, atol=1e-4)
        assert (single.labels == together.labels).mean() > 0.99  # ties may break either way
    assert segment_images([], CLASSES, p, templates="single") == []


def test_200_images_of_60_sizes_compile_few_programs(pretrained, images):
    p = pretrained("resnet", short_side=24, seed=7)
    rng = np.random.default_rng(0)
    sizes = [tuple(int(n) for n in rng.integers(10, 120, 2)) for _ in range(60)]
    pictures = images(*itertools.islice(itertools.cycle(sizes), 200))
    assert len({picture.shape for picture in pictures}) == 60
    with count_compiles() as count:
        out = segment_images(pictures, CLASSES, p, templates="single", prompt_denoising=0.3)
    assert [o.labels.shape for o in out] == [picture.shape[:2] for picture in pictures]
    assert count.programs <= 8


def test_single_images_in_a_row_compile_few_programs(pretrained, images):
    p = pretrained("vit", short_side=16, seed=8)
    rng = np.random.default_rng(1)
    pictures = images(*(tuple(int(n) for n in rng.integers(10, 120, 2)) for _ in range(60)))
    with count_compiles() as count:
        for picture in pictures:
            segment_images([picture], CLASSES, p, templates="single")
    assert count.programs <= 8


def test_large_images_are_capped_and_taken_one_by_one(pretrained, images, monkeypatch):
    p = pretrained("vit")
    settings = settings_of(p)
    assert bucket_shapes([(30, 3000)], settings) == [(8, 104)]  # capped at 96 here; 104 is the ladder's next rung
    assert batch_size_for(settings, (32, 32), 100) == 8
    assert batch_size_for(settings, (32, 32), 3) == 1
    assert batch_size_for(settings, (1024, 1024), 100) == 1  # 16,385 tokens
    full = dataclasses.replace(settings, model=dataclasses.replace(p.model, config=pretrained("resnet").config))
    assert [batch_size_for(full, (side, side), 100) for side in (256, 512, 2048)] == [8, 4, 1]  # pixels, on a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert batch_size_for(full, (2048, 2048), 100) == 4


def test_background_words_are_one_class(pretrained, images):
    p = pretrained("vit")
    (picture,) = images((64, 90))
    words = ["sky", "wall", "dog", "cat"]
    (flat,) = segment_images([picture], words, p, templates="single", return_probabilities=True)
    options = {"templates": "single", "background": "sky, wall", "return_probabilities": True}
    (out,) = segment_images([picture], ["dog", "cat"], p, **options)
    assert out.classes == ("background", "dog", "cat")
    np.testing.assert_array_equal(out.labels, np.maximum(flat.labels.astype(int) - 1, 0))
    assert {0} < set(np.unique(out.labels))
    np.testing.assert_allclose(out.probabilities[..., 0], flat.probabilities[..., :2].sum(-1), atol=1e-6)
    np.testing.assert_allclose(out.probabilities[..., 1:], flat.probabilities[..., 2:], atol=1e-6)


def test_a_background_threshold(pretrained, images):
    p = pretrained("vit")
    (picture,) = images((64, 90))
    (flat,) = segment_images([picture], CLASSES, p, templates="single")
    least = float(np.median(flat.confidence))
    (out,) = segment_images([picture], CLASSES, p, templates="single", background_threshold=least)
    assert out.classes == ("background", *flat.classes)
    np.testing.assert_array_equal(out.labels, np.where(flat.confidence < least, 0, flat.labels + 1))
    np.testing.assert_array_equal(out.confidence, flat.confidence)


def test_files_and_short_side(pretrained, images, tmp_path):
    p = pretrained("resnet")
    (picture,) = images((40, 50))
    Image.fromarray(picture).save(tmp_path / "a.png")
    a, b = segment_images([tmp_path / "a.png", picture], CLASSES, p, templates="single")
    np.testing.assert_array_equal(a.labels, b.labels)
    assert bucket_shapes([(40, 50)], settings_of(p, short_side=64)) == [(64, 96)]


def test_a_classifier_of_ones_own(pretrained, images):
    p = pretrained("vit")
    (picture,) = images((40, 50))
    classifier = text_classifier(p, CLASSES, "single")
    (ours,) = segment_images([picture], ["a", "b", "c", "d"], p, classifier=classifier[::-1])
    (named,) = segment_images([picture], CLASSES, p, templates="single")
    np.testing.assert_array_equal(ours.labels, 3 - named.labels)


def test_the_core_is_differentiable_and_sums_to_one(pretrained, images):
    p = pretrained("vit")
    classifier = jnp.asarray(text_classifier(p, CLASSES, "single"))
    x = prepare(images((32, 32))[0], p.preprocess, 8).pixels[None]

    def loss(classifier, denoising):
        probabilities = predict_probabilities(
            p.model, p.variables, x, classifier, denoising=denoising, grid=jnp.asarray([[4, 3]])
        )
        return probabilities[0, 1, 2, 0], probabilities

    (_, probabilities), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(classifier, 0.01)
    np.testing.assert_allclose(probabilities[0, :, :3].sum(-1), 1, atol=1e-5)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_denoising": 0.0},
        {"prompt_denoising": 1.5},
        {"key_smoothing": -1},
        {"background_threshold": float("nan")},
        {"batch_size": 0},
        {"short_side": 0},
        {"stride": 4},
        {"window": 8, "stride": 9},
        {"background": "dog, wall"},
        {"background": ""},
        {"classes": []},
        {"classes": ["background", "dog"], "background": "wall"},
        {"classifier": np.zeros((3, 12), np.float32)},
        {"images": [np.zeros((4, 4), np.uint8)]},
        {"images": [np.zeros((4, 4, 3), np.float32)]},
        {"images": [np.zeros((0, 4, 3), np.uint8)]},
        {"images": ["no/such/file.png"]},
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(pretrained, images, options):
    options = {"templates": "single", "classes": CLASSES, "images": images((9, 9)), **options}
    with pytest.raises(UserError) as error:
        segment_images(options.pop("images"), options.pop("classes"), pretrained("vit"), **options)
    assert "\n" not in str(error.value)
