"""PAMR against loops over pixels, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np

from maskclip_jax.segment.pamr import pamr


def by_loops(scores, image, steps, dilations):
    """The definition, pixel by pixel, in float64."""
    height, width, _ = image.shape
    m, x = np.float64(scores), np.float64(image)
    at = lambda a, y, z: a[min(max(y, 0), height - 1), min(max(z, 0), width - 1)]  # noqa: E731
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    others = [offset for offset in offsets if offset != (0, 0)]
    for _ in range(steps):
        refined = np.zeros_like(m)
        for i in range(height):
            for j in range(width):
                sigma = np.std([at(x, i + dy, j + dx) for dy, dx in offsets], axis=0, ddof=1)
                likeness = [
                    np.mean(-np.abs(x[i, j] - at(x, i + dy, j + dx)) / (1e-8 + 0.1 * sigma)) for dy, dx in others
                ]
                weights = np.exp(likeness - np.max(likeness))
                weights /= weights.sum()
                refined[i, j] = sum(w * at(m, i + dy, j + dx) for w, (dy, dx) in zip(weights, others, strict=True))
        m = refined
    return m


def case(seed=0, height=6, width=9):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(height, width, 3)).astype(np.float32), rng.uniform(size=(height, width, 3)).astype(
        np.float32
    )


def test_it_is_the_sum_it_says():
    scores, image = case()
    program = jax.jit(lambda steps: pamr(scores, image, steps=steps, dilations=(1, 2)))
    for steps in (0, 1, 3):
        ours = program(steps)
        np.testing.assert_allclose(ours, by_loops(scores, image, steps, (1, 2)), atol=1e-5)
    assert program._cache_size() == 1
    np.testing.assert_allclose(pamr(scores, image, steps=3, dilations=(1, 2)), ours, atol=1e-6)


def test_padding_changes_nothing_inside():
    scores, image = case(1)
    alone = pamr(scores, image, steps=2, dilations=(1, 2))
    wide = [np.pad(a, ((0, 3), (0, 2), (0, 0)), constant_values=7) for a in (scores, image)]
    padded = pamr(*wide, steps=2, dilations=(1, 2), size=np.array([6, 9], np.int32))
    np.testing.assert_allclose(padded[:6, :9], alone, atol=1e-5)  # the padding is 7


def test_masks_follow_the_edges_of_the_image():
    image = np.zeros((24, 24, 3), np.float32)
    image[:, 12:] = 1
    scores = np.zeros((24, 24, 2), np.float32)
    scores[..., 0], scores[:, 15:, 1] = 0.5, 1  # the second class begins three pixels late
    refined = pamr(scores, image, steps=20, dilations=(1, 2))
    right = np.asarray(refined.argmax(-1)) == (np.arange(24) >= 12)
    assert right.mean() > 0.99
    assert (np.asarray(scores.argmax(-1)) == (np.arange(24) >= 12)).mean() < 0.9


def test_gradients_are_finite():
    scores, image = case(2)
    loss = lambda s, x, n=1: jnp.square(pamr(s, x, steps=n, dilations=(1,))).sum()  # noqa: E731
    flat = np.full_like(image, 0.5)  # no contrast at all
    assert np.isfinite(pamr(scores, flat, steps=1, dilations=(1,))).all()
    for picture in (image, flat):  # a number of steps that is traced goes forward alone
        forward = jax.jvp(lambda s, x: loss(s, x, jnp.int32(1)), (scores, picture), (scores, image))[1]
        gradients = jax.grad(loss, argnums=(0, 1))(scores, picture)
        along = sum((g * move).sum() for g, move in zip(gradients, (scores, image), strict=True))
        np.testing.assert_allclose(along, forward, rtol=1e-3)
