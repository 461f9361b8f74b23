"""Every route of `clip.convolutions` against XLA's convolution, values and gradients; and which is taken where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from routes import draw, value_and_gradients

from maskclip_jax.ops import conv, winograd


def plain(x, kernel, dilation):
    around = ((dilation * (kernel.shape[0] // 2),) * 2,) * 2
    return lax.conv_general_dilated(
        x, kernel, (1, 1), around, rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def assert_like_plain(function, x, kernel, dilation):
    wanted = value_and_gradients(lambda x, kernel: plain(x, kernel, dilation), x, kernel)
    got = value_and_gradients(lambda x, kernel: function(x, kernel, dilation), x, kernel)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())  # 100 roundings; a wrong tap is half of it


@pytest.mark.parametrize("dilation", [1, 4, 6], ids=["near", "at the border", "beyond the image"])
def test_by_taps(dilation):
    assert_like_plain(conv.by_taps, draw(2, 5, 7, 6), draw(3, 3, 6, 4), dilation)


@pytest.mark.parametrize("shape", [(4, 8), (5, 7), (1, 3)], ids=["whole tiles", "a part of one", "less than one"])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_winograd(shape, dilation):
    assert_like_plain(winograd.winograd, draw(2, *shape, 6), draw(3, 3, 6, 4), dilation)


def test_winograd_on_integers_is_exact():
    """All of its constants are halves: small integers come out as they are, a shifted tile would not."""
    x = jnp.asarray(np.random.default_rng(1).integers(-8, 8, (1, 6, 9, 3)), jnp.float32)
    kernel = jnp.asarray(np.random.default_rng(2).integers(-8, 8, (3, 3, 3, 2)) * 4, jnp.float32)
    np.testing.assert_array_equal(winograd.winograd(x, kernel, 2), plain(x, kernel, 2))


def test_winograd_under_vmap():
    """Ensembles of students are one `vmap` over their parameters."""
    x, kernels = draw(2, 4, 4, 3), draw(3, 3, 3, 3, 2)
    got = jax.vmap(lambda kernel: winograd.winograd(x, kernel, 1))(kernels)
    wanted = np.stack([plain(x, kernel, 1) for kernel in kernels])
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("side", [7, 8, 32, 33])
@pytest.mark.parametrize("dilation", [1, 2, 6, 12, 40])
def test_arithmetic_is_counted(side, dilation):
    taps = sum(0 <= i + shift < side for i in range(side) for shift in (-dilation, 0, dilation))
    assert conv._on_image(side, dilation) == taps
    tiles = jax.eval_shape(lambda: winograd._tiles(jnp.zeros((1, side, 5, 1)), dilation))[0][0].shape[0]
    assert winograd.arithmetic(side, 5, dilation) == 16 * tiles


CASES = {  # (image, kernel, stride, dilation, dtype, train): the route on a CPU
    "1×1": ((2, 9, 9, 64), (1, 1, 64, 8), 2, 1, "float32", True, "product"),
    "an RGB stem": ((2, 9, 9, 3), (7, 7, 3, 8), 2, 1, "float32", True, "im2col"),
    "layer 3 of a ResNet, training": ((2, 32, 32, 256), (3, 3, 256, 256), 1, 2, "float32", True, "winograd"),
    "the same once": ((2, 32, 32, 256), (3, 3, 256, 256), 1, 2, "float32", False, "taps"),
    "the same in bfloat16": ((2, 32, 32, 256), (3, 3, 256, 256), 1, 2, "bfloat16", True, "taps"),
    "few channels": ((2, 64, 64, 64), (3, 3, 64, 64), 1, 1, "float32", True, "xla"),
    "strided": ((2, 64, 64, 128), (3, 3, 128, 128), 2, 1, "float32", True, "xla"),
    "ASPP, dilation 6": ((2, 32, 32, 2048), (3, 3, 2048, 512), 1, 6, "float32", True, "winograd"),
    "ASPP, dilation 24": ((2, 32, 32, 2048), (3, 3, 2048, 512), 1, 24, "float32", True, "taps"),
}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Routes as on a CPU, whatever the tests run on: each computes the same everywhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("on_a_cpu")
def test_route(case):
    image, kernel, stride, dilation, dtype, train, wanted = CASES[case]
    options = {"stride": stride, "dilation": dilation, "dtype": dtype, "train": train}
    assert conv.route(image, kernel, **options) == wanted


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_accelerators_keep_their_own_convolution(monkeypatch, accelerator):
    monkeypatch.setattr(jax, "default_backend", lambda: accelerator)
    options = {"stride": 1, "dilation": 2, "dtype": "float32", "train": True}
    assert conv.route((2, 32, 32, 256), (3, 3, 256, 256), **options) == "xla"


@pytest.mark.parametrize("channels", [3, 6, 128], ids=["im2col", "taps", "winograd"])
@pytest.mark.usefixtures("on_a_cpu")
def test_convolve_by_every_route(channels):
    x, kernel = draw(1, 11, 8, channels), draw(3, 3, channels, channels) / 3 / channels**0.5
    options = {"stride": 1, "dilation": 2, "dtype": jnp.float32, "train": True}
    assert conv.route(x.shape, kernel.shape, **options) == {3: "im2col", 6: "taps", 128: "winograd"}[channels]
    np.testing.assert_allclose(conv.convolve(x, kernel, **options), plain(x, kernel, 2), atol=1e-5)
