"""The few layers every student is made of, with PyTorch's numerics and parameter shapes that never depend on the route.

Kernels of a convolution are [k, k, in, out] (HWIO), whichever route `ops/conv.py` takes.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskclip_jax.errors import UserError
from maskclip_jax.ops.conv import convolve, taps
from maskclip_jax.ops.matmul import full_precision, in_full_precision
from maskclip_jax.ops.module import Module

# mmcv's kaiming_init: normal, std = sqrt(2 / (out · k · k)); the uncut normal, as PyTorch's.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(Module):
    """A convolution with an odd kernel, padded by dilation·(k // 2) as PyTorch's students are; no bias.

    Args:
        features: output channels.
        kernel: k; the parameter `kernel` is [k, k, in, out] ([k, k, 1, out] when depthwise).
        stride, dilation: as in PyTorch.
        depthwise: one filter per channel (`features` must equal the input's channels).
        dtype: what it is computed in; parameters are float32, or float64 where that is it.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool = False) -> Float[Array, "B h w d"]:
        """[B, H, W, c] -> [B, ceil(H / stride), ceil(W / stride), features], in `dtype`; `train`: as `convolve`'s."""
        channels, k = x.shape[-1], self.kernel
        shape = (k, k, 1 if self.depthwise else channels, self.features)
        weight = self.param("kernel", kaiming_normal, shape, full_precision(self.dtype)).astype(self.dtype)
        if self.depthwise:
            # XLA's grouped convolution has a gradient eleven times slower than nine multiply-adds (2 CPUs, 512 × 32²)
            views = taps(x.astype(self.dtype), k, self.stride, self.dilation)
            return sum(view * weight[i // k, i % k, 0] for i, view in enumerate(views))
        return convolve(x, weight, stride=self.stride, dilation=self.dilation, dtype=self.dtype, train=train)


class BatchNorm(Module):
    """Batch normalisation exactly as PyTorch's (Sync)BatchNorm2d: eps 1e-5, momentum 0.1, unbiased running variance.

    `flax.linen.BatchNorm` keeps the *biased* variance in its running average; with the 1 to 16 values per channel of a
    pooled branch that is a different network in evaluation. With `axis_name` the statistics are those of the global
    batch (SyncBN). Parameters `scale`, `bias` and statistics `mean`, `var` are [c], in the input's full precision.

    Raises:
        UserError: in training, when a channel has a single value to take statistics of (PyTorch refuses too).
    """

    axis_name: str | None = None
    momentum: float = 0.1  # PyTorch's sense: the weight of the new value
    epsilon: float = 1e-5
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w c"]:
        channels, dtype = (x.shape[-1],), full_precision(x.dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        scale_init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        scale = self.param("scale", scale_init, channels, dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, dtype)
        if train and not self.is_initializing():
            mean, var, count = self._batch_statistics(x)
            if self.is_mutable_collection("batch_stats"):
                unbiased = var * (count / (count - 1))
                running_mean.value += self.momentum * (lax.stop_gradient(mean) - running_mean.value)
                running_var.value += self.momentum * (lax.stop_gradient(unbiased) - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        # One multiply-add in full precision, rounded once: in bfloat16 subtracting the mean would lose the signal.
        return (x.astype(dtype) * gain + (bias - mean * gain)).astype(x.dtype)

    def _batch_statistics(self, x: Float[Array, "B h w c"]) -> tuple[Float[Array, " c"], Float[Array, " c"], int]:
        values = in_full_precision(x)
        mean, square = values.mean((0, 1, 2)), jnp.square(values).mean((0, 1, 2))
        count = int(np.prod(x.shape[:3]))
        if self.axis_name is not None:
            mean, square = lax.pmean((mean, square), self.axis_name)
            count *= lax.psum(1, self.axis_name)
        if count < 2:
            raise UserError(
                f"batch normalisation needs at least 2 values per channel to train, {self.name} has {count} "
                f"({x.shape[1]}×{x.shape[2]} positions, batch {x.shape[0]}): use a larger batch"
            )
        return mean, jnp.maximum(square - jnp.square(mean), 0.0), count


class ConvBNReLU(nn.Module):
    """Conv (`conv`), batch norm (`bn`), ReLU: mmcv's ConvModule."""

    features: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool) -> Float[Array, "B h w d"]:
        conv = Conv(self.features, self.kernel, self.stride, self.dilation, self.depthwise, self.dtype, name="conv")
        x = conv(x, train)
        return nn.relu(BatchNorm(self.axis_name, name="bn")(x, train))


class SeparableConv(nn.Module):
    """A 3×3 depthwise then a 1×1 pointwise ConvBNReLU (Chollet 2017; the ReLU between the two is DeepLabv3+'s)."""

    features: int
    dilation: int = 1
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool) -> Float[Array, "B h w d"]:
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        depthwise = ConvBNReLU(x.shape[-1], 3, 1, self.dilation, True, **common, name="depthwise")
        return ConvBNReLU(self.features, **common, name="pointwise")(depthwise(x, train), train)


def max_pool(x: Float[Array, "B H W c"]) -> Float[Array, "B h w c"]:
    """3×3 maximum at stride 2, padding 1: [B, H, W, c] -> [B, ceil(H/2), ceil(W/2), c].

    Rows, then columns, each the elementwise maximum of three strided slices: its gradient is selects and pads, where
    `reduce_window`'s is `select_and_scatter`, many times slower on CPUs. At a tie the gradient is shared among the
    equal values (PyTorch gives it to the first); after a ReLU ties are zeros, whose gradient the ReLU drops anyway.
    """
    for axis in (1, 2):
        out = -(-x.shape[axis] // 2)
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        first, second, third = (lax.slice_in_dim(padded, i, i + 2 * out - 1, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def average_pool(x: Float[Array, "B H W c"], size: int) -> Float[Array, "B h w c"]:
    """size×size mean at stride `size`; rows and columns left over at the end are dropped (PyTorch's AvgPool2d)."""
    if size == 1:
        return x
    h, w = x.shape[1] // size, x.shape[2] // size
    blocks = x[:, : h * size, : w * size].reshape(x.shape[0], h, size, w, size, x.shape[3])
    return blocks.mean((2, 4))


def bilinear_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] float64: PyTorch's bilinear interpolation, align_corners=False, no antialias, along one axis."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, None)
    low = np.minimum(np.floor(position).astype(int), source - 1)
    high = np.minimum(low + 1, source - 1)
    fraction = np.where(high > low, position - low, 0.0)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - fraction)
    np.add.at(matrix, (np.arange(target), high), fraction)
    return matrix


def adaptive_pool_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] float64: PyTorch's AdaptiveAvgPool along one axis (bins may overlap)."""
    matrix = np.zeros((target, source))
    for i in range(target):
        start, stop = i * source // target, -(-(i + 1) * source // target)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def apply_separable(x: Float[Array, "B H W c"], rows: np.ndarray, columns: np.ndarray) -> Float[Array, "B h w c"]:
    """`rows` [h, H] and `columns` [w, W] applied to the two image axes; exact products, in x's dtype."""
    high = {"precision": lax.Precision.HIGHEST}
    x = jnp.einsum("hH,BHWc->BhWc", rows.astype(x.dtype), x, **high)
    return jnp.einsum("wW,BhWc->Bhwc", columns.astype(x.dtype), x, **high)


def resize_bilinear(x: Float[Array, "B H W c"], size: Sequence[int]) -> Float[Array, "B h w c"]:
    """To `size` (h, w), as PyTorch's `F.interpolate(mode="bilinear", align_corners=False)`."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    if x.shape[1:3] == (1, 1):
        return jnp.broadcast_to(x, (x.shape[0], *size, x.shape[3]))
    return apply_separable(x, bilinear_matrix(x.shape[1], size[0]), bilinear_matrix(x.shape[2], size[1]))


def adaptive_average_pool(x: Float[Array, "B H W c"], size: int) -> Float[Array, "B h w c"]:
    """To size×size, as PyTorch's AdaptiveAvgPool2d; the sums are taken in full precision."""
    rows, columns = adaptive_pool_matrix(x.shape[1], size), adaptive_pool_matrix(x.shape[2], size)
    return apply_separable(in_full_precision(x), rows, columns).astype(x.dtype)
