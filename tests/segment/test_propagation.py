"""LPOSS and LPOSS+: by dense solution, by the authors' own functions, and what they promise."""

import functools

import jax
import numpy as np
import pytest
from affinity_cases import FULL, GOLDEN, PARTS
from affinity_cases import float64 as float64

from maskclip_jax.errors import UserError
from maskclip_jax.segment.propagation import lab, lposs, lposs_pixels

# Solved to the end; each is one program for all tests, whose arrays have one shape.
EXACT = {"iterations": 60, "tolerance": 1e-13}
patches = functools.partial(lposs, neighbours=4, **EXACT)
pixels = functools.partial(lposs_pixels, radius=2, **EXACT)


def case(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(2, 3, 4, 12)) + 0.5 * rng.normal(size=12)
    return rng.uniform(size=(2, 3, 4, 3)), tokens


def pixel_case(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(6, 8, 2)), rng.uniform(size=(6, 8, 3)), np.array([6, 8])


def solved(weights, y, alpha=0.95):
    """(1 − α)(I − α D^-½ W D^-½)^-1 y, dense."""
    degree = weights.sum(axis=1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 1)
    found = np.linalg.solve(np.eye(len(y)) - alpha * root[:, None] * weights * root, y)
    return found * np.where(degree > 0, 1 - alpha, 1)[:, None]


