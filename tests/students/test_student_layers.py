"""The layers against independent NumPy transcriptions and hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from maskclip_jax.errors import UserError
from maskclip_jax.students import layers

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "features", "kernel", "stride", "dilation", "depthwise"),
    [
        (6, 5, 1, 1, 1, False),
        (6, 5, 1, 2, 1, False),
        (3, 5, 3, 2, 1, False),  # im2col
        (3, 4, 7, 2, 1, False),
        (6, 5, 3, 2, 1, False),
        (6, 5, 3, 1, 4, False),
        (6, 6, 3, 1, 2, True),
        (6, 6, 3, 2, 1, True),
    ],
)
def test_every_route_is_the_same_convolution(channels, features, kernel, stride, dilation, depthwise):
    conv = layers.Conv(features, kernel, stride, dilation, depthwise)
    x = jax.random.normal(KEY, (2, 9, 12, channels))
    variables = conv.init(KEY, x)
    assert variables["params"]["kernel"].shape == (kernel, kernel, 1 if depthwise else channels, features)

    def reference(variables, x):
        return lax.conv_general_dilated(
            x,
            variables["params"]["kernel"],
            (stride, stride),
            [(dilation * (kernel // 2),) * 2] * 2,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels if depthwise else 1,
        )

    np.testing.assert_allclose(conv.apply(variables, x), reference(variables, x), atol=2e-5)
    grads = [jax.grad(lambda v, x, f=f: jnp.sin(f(v, x)).sum(), (0, 1))(variables, x) for f in (conv.apply, reference)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *grads)


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2)])
def test_max_pool_is_the_maximum_of_each_window(size):
    x = np.asarray(jax.random.normal(KEY, (2, *size, 3)))
    out = np.asarray(layers.max_pool(jnp.asarray(x)))
    assert out.shape == (2, (size[0] + 1) // 2, (size[1] + 1) // 2, 3)
    for i, j in np.ndindex(out.shape[1:3]):
        window = x[:, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
        np.testing.assert_array_equal(out[:, i, j], window.max((1, 2)))


def test_max_pool_gradient_goes_to_the_maxima():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    grad = jax.grad(lambda x: layers.max_pool(x).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(grad, [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 1]])


def test_bilinear_matrices_by_hand():
    np.testing.assert_allclose(
        layers.bilinear_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    )  # PyTorch's documented upsampling of [1, 2]
    np.testing.assert_allclose(layers.bilinear_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(layers.bilinear_matrix(5, 2), [[0.25, 0.75, 0, 0, 0], [0, 0, 0, 0.75, 0.25]])
    np.testing.assert_allclose(layers.bilinear_matrix(3, 3), np.eye(3))


def test_adaptive_pool_matrix_by_hand():
    # five positions in three bins: [0, 2), [1, 4), [3, 5)
    expected = [[1 / 2, 1 / 2, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1 / 2, 1 / 2]]
    np.testing.assert_allclose(layers.adaptive_pool_matrix(5, 3), expected, rtol=1e-6)
    # fewer positions than bins: bins repeat
    np.testing.assert_allclose(layers.adaptive_pool_matrix(2, 3), [[1, 0], [0.5, 0.5], [0, 1]])


def test_matrices_of_images_in_a_batch_are_those_of_each_alone():
    sizes = [(5, 7), (3, 12), (6, 1), (1, 4)]
    old, new = (np.array(side, np.int32)[:, None, None] for side in zip(*sizes, strict=True))
    both = jax.jit(lambda old, new: (layers.bilinear_matrix(old, new, (12, 6)), layers.adaptive_pool_matrix(old, 3, 6)))
    found, pooled = map(np.asarray, both(old, new))
    for (source, target), matrix, pool in zip(sizes, found, pooled, strict=True):
        np.testing.assert_allclose(matrix[:target, :source], layers.bilinear_matrix(source, target), atol=1e-6)
        np.testing.assert_allclose(pool[:, :source], layers.adaptive_pool_matrix(source, 3), atol=1e-6)
        assert not matrix[:target, source:].any()
        assert not pool[:, source:].any()


def test_resize_and_pool_work_on_both_axes():
    x = jax.random.normal(KEY, (2, 5, 3, 4))
    rows, columns = layers.bilinear_matrix(5, 7), layers.bilinear_matrix(3, 9)
    expected = np.einsum("hH,wW,BHWc->Bhwc", rows, columns, x)
    np.testing.assert_allclose(layers.resize_bilinear(x, (7, 9)), expected, atol=1e-5)
    np.testing.assert_allclose(layers.adaptive_average_pool(x, 1)[:, 0, 0], x.mean((1, 2)), atol=1e-5)
    np.testing.assert_array_equal(layers.resize_bilinear(x[:, :1, :1], (2, 3)), jnp.tile(x[:, :1, :1], (1, 2, 3, 1)))
    np.testing.assert_allclose(layers.average_pool(x, 2)[:, 1, 0], x[:, 2:4, :2].mean((1, 2)), atol=1e-5)


def batch_norm_by_hand(x, scale, bias, mean, var):
    """PyTorch's BatchNorm2d in training: output by biased, running average by unbiased variance."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    batch_mean, biased = flat.mean(0), flat.var(0)
    out = (flat - batch_mean) / np.sqrt(biased + 1e-5) * scale + bias
    return out.reshape(x.shape), 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * flat.var(0, ddof=1)


