"""The few layers every student is made of, with PyTorch's numerics and parameter shapes that never depend on the route.

Kernels of a convolution are [k, k, in, out] (HWIO), whichever route `ops/conv.py` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.errors import UserError
from maskclip_jax.ops.conv import convolve, taps
from maskclip_jax.ops.matmul import full_precision, in_full_precision
from maskclip_jax.ops.module import Module

# mmcv's kaiming_init: normal, std = sqrt(2 / (out · k · k)); the uncut normal, as PyTorch's.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class SyncAxis(NamedTuple):
    """Devices that share batch statistics (SyncBN): all of a mapped axis, or each `group` in a row."""

    name: str
    group: int | None = None

    def groups(self) -> list[list[int]] | None:
        """Of the axis's places, where there is more than one group; traced."""
        devices = lax.psum(1, self.name)
        if self.group is None or self.group == devices:
            return None
        return [list(range(first, first + self.group)) for first in range(0, devices, self.group)]


class Valid(NamedTuple):
    """Which rows and columns of each image in a padded batch are image: padding is below and on the right."""

    rows: Bool[Array, "B H"]
    columns: Bool[Array, "B W"]


def valid_part(sizes: Int[Array, "B 2"], shape: Sequence[int]) -> Valid:
    """Of images of `sizes` (height, width) in an array of `shape` (H, W)."""
    return Valid(*(jnp.arange(side) < sizes[:, axis, None] for axis, side in enumerate(shape)))


def strided(valid: Valid | None, stride: int, whole: bool = False) -> Valid | None:
    """After a convolution or pool of that stride: ⌈n / stride⌉ of n rows are image, or with `whole` ⌊n / stride⌋."""
    first = stride - 1 if whole else 0
    return None if valid is None else Valid(*(mask[:, first::stride] for mask in valid))


def masked(x: Float[Array, "B H W c"], valid: Valid | None) -> Float[Array, "B H W c"]:
    """`x` with zeros outside the image, which is what a convolution meets at an image's border."""
    if valid is None:
        return x
    return jnp.where((valid.rows[:, :, None] & valid.columns[:, None])[..., None], x, 0)


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
    def __call__(
        self, x: Float[Array, "B H W c"], train: bool = False, valid: Valid | None = None
    ) -> Float[Array, "B h w d"]:
        """[B, H, W, c] -> [B, ceil(H / stride), ceil(W / stride), features], in `dtype`; `train`: as `convolve`'s.

        What it gives for an image in a padded batch, of which `valid` is image, is what it gives for that image alone.
        """
        channels, k = x.shape[-1], self.kernel
        x = masked(x, valid) if k > 1 else x
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
    pooled branch that is a different network in evaluation. With `sync` the statistics are those of the batch of all
    its devices, or of a group of them. Parameters `scale`, `bias` and statistics `mean`, `var` are [c], in the input's
    full precision.

    Raises:
        UserError: in training, when a channel has a single value to take statistics of (PyTorch refuses too).
    """

    sync: SyncAxis | None = None
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
        if self.sync is not None:
            groups = self.sync.groups()
            mean, square = lax.pmean((mean, square), self.sync.name, axis_index_groups=groups)
            count *= len(groups[0]) if groups else lax.psum(1, self.sync.name)
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
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool, valid: Valid | None = None) -> Float[Array, "B h w d"]:
        conv = Conv(self.features, self.kernel, self.stride, self.dilation, self.depthwise, self.dtype, name="conv")
        x = conv(x, train, valid)
        return nn.relu(BatchNorm(self.sync, name="bn")(x, train))


class SeparableConv(nn.Module):
    """A 3×3 depthwise then a 1×1 pointwise ConvBNReLU (Chollet 2017; the ReLU between the two is DeepLabv3+'s)."""

    features: int
    dilation: int = 1
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], train: bool, valid: Valid | None = None) -> Float[Array, "B h w d"]:
        common = {"sync": self.sync, "dtype": self.dtype}
        depthwise = ConvBNReLU(x.shape[-1], 3, 1, self.dilation, True, **common, name="depthwise")
        return ConvBNReLU(self.features, **common, name="pointwise")(depthwise(x, train, valid), train)


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


