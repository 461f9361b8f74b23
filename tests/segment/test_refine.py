"""Refinement against the released code's outputs, hand-made cases and loops; and what it compiles to."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.checkpoints.load import load_visual
from maskclip_jax.segment.refine import class_confidence, drop_classes, key_smoothing, prompt_denoising

GOLDEN = Path(__file__).parents[1] / "golden"
SCALE = 100.0


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=["official_vit_tiny", "official_rn_tiny"])
def golden(request):
    """Arrays of the file as [B, L, C], with keys [B, L, D] (the ResNet's come from our own tower)."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        arrays = dict(file)
    flat = {
        name: np.moveaxis(value, 1, -1).reshape(value.shape[0], -1, value.shape[1])
        for name, value in arrays.items()
        if name.endswith("_nchw")
    }
    out = {"pd_threshold": arrays["pd_threshold"]}
    model, variables = load_visual(
        {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}, fidelity="released", fold=False
    )
    for shape in ("square", "wide"):
        for name in ("logits", "ks1", "ks0.5", "pd", "ks1_pd"):
            if f"{shape}/{name}_nchw" in flat:
                out[shape, name] = flat[f"{shape}/{name}_nchw"]
        if f"{shape}/keys" in arrays:
            out[shape, "keys"] = arrays[f"{shape}/keys"]
        else:
            images = jnp.asarray(np.moveaxis(arrays[f"{shape}/image_nchw"], 1, -1))
            with jax.default_matmul_precision("highest"):
                dense = jax.jit(lambda v, x: model.apply(v, x, method="encode_dense"))(variables, images)
            out[shape, "keys"] = np.asarray(dense.keys)
    return out


def agree(ours, golden, tolerance=1e-5):
    assert ours.shape == golden.shape
    assert np.abs(np.asarray(ours) - golden).max() / np.abs(golden).max() < tolerance


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_released_denoising(golden, shape):
    logits = golden[shape, "logits"]
    options = {"scale": SCALE, "threshold": golden["pd_threshold"], "all_denoised": "drop_all"}
    ours = prompt_denoising(jnp.asarray(logits), **options)
    agree(ours, golden[shape, "pd"])
    assert ((ours == -100) == (golden[shape, "pd"] == -100)).all()


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize(("name", "threshold"), [("ks1", 1.0), ("ks0.5", 0.5), ("ks1_pd", 1.0)])
def test_released_smoothing(golden, shape, name, threshold):
    if (shape, name) not in golden:
        pytest.skip("the ResNet's file has no smoothing at 0.5")
    logits, keys = jnp.asarray(golden[shape, "logits"]), jnp.asarray(golden[shape, "keys"])
    if name.endswith("_pd"):
        logits = prompt_denoising(logits, scale=SCALE, threshold=golden["pd_threshold"], all_denoised="drop_all")
    p = jax.nn.softmax(SCALE * logits, axis=-1)
    agree(key_smoothing(p, keys, threshold=threshold, normalize="positions"), golden[shape, name], 2e-5)


def test_denoising_by_hand():
    # Two positions, three classes; probabilities are softmax(1 · log p) = p.
    p = np.array([[[0.7, 0.2, 0.1], [0.15, 0.45, 0.4]], [[0.4, 0.3, 0.3], [0.3, 0.41, 0.29]]], np.float32)
    logits = jnp.log(p)
    np.testing.assert_allclose(class_confidence(logits, scale=1), [[0.7, 0.45, 0.4], [0.4, 0.41, 0.3]], rtol=1e-6)
    ours = np.asarray(prompt_denoising(logits, scale=1.0, threshold=0.45 - 1e-6))
    np.testing.assert_array_equal(ours == -100, [[[False, False, True]] * 2, [[True, False, True]] * 2])
    np.testing.assert_array_equal(ours[0, :, :2], logits[0, :, :2])
    np.testing.assert_array_equal(ours[1, :, 1], logits[1, :, 1])  # all would go: the best one (0.41) stays
    assert (np.asarray(prompt_denoising(logits, scale=1, threshold=0.9, all_denoised="drop_all")) == -100).all()
    exact = jnp.asarray([[0.5, 0.25, 0.25]], jnp.float32)  # a confidence equal to the threshold is not below it
    assert (drop_classes(logits[:1], exact, threshold=0.5)[0, 0] == -100).tolist() == [False, True, True]


def test_padding_has_no_say_in_denoising():
    p = np.array([[[0.6, 0.4], [0.55, 0.45], [0.01, 0.99]]], np.float32)
    valid = jnp.asarray([[True, True, False]])
    dropped = prompt_denoising(jnp.log(p), scale=1, threshold=0.5, valid=valid)[0, 0] == -100
    assert dropped.tolist() == [False, True]
    assert (prompt_denoising(jnp.log(p), scale=1, threshold=0.5)[0, 0] == -100).tolist() == [False, False]


def random_case(seed, batch, length, width, classes):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), (batch, length)).astype(np.float32)
    p[0, 0] = 0
    p[0, 0, 1] = 1  # saturated
    return p, rng.normal(size=(batch, length, width)).astype(np.float32)


