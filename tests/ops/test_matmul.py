"""Every route of `ops.matmul` against the plain computation, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routes import draw, value_and_gradients

from maskclip_jax.ops import matmul


def plain_attention(q, k, v, mask):
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize("masks", [0, 1, 2], ids=["no mask", "one mask", "a mask each"])
def test_attention_head_by_head(monkeypatch, masks):
    q, k, v = draw(2, 3, 2, 4), draw(2, 5, 2, 4), draw(2, 5, 2, 4)
    mask = None
    if masks:
        mask = np.ones((masks, 1, 1, 5), bool)
        mask[0, ..., 3:] = mask[-1, ..., 0] = False
        mask = jnp.asarray(mask)
    wanted = value_and_gradients(lambda q, k, v: plain_attention(q, k, v, mask), q, k, v)
    for threshold in (1, 10**9):  # by head, and all heads at once
        monkeypatch.setattr(matmul, "_HEAD_BY_HEAD", threshold)
        got = value_and_gradients(lambda q, k, v: matmul.attend(q, k, v, mask), q, k, v)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)  # of sums of some ten products around 1


def test_low_precision_products_sum_in_float32():
    """4,096 times 1 · 1/256 is 16; summed in bfloat16 it would stop growing at 1 or 2."""
    x, kernel = jnp.ones((2, 3, 4096)), jnp.full((4096, 5), 1 / 256)
    out, to_x, to_kernel = value_and_gradients(lambda x, w: matmul.product(x, w, jnp.bfloat16), x, kernel)
    assert out.dtype == jnp.bfloat16
    assert to_x.dtype == to_kernel.dtype == jnp.float32
    np.testing.assert_array_equal(out, 16)
    weights = np.cos(np.arange(30)).reshape(6, 5).astype(np.float32)
    np.testing.assert_allclose(to_x.reshape(6, -1), weights @ np.asarray(kernel).T, atol=2e-4)
    np.testing.assert_allclose(to_kernel[0], weights.sum(axis=0), atol=2e-2)


def test_what_is_for_any_machine_is_traced_anew():
    """A program kept from before `portable` would have a CPU's routes in it; outside, one trace serves all calls."""
    traced = []

    def seen(x, times):
        traced.append(matmul.is_portable())
        return times * x

    function = matmul.jitted(seen, static_argnames="times")
    twice = lambda x: function(x, times=2) + function(x, times=2)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(twice)(np.ones(3)), 4)
    assert traced == [False]
    with matmul.portable():
        np.testing.assert_array_equal(jax.jit(lambda x: twice(x))(np.ones(3)), 4)
    assert traced == [False, True, True]
    np.testing.assert_array_equal(function(np.ones(3), times=2), 2)
    assert traced == [False, True, True]