def patch_graph(tokens, k):
    """LPOSS's W, edge by edge, of one image with patches 16 pixels apart."""
    h, w, _ = tokens.shape
    flat = tokens.reshape(h * w, -1) / np.linalg.norm(tokens.reshape(h * w, -1), axis=-1, keepdims=True)
    s, weights = flat @ flat.T, np.zeros((h * w, h * w))
    for i in range(h * w):
        for j in np.argsort(-s[i])[:k]:
            distance = 16 * np.hypot(i // w - j // w, i % w - j % w)
            if i != j and s[i, j] > 0:
                edge = s[i, j] ** 3 * np.exp(-0.01 * distance)
                weights[i, j] += edge
                weights[j, i] += edge
    return weights


def pixel_graph(image, radius, tau):
    """LPOSS+'s W."""
    h, w, _ = image.shape
    colours, weights = np.asarray(lab(image)).reshape(h * w, 3), np.zeros((h * w, h * w))
    for i, j in np.ndindex(h * w, h * w):
        if i != j and abs(i // w - j // w) <= radius and abs(i % w - j % w) <= radius:
            weights[i, j] = np.exp(-np.linalg.norm(colours[i] - colours[j]) / tau)
    return weights


@pytest.mark.parametrize("grids", [FULL, PARTS], ids=["whole", "padded"])
def test_patches_by_dense_solution_whatever_the_padding(grids):
    scores, tokens = case()
    inside = (np.indices((3, 4))[:, None] < grids.T[:, :, None, None]).all(axis=0)[..., None]
    ours = patches(np.where(inside, scores, 1e3), np.where(inside, tokens, 1e6), grids)
    for image, y, t, (rows, columns) in zip(ours, scores, tokens, grids, strict=True):
        wanted = solved(patch_graph(t[:rows, :columns], 4), y[:rows, :columns].reshape(-1, 3))
        np.testing.assert_allclose(image[:rows, :columns].reshape(-1, 3), wanted, atol=1e-10)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("size", [(6, 8), (5, 6)], ids=["whole", "padded"])
def test_pixels_by_dense_solution_whatever_the_padding(size):
    scores, image, _ = pixel_case()
    inside = (np.indices((6, 8)) < np.reshape(size, (2, 1, 1))).all(axis=0)[..., None]
    ours = pixels(np.where(inside, scores, 1e3), np.where(inside, image, 7), tau=0.3, size=np.array(size))
    here = np.s_[: size[0], : size[1]]
    wanted = solved(pixel_graph(image[here], 2, 0.3), scores[here].reshape(-1, 2))
    np.testing.assert_allclose(ours[here].reshape(-1, 2), wanted, atol=1e-10)
    assert np.isfinite(ours).all()


def test_features_spread_as_their_scores_do():
    """The solution is linear, so that a pair of towers spreads features, which serve any words."""
    features, tokens = case(7)
    words = np.random.default_rng(8).normal(size=(3, 3))
    np.testing.assert_allclose(
        patches(features, tokens, FULL) @ words, patches(features @ words, tokens, FULL), atol=1e-10
    )


def test_two_nodes_by_hand():
    """One edge: D^-½ W D^-½ swaps the two, and (I − α swap)^-1 is [[1, α], [α, 1]] / (1 − α²)."""
    scores = np.zeros((2, 3, 4, 3))
    scores[:, 0, 0] = 1
    wanted = 0.05 * np.array([1, 0.95]) / (1 - 0.95**2)
    ours = patches(scores, np.ones((2, 3, 4, 12)), np.array([[1, 2], [2, 1]]))
    np.testing.assert_allclose(ours[0, 0, :2, 0], wanted, rtol=1e-10)
    np.testing.assert_allclose(ours[1, :2, 0, 1], wanted, rtol=1e-10)
    scores, image, _ = pixel_case()
    scores[0, :2, 0] = 1, 0
    ours = pixels(scores, np.full_like(image, 0.5), size=np.array([1, 2]))
    np.testing.assert_allclose(ours[0, :2, 0], wanted, rtol=1e-10)


def test_patches_as_the_authors_compute_them():
    ours = lposs(GOLDEN["lposs/scores"][None], GOLDEN["lposs/tokens"][None], neighbours=8)
    np.testing.assert_allclose(ours[0], 0.05 * GOLDEN["lposs/patches"], rtol=1e-6)  # their distances are float32


def test_without_a_neighbour():
    with pytest.raises(UserError, match="its nearest, got 0 neighbours"):
        lposs(np.zeros((1, 2, 2, 3), np.float32), np.ones((1, 2, 2, 4), np.float32), neighbours=0)


def test_pixels_as_the_authors_compute_them():
    np.testing.assert_allclose(lab(GOLDEN["lposs/image"]), GOLDEN["lposs/lab"], atol=1e-7)
    ours = lposs_pixels(GOLDEN["lposs/pixel_scores"], GOLDEN["lposs/image"])
    np.testing.assert_allclose(ours, 0.05 * GOLDEN["lposs/pixels"], rtol=1e-5)


def test_a_flip_of_the_image_flips_the_answer():
    scores, tokens = case(seed=3)
    flipped = patches(scores[:, :, ::-1], tokens[:, :, ::-1], FULL)
    np.testing.assert_allclose(flipped[:, :, ::-1], patches(scores, tokens, FULL), atol=1e-12)
    scores, image, size = pixel_case(3)
    flipped = pixels(scores[::-1], image[::-1], size=size)
    np.testing.assert_allclose(flipped[::-1], pixels(scores, image, size=size), atol=1e-12)


def test_nodes_that_are_unlike_all_others_keep_their_scores():
    scores, _ = case(seed=4)
    unlike = np.broadcast_to(np.eye(12), (2, 12, 12)).reshape(2, 3, 4, 12)
    np.testing.assert_allclose(patches(scores, unlike, FULL), scores, rtol=1e-12)
    scores, image, size = pixel_case(4)
    np.testing.assert_allclose(pixels(scores, image, tau=1e-6, size=size), scores, rtol=1e-12)


@pytest.mark.parametrize("factor", [1e30, 1e-30, np.nan, np.inf])
def test_scores_of_any_size_and_what_is_no_number(factor):
    """Conjugate gradients square what they get: zeros came out for all of these."""
    scores, tokens = case(5)
    wanted = patches(scores, tokens, FULL)
    np.testing.assert_allclose(patches(scores.astype(np.float32), tokens, FULL), wanted, rtol=1e-6)
    scores, tokens = scores.astype(np.float32), tokens.astype(np.float32)
    ours = patches(scores * np.float32(factor), tokens, FULL)
    if np.isfinite(factor):
        np.testing.assert_allclose(ours / factor, wanted, rtol=1e-4)
    else:
        assert np.isnan(ours).all()
        assert np.isnan(patches(scores, np.where(tokens > 1, np.nan, tokens), FULL)).any()


def test_a_pixel_that_hardly_any_is_like_has_a_gradient():
    """In float32, weights of e^-70: the root of their sum has a gradient past the largest number."""
    image = np.zeros((6, 8, 3), np.float32)
    image[2, 3] = 0.7
    scores = pixel_case()[0].astype(np.float32)
    assert np.isfinite(jax.grad(lambda x: lposs_pixels(scores, x, radius=2)[2, 3, 0])(image)).all()


def test_masks_follow_the_edges_of_the_image():
    scores, image, size = pixel_case()
    image[:], scores[:] = 0, 0
    image[:, 4:] = 1
    scores[..., 0], scores[:, 5:, 1] = 0.5, 1  # the second class begins a pixel late
    assert (np.asarray(pixels(scores, image, size=size).argmax(-1)) == (np.arange(8) >= 4)).all()


@pytest.mark.parametrize("kind", ["patches", "pixels"])
def test_gradients_are_finite_and_right(kind):
    """Those of the solution, so that it is taken to its end here."""
    if kind == "patches":
        inputs, solve = case(5), lambda scores, tokens: patches(scores, tokens, PARTS)
        flat = inputs[0], np.ones_like(inputs[1])
    else:
        inputs, solve = pixel_case(5)[:2], functools.partial(pixels, tau=0.3)
        flat = inputs[0], np.full_like(inputs[1], 0.5)
    rng = np.random.default_rng(6)
    mix, *move = (rng.normal(size=x.shape) for x in (inputs[0], *inputs))
    if kind == "patches":  # beyond the grid is nothing to learn
        mix = mix * (np.indices((3, 4))[:, None] < PARTS.T[:, :, None, None]).all(axis=0)[..., None]
    value_and_grad = jax.jit(jax.value_and_grad(lambda *x: (solve(*x) * mix).sum(), argnums=(0, 1)))
    gradient = value_and_grad(*inputs)[1]
    after, before = (value_and_grad(*(x + s * m for x, m in zip(inputs, move, strict=True)))[0] for s in (1e-6, -1e-6))
    along = sum((g * m).sum() for g, m in zip(gradient, move, strict=True))
    np.testing.assert_allclose(along, (after - before) / 2e-6, rtol=1e-6)
    assert all(np.isfinite(g).all() for g in value_and_grad(*flat)[1])
