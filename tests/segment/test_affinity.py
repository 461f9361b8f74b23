"""Proxy attention and CLIP-DINOiser's pooling: by hand, by the authors' own functions, and what they promise."""

import jax
import numpy as np
import pytest
from affinity_cases import FULL, GOLDEN, PARTS
from affinity_cases import float64 as float64

from maskclip_jax.ops.matmul import mixed
from maskclip_jax.segment import affinity

MATRICES = {"proxyclip": affinity.proxy_attention, "clip_dinoiser": affinity.pooling_weights}
both = pytest.mark.parametrize("name", MATRICES)


def case(seed=0):
    """Tokens of two images that have something in common, as a backbone's do. One shape: one program."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 3, 4, 12)) + 0.6 * rng.normal(size=12)


def inside(grid):
    return (np.indices((3, 4)) < np.reshape(grid, (2, 1, 1))).all(axis=0).ravel()


def by_definition(name, tokens):
    """One image's matrix, entry by entry."""
    s = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in tokens] for a in tokens])
    out = np.zeros_like(s)
    for i, row in enumerate(s):
        if name == "proxyclip":
            scores = 3 * (row - 1.2 * s.mean())
            out[i] = np.where(scores >= 0, np.exp(scores), 0)
        else:
            out[i] = np.where(row >= 0.2, row, 0)
        out[i] /= out[i].sum()
    return out


@pytest.mark.parametrize("grids", [FULL, PARTS], ids=["whole", "padded"])
@both
def test_every_entry_by_its_definition_whatever_the_padding(name, grids):
    tokens = case()
    garbage = np.where(np.stack([inside(grid) for grid in grids]).reshape(2, 3, 4, 1), tokens, 1e6)
    ours = np.asarray(MATRICES[name](garbage, grids))
    for image, flat, grid in zip(ours, tokens.reshape(2, 12, 12), grids, strict=True):
        here = inside(grid)
        wanted = by_definition(name, flat[here])
        np.testing.assert_allclose(image[here][:, here], wanted, atol=1e-6)  # the authors add 1e-6 to a sum
        assert 0.1 < (wanted == 0).mean() < 0.9  # some are left out, some are not
        assert not image[here][:, ~here].any()


