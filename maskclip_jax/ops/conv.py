"""Convolutions, each by the route that is fastest where it runs.

XLA's general convolution is slow on CPUs where a matrix product is fast: 2.7 times for a 1×1 kernel, both ways. What is
computed never depends on the route. `docs/performance.md` has what each of them brought.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskclip_jax.ops import winograd
from maskclip_jax.ops.matmul import for_cpu, is_portable, jitted, product

# Up to this many input channels, a k×k convolution is k² slices and one matrix product (a stem, on RGB).
IM2COL_CHANNELS = 4
# From this dilation on, a CPU takes a k×k convolution as k² products of the parts that lie on the image.
_TAPS_DILATION = 2
# From this many channels on, and where it multiplies this much less than the taps, a CPU in training takes Winograd's.
_WINOGRAD_CHANNELS, _WINOGRAD_SHARE = 128, 0.75

Route = Literal["product", "im2col", "winograd", "taps", "xla"]


def convolve(
    x: Float[Array, "B H W i"],
    kernel: Float[Array, "k k i o"],
    *,
    stride: int,
    dilation: int,
    dtype: DTypeLike,
    train: bool = False,
) -> Float[Array, "B h w o"]:
    """A convolution of odd size k, padded by dilation · (k // 2) on every side, so that h = ⌈H / stride⌉; in `dtype`.

    `train`: it will run many times, and its gradient with it: then a route may take seconds to compile.
    """
    taken = route(x.shape, kernel.shape, stride=stride, dilation=dilation, dtype=dtype, train=train)
    return _by_route(x, kernel, taken, stride, dilation, jnp.dtype(dtype))


# Of a ResNet-101's layers nine tenths have another's shapes.
@functools.partial(jitted, static_argnames=("taken", "stride", "dilation", "dtype"))
def _by_route(x: Array, kernel: Array, taken: Route, stride: int, dilation: int, dtype: DTypeLike) -> Array:
    k, outputs = kernel.shape[0], kernel.shape[-1]
    if taken == "product":
        return product(x[:, ::stride, ::stride], kernel[0, 0], dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if taken == "im2col":
        return product(jnp.concatenate(taps(x, k, stride, dilation), axis=-1), kernel.reshape(-1, outputs), dtype)
    if taken == "winograd":
        return winograd.winograd(x, kernel, dilation)
    if taken == "taps":
        return by_taps(x, kernel, dilation)
    pad = dilation * (k // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def route(
    image: tuple[Any, ...], kernel: tuple[int, ...], *, stride: int, dilation: int, dtype: DTypeLike, train: bool
) -> Route:
    """Which way `convolve` goes for an `image` [B, H, W, i] and a `kernel` [k, k, i, o], given their shapes."""
    (_, height, width, _), (k, _, inputs, outputs) = image, kernel
    if is_portable():
        return "xla"
    if k == 1:
        return "product"
    if inputs <= IM2COL_CHANNELS:
        return "im2col"
    if stride != 1 or not for_cpu():
        return "xla"
    if train and k == 3 and min(inputs, outputs) >= _WINOGRAD_CHANNELS and jnp.dtype(dtype) == jnp.float32:
        on_image = _on_image(height, dilation) * _on_image(width, dilation)
        if winograd.arithmetic(height, width, dilation) <= _WINOGRAD_SHARE * on_image:
            return "winograd"
    return "taps" if dilation >= _TAPS_DILATION else "xla"


def _on_image(side: int, dilation: int) -> int:
    """How many pairs of a position and one of three taps lie on the image, along one axis."""
    return side + 2 * max(0, side - dilation)


def by_taps(x: Float[Array, "B h w i"], kernel: Float[Array, "k k i o"], dilation: int) -> Float[Array, "B h w o"]:
    """A product for each tap, of just the positions where it meets the image, not the zeros around it.

    At the dilations of an ASPP that is half of the arithmetic, and XLA's gradient of a dilated convolution runs at a
    third of a product's speed.
    """
    k, (height, width) = kernel.shape[0], x.shape[1:3]
    out = jnp.zeros((*x.shape[:3], kernel.shape[-1]), x.dtype)
    for i in range(k):
        for j in range(k):
            down, right = (i - k // 2) * dilation, (j - k // 2) * dilation
            if abs(down) >= height or abs(right) >= width:
                continue
            rows = max(0, down), min(height, height + down)
            columns = max(0, right), min(width, width + right)
            part = product(x[:, slice(*rows), slice(*columns)], kernel[i, j], x.dtype)
            around = ((0, 0), (max(0, -down), max(0, down)), (max(0, -right), max(0, right)), (0, 0))
            out = out + jnp.pad(part, around)
    return out


def taps(x: Float[Array, "B H W c"], kernel: int, stride: int, dilation: int) -> list[Array]:
    """The k² shifted (and strided) views of `x` that a k×k window sees, row by row; zeros beyond the border."""
    pad = dilation * (kernel // 2)
    height, width = (-(-size // stride) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def view(i: int, j: int) -> Array:
        top, left = i * dilation, j * dilation
        return x[:, top : top + stride * (height - 1) + 1 : stride, left : left + stride * (width - 1) + 1 : stride]

    return [view(i, j) for i in range(kernel) for j in range(kernel)]