def smoothed_by_loop(p, keys, threshold, normalize):
    out = p.astype(np.float64)
    k = keys.astype(np.float64)
    k = k / np.linalg.norm(k, axis=-1 if normalize == "channels" else 1, keepdims=True)
    for b in range(len(p)):
        for i in range(p.shape[1]):
            if p[b, i].max() < np.float32(threshold):
                out[b, i] = sum((k[b, i] @ k[b, j]) * p[b, j].astype(np.float64) for j in range(p.shape[1]))
    return out


@pytest.mark.parametrize("normalize", ["channels", "positions"])
@pytest.mark.parametrize("shape", [(12, 3, 2), (4, 16, 9)])  # one shape for each order of products
@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_smoothing_is_the_sum_it_says(normalize, shape, threshold):
    p, keys = random_case(0, 2, *shape)
    ours = jax.jit(lambda p, k, t: key_smoothing(p, k, threshold=t, normalize=normalize))(p, keys, threshold)
    np.testing.assert_allclose(ours, smoothed_by_loop(p, keys, threshold, normalize), atol=2e-5)
    np.testing.assert_array_equal(ours[0, 0], p[0, 0])


def test_the_threshold_is_strict_in_float32():
    p, keys = random_case(1, 1, 6, 4, 3)
    p[0, 2] = [0.6, 0.3, 0.1]
    at = key_smoothing(jnp.asarray(p), jnp.asarray(keys), threshold=0.6)  # as float64, 0.6 > float32(0.6)
    np.testing.assert_array_equal(at[0, 2], p[0, 2])
    above = key_smoothing(jnp.asarray(p), jnp.asarray(keys), threshold=np.nextafter(np.float32(0.6), np.float32(1)))
    assert np.abs(above[0, 2] - p[0, 2]).max() > 1e-3


@pytest.mark.parametrize("normalize", ["channels", "positions"])
def test_padding_lends_nothing_to_smoothing(normalize):
    p, keys = random_case(2, 2, 10, 4, 3)
    alone = key_smoothing(jnp.asarray(p[:, :7]), jnp.asarray(keys[:, :7]), normalize=normalize)
    p[:, 7:], keys[:, 7:] = 0.25, np.nan
    valid = jnp.arange(10)[None].repeat(2, 0) < 7
    padded = key_smoothing(jnp.asarray(p), jnp.asarray(keys), normalize=normalize, valid=valid)
    np.testing.assert_allclose(padded[:, :7], alone, atol=1e-5)


def test_no_array_of_all_pairs_unless_it_is_cheaper():
    def pairs(length, width, classes):
        p, k = jnp.zeros((1, length, classes)), jnp.zeros((1, length, width))
        text = jax.jit(key_smoothing).lower(p, k).compile().as_text()
        return bool(re.search(rf"[\[,]{length},{length}[\],]", text))

    assert not pairs(1021, 96, 59)  # 2·96·59 < 1021·155
    assert pairs(61, 768, 171)  # 2·768·171 > 61·939


def test_a_grid_of_thresholds_is_one_vmap():
    p, keys = random_case(3, 1, 8, 4, 3)
    logits = jnp.log(jnp.asarray(p) + 1e-6)

    def both(denoise, smooth):
        denoised = prompt_denoising(logits, scale=1.0, threshold=denoise)
        return key_smoothing(jax.nn.softmax(denoised, -1), jnp.asarray(keys), threshold=smooth)

    denoise, smooth = jnp.asarray([0.1, 0.5, 0.95]), jnp.asarray([0.4, 1.0])
    grid = jax.jit(jax.vmap(jax.vmap(both, (None, 0)), (0, None)))(denoise, smooth)
    assert grid.shape == (3, 2, 1, 8, 3)
    for i in range(3):
        for j in range(2):
            np.testing.assert_allclose(grid[i, j], both(denoise[i], smooth[j]), atol=1e-5)


def test_gradients_are_finite_and_right():
    p, keys = random_case(4, 1, 5, 3, 2)
    keys[0, 4] = 0  # a zero key has no direction
    weights = np.random.default_rng(0).normal(size=p.shape).astype(np.float32)
    loss = jax.jit(lambda x, k: (weights * key_smoothing(jax.nn.softmax(x, -1), k, threshold=1.1)).sum())
    x = jnp.log(jnp.asarray(p) + 0.1)
    for gradient in jax.grad(loss, (0, 1))(x, jnp.asarray(keys)):
        assert np.isfinite(gradient).all()
    step = np.zeros_like(p)
    step[0, 1, 0] = 1e-2
    slope = (loss(x + step, keys) - loss(x - step, keys)) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(x, jnp.asarray(keys))[0, 1, 0], slope, rtol=1e-2)