def bilinear_matrix(source: Any, target: Any, shape: Sequence[int] | None = None) -> Any:
    """[target, source]: PyTorch's bilinear interpolation, align_corners=False, no antialias, along one axis.

    Sizes are numbers, and the result is float64; or they are int32 [B, 1, 1], of images in a padded batch, and it is
    [B, *shape], zero in the columns of padding. Symbolic sizes (`ops.matmul.portable`) are traced too.
    """
    if shape is None and not (is_number(source) and is_number(target)):
        source, target, shape = jnp.asarray(source), jnp.asarray(target), (target, source)
    xp, (rows, columns) = (np, (target, source)) if shape is None else (jnp, shape)
    ahead = xp.maximum((2 * xp.arange(rows)[:, None] + 1) * source - target, 0)  # of the position, times 2 · target
    low = xp.minimum(ahead // (2 * target), source - 1)
    fraction = xp.where(low < source - 1, ahead - 2 * target * low, 0) / (2 * target)
    return xp.maximum(xp.arange(columns) == low, 0) * (1 - fraction) + (xp.arange(columns) == low + 1) * fraction


def adaptive_pool_matrix(source: Any, target: int, columns: int | None = None) -> Any:
    """[target, source]: PyTorch's AdaptiveAvgPool along one axis (bins may overlap).

    `source` is a number, and the result is float64; or it is int32 [B, 1, 1], and it is [B, target, columns].
    """
    if columns is None and not is_number(source):  # symbolic
        source, columns = jnp.asarray(source), source
    xp, columns = (np, source) if columns is None else (jnp, columns)
    bins, place = xp.arange(target)[:, None], xp.arange(columns)
    start, stop = bins * source // target, -(-(bins + 1) * source // target)
    return ((start <= place) & (place < stop)) / (stop - start)


def is_number(size: Any) -> bool:
    """Whether a size is a number, none that a program for any size has."""
    return isinstance(size, int | np.integer)


def _count(mask: Bool[Array, "B N"]) -> Int[Array, "B 1 1"]:
    return mask.sum(1)[:, None, None]


def apply_separable(x: Float[Array, "B H W c"], rows: Any, columns: Any) -> Float[Array, "B h w c"]:
    """`rows` [h, H] and `columns` [w, W] (or [B, …]) applied to the two image axes; exact products, in x's dtype."""
    high = {"precision": lax.Precision.HIGHEST}
    axes = "B" * (rows.ndim - 2)
    x = jnp.einsum(f"{axes}hH,BHWc->BhWc", rows.astype(x.dtype), x, **high)
    return jnp.einsum(f"{axes}wW,BhWc->Bhwc", columns.astype(x.dtype), x, **high)


def resize_bilinear(
    x: Float[Array, "B H W c"], size: Sequence[int], source: Valid | None = None, target: Valid | None = None
) -> Float[Array, "B h w c"]:
    """To `size` (h, w), as PyTorch's `F.interpolate(mode="bilinear", align_corners=False)`.

    In a padded batch `target` says what of the result is image, and `source` what of `x` (None: all of it).
    """
    if tuple(x.shape[1:3]) == tuple(size) and target is None:
        return x
    if x.shape[1:3] == (1, 1):
        return jnp.broadcast_to(x, (x.shape[0], *size, x.shape[3]))
    sides = zip(x.shape[1:3], size, source or (None, None), target or (None, None), strict=True)
    matrices = (
        bilinear_matrix(n, m)
        if new is None
        else bilinear_matrix(jnp.int32(n) if old is None else _count(old), _count(new), (m, n))
        for n, m, old, new in sides
    )
    return apply_separable(x, *matrices)


def adaptive_average_pool(x: Float[Array, "B H W c"], size: int, valid: Valid | None = None) -> Float[Array, "B h w c"]:
    """To size×size, as PyTorch's AdaptiveAvgPool2d; the sums are taken in full precision."""
    sides = zip(x.shape[1:3], valid or (None, None), strict=True)
    matrices = (
        adaptive_pool_matrix(n, size) if mask is None else adaptive_pool_matrix(_count(mask), size, n)
        for n, mask in sides
    )
    return apply_separable(in_full_precision(x), *matrices).astype(x.dtype)