@both
def test_three_patches_by_hand(name):
    """S is 1, 0.6 and 0: its mean is (3 + 2 · 0.6) / 9 = 0.4667, and 1.2 times that, 0.56, leaves 0.6 in by 0.04."""
    tokens = np.zeros((2, 3, 4, 12))
    tokens[:, 0, :3, :3] = [[1, 0, 0], [0.6, 0.8, 0], [0, 0, 5]]
    near = np.exp(3 * 0.04) / (np.exp(3 * 0.04) + np.exp(3 * 0.44)) if name == "proxyclip" else 0.6 / 1.6
    ours = MATRICES[name](tokens, np.array([[1, 3], [1, 3]]))[0, :3, :3]
    np.testing.assert_allclose(ours, [[1 - near, near, 0], [near, 1 - near, 0], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("fine", ["", "fine_"], ids=["one grid", "a finer grid"])
def test_proxyclip_as_its_authors_compute_it(fine):
    tokens, values = GOLDEN[f"proxy/{fine}tokens"], GOLDEN["proxy/values"]
    values = affinity.resampled(values.reshape(1, 3, 4, -1), tokens.shape[:2])
    heads = values.reshape(1, -1, 3, 4)  # the matrix serves every head
    out = mixed(affinity.proxy_attention(tokens[None].astype(float)), heads).reshape(heads.shape[1], -1)
    out = np.asarray(out) @ GOLDEN["proxy/out_weight"].T + GOLDEN["proxy/out_bias"]
    np.testing.assert_allclose(out, GOLDEN[f"proxy/{fine}out"], atol=2e-6)


@pytest.mark.parametrize("learned", [False, True], ids=["DINO's S", "learned"])
def test_clip_dinoiser_as_its_authors_compute_it(learned):
    features, tokens = GOLDEN["dinoiser/features"].astype(float), GOLDEN["dinoiser/tokens"].astype(float)
    if learned:
        kernel = GOLDEN["dinoiser/obj_proj.weight"].transpose(2, 3, 1, 0)
        clip = GOLDEN["dinoiser/clip_tokens"].astype(float)
        tokens = affinity.convolved(clip, kernel, GOLDEN["dinoiser/obj_proj.bias"])
    pooled = mixed(affinity.pooling_weights(tokens), features.reshape(2, 12, -1))
    wanted = GOLDEN["dinoiser/learned_out" if learned else "dinoiser/out"]
    np.testing.assert_allclose(np.asarray(pooled).reshape(wanted.shape), wanted, atol=2e-6)


@both
def test_a_flip_of_the_image_flips_the_answer(name):
    tokens = case(seed=1)
    ours, flipped = (np.asarray(MATRICES[name](t, FULL)) for t in (tokens, tokens[:, :, ::-1]))
    back = ours.reshape(2, 3, 4, 3, 4)[:, :, ::-1, :, ::-1].reshape(2, 12, 12)
    np.testing.assert_allclose(flipped, back, atol=1e-12)


@both
def test_unlike_patches_keep_their_own_values(name):
    """S the identity is MaskCLIP; and so is ProxyCLIP on patches that are all alike, where its mask leaves nothing."""
    eye = np.broadcast_to(np.eye(12), (2, 12, 12))
    np.testing.assert_allclose(MATRICES[name](eye.reshape(2, 3, 4, 12), FULL), eye, atol=1e-6)
    alike = np.asarray(MATRICES[name](np.ones((2, 3, 4, 12)), FULL))
    np.testing.assert_allclose(alike, eye if name == "proxyclip" else np.full_like(eye, 1 / 12), atol=1e-6)


@both
def test_gradients_are_finite_and_right(name):
    tokens, (mix, move) = case(2), np.random.default_rng(5).normal(size=(2, 2, 12, 12))
    move = move.reshape(tokens.shape)
    value_and_grad = jax.jit(jax.value_and_grad(lambda t, grid: (MATRICES[name](t, grid) * mix).sum()))
    gradient = np.asarray(value_and_grad(tokens, FULL)[1])
    after, before = (value_and_grad(tokens + step * move, FULL)[0] for step in (1e-6, -1e-6))
    np.testing.assert_allclose((gradient * move).sum(), (after - before) / 2e-6, rtol=1e-6)
    for odd in (np.zeros_like(tokens), np.ones_like(tokens)):
        assert np.isfinite(value_and_grad(odd, FULL)[1]).all()
    padded = np.asarray(value_and_grad(tokens, PARTS)[1])
    assert padded[0, :, :2].any()
    assert not padded[0, :, 2:].any()


def test_resampling_knows_the_valid_part():
    x, grid, to = case(seed=3), np.array([[3, 2], [2, 4]]), np.array([[5, 3], [1, 6]])
    ours = affinity.resampled(x, (5, 6), grid, to)
    for image, y, before, after in zip(ours, x, grid, to, strict=True):
        wanted = jax.image.resize(y[: before[0], : before[1]], (*after, 12), "bilinear")
        np.testing.assert_allclose(image[: after[0], : after[1]], wanted, atol=1e-6)


def test_convolved_tokens_do_not_see_padding():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(3, 3, 5, 2)), rng.normal(size=2)
    for image, y, (rows, columns) in zip(affinity.convolved(x, kernel, bias, PARTS), x, PARTS, strict=True):
        around = np.pad(y[:rows, :columns], ((1, 1), (1, 1), (0, 0)), mode="edge")
        for i, j in np.ndindex(rows, columns):
            wanted = np.einsum("yxd,yxdf->f", around[i : i + 3, j : j + 3], kernel) + bias
            np.testing.assert_allclose(image[i, j], wanted, atol=1e-12)


def test_background_is_what_is_neither_foreground_nor_sure():
    p = np.array([[[[0.1, 0.9], [0.005, 0.995], [0.1, 0.9]]]])
    marked = affinity.marked_background(p, np.array([[[0.2, 0.2, 0.8]]]))
    np.testing.assert_array_equal(marked.argmax(-1), [[[0, 1, 1]]])
    np.testing.assert_array_equal(marked[0, 0, :, 1], p[0, 0, :, 1])
