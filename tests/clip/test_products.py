"""Every route of `clip.products` against the plain computation, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maskclip_jax.clip import products

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def plain_attention(q, k, v, mask):
    scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bnqk,bknd->bqnd", jax.nn.softmax(scores), v)


def value_and_gradients(function, *arrays):
    """The function's value, and the gradients of a sum that weighs every entry differently."""

    def weighed(*arrays):
        out = function(*arrays)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighed, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *gradients


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
        monkeypatch.setattr(products, "_HEAD_BY_HEAD", threshold)
        got = value_and_gradients(lambda q, k, v: products.attend(q, k, v, mask), q, k, v)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("dilation", [1, 4, 6], ids=["near", "at the border", "beyond the image"])
def test_convolution_by_taps(dilation):
    x, kernel = draw(2, 5, 7, 6), draw(3, 3, 6, 4)

    def plain(x, kernel):
        around = ((dilation, dilation),) * 2
        return lax.conv_general_dilated(
            x, kernel, (1, 1), around, rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    wanted = value_and_gradients(plain, x, kernel)
    got = value_and_gradients(lambda x, kernel: products._convolve_by_taps(x, kernel, dilation), x, kernel)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_low_precision_products_sum_in_float32():
    """4,096 times 1 · 1/256 is 16; summed in bfloat16 it would stop growing at 1 or 2."""
    x, kernel = jnp.ones((2, 3, 4096)), jnp.full((4096, 5), 1 / 256)
    out, to_x, to_kernel = value_and_gradients(lambda x, w: products.product(x, w, jnp.bfloat16), x, kernel)
    assert out.dtype == jnp.bfloat16
    assert to_x.dtype == to_kernel.dtype == jnp.float32
    np.testing.assert_array_equal(out, 16)
    weights = np.cos(np.arange(30)).reshape(6, 5).astype(np.float32)
    np.testing.assert_allclose(to_x.reshape(6, -1), weights @ np.asarray(kernel).T, atol=2e-4)
    np.testing.assert_allclose(to_kernel[0], weights.sum(axis=0), atol=2e-2)