@pytest.fixture
def norm_case():
    rng = np.random.default_rng(0)
    variables = {
        "params": {name: rng.normal(size=3).astype(np.float32) for name in ("scale", "bias")},
        "batch_stats": {name: rng.uniform(0.5, 2, 3).astype(np.float32) for name in ("mean", "var")},
    }
    return jax.tree.map(jnp.asarray, variables), jnp.asarray(rng.normal(0.5, 2, (4, 1, 2, 3)), jnp.float32)


def test_batch_norm_trains_and_evaluates_as_pytorch(norm_case):
    variables, x = norm_case
    stats = variables["batch_stats"]
    out, updates = layers.BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    expected, mean, var = batch_norm_by_hand(x, **variables["params"], **stats)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-5)
    evaluated = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * variables["params"]["scale"]
    np.testing.assert_allclose(
        layers.BatchNorm().apply(variables, x, False), evaluated + variables["params"]["bias"], atol=1e-5
    )


def test_sync_batch_norm_over_shards_is_batch_norm_of_the_whole(norm_case):
    variables, x = norm_case

    def loss(variables, x, axis_name):
        sync = None if axis_name is None else layers.SyncAxis(axis_name)
        out, updates = layers.BatchNorm(sync).apply(variables, x, True, mutable=["batch_stats"])
        return jnp.sin(out).sum(), (out, updates)

    alone = jax.jit(jax.value_and_grad(lambda x: loss(variables, x, None), has_aux=True))
    (_, (whole, stats)), grad = alone(x)

    def summed(x):
        shards = jax.vmap(lambda x: loss(variables, x, "batch"), axis_name="batch")(x.reshape(2, 2, 1, 2, 3))
        return shards[0].sum(), shards[1]

    (_, (parts, part_stats)), part_grad = jax.jit(jax.value_and_grad(summed, has_aux=True))(x)
    np.testing.assert_allclose(parts.reshape(x.shape), whole, atol=1e-5)
    np.testing.assert_allclose(part_grad, grad, atol=1e-5)
    jax.tree.map(lambda p, w: np.testing.assert_allclose(p, np.stack([w, w]), rtol=1e-5), part_stats, stats)


def test_batch_norm_keeps_float32_statistics_under_bfloat16(norm_case):
    variables, x = norm_case
    out, updates = layers.BatchNorm().apply(variables, jnp.asarray(x, jnp.bfloat16), True, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert updates["batch_stats"]["var"].dtype == jnp.float32


def test_batch_norm_refuses_a_single_value(norm_case):
    variables, x = norm_case
    with pytest.raises(UserError, match=r"at least 2 values per channel.*larger batch"):
        layers.BatchNorm().apply(variables, x[:1, :, :1], True, mutable=["batch_stats"])
