"""The matrix products that nearly all time goes into, each by the route that is fastest where it runs.

What is computed never depends on the route. `docs/performance.md` has what each of them brought.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# Up to this many input channels, a k×k convolution is k² slices and one matrix product (a stem, on RGB).
IM2COL_CHANNELS = 4
# From this dilation on, a CPU takes a k×k convolution as k² products of the parts that lie on the image.
_TAPS_DILATION = 2
# From this many scores of a head on, a CPU takes attention one head at a time: they then stay in its cache.
_HEAD_BY_HEAD = 2**17


def product(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: DTypeLike) -> Float[Array, "*batch o"]:
    """`x W` over the last axis, in `dtype` (its sums in float32): one 2-D product, on CPU twice as fast in training as
    over 3-D."""
    flat, kernel = x.reshape(-1, x.shape[-1]).astype(dtype), kernel.astype(dtype)
    out = flat @ kernel if jnp.dtype(dtype) == jnp.float32 else _low_precision(flat, kernel)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _low_precision(x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """Asks for float32 sums and rounds once: what accelerators do anyway, and the one form that reaches a CPU's
    bfloat16 units (AMX). The gradient by hand, for JAX's own would multiply float32 with bfloat16."""
    return _float32_sums(x, kernel, 1, 0)


def _float32_sums(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    out = lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(a.dtype)


def _low_precision_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _float32_sums(x, kernel, 1, 0), (x, kernel)


def _low_precision_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return _float32_sums(g, kernel, 1, 1), _float32_sums(x, g, 0, 0)


_low_precision.defvjp(_low_precision_forward, _low_precision_backward)


def convolve(
    x: Float[Array, "B H W i"], kernel: Float[Array, "k k i o"], *, stride: int, dilation: int, dtype: DTypeLike
) -> Float[Array, "B h w o"]:
    """A convolution of odd size k, padded by dilation · (k // 2) on every side, so that h = ⌈H / stride⌉; in `dtype`.

    XLA's general convolution is slow on CPUs where a matrix product is fast: 2.7 times for a 1×1 kernel, both ways.
    """
    k, _, inputs, outputs = kernel.shape
    if k == 1:
        return product(x[:, ::stride, ::stride], kernel[0, 0], dtype)
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if inputs <= IM2COL_CHANNELS:
        return product(jnp.concatenate(taps(x, k, stride, dilation), axis=-1), kernel.reshape(-1, outputs), dtype)
    if dilation >= _TAPS_DILATION and stride == 1 and jax.default_backend() == "cpu":
        return _convolve_by_taps(x, kernel, dilation)
    pad = dilation * (k // 2)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _convolve_by_taps(x: Float[Array, "B h w i"], kernel: Float[Array, "k k i o"], dilation: int) -> Array:
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


def attend(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B K N d"],
    v: Float[Array, "B K N d"],
    mask: Bool[Array, "#B 1 #Q K"] | None = None,
) -> Float[Array, "B Q N d"]:
    """Softmax attention, the softmax in float32; `mask` is True where a query may look at a key."""
    if jax.default_backend() == "cpu" and q.shape[1] * k.shape[1] >= _HEAD_BY_HEAD:
        return _attend_by_head(q, k, v, mask).astype(v.dtype)
    scores = jnp.einsum("bqnd,bknd->bnqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", weights, v)


def _attend_by_head(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """One head of one image at a time, in float32, divided by the softmax's sum only after the last product."""
    batch, queries, heads, width = q.shape

    def by_head(x: Array, *axes: int) -> Array:
        """[B N, …]: every product of the loop is then one of plain matrices, none of them transposed."""
        x = x.astype(jnp.float32).transpose(0, 2, *axes)
        return x.reshape(batch * heads, *x.shape[2:])

    q, k, v = by_head(q * width**-0.5, 1, 3), by_head(k, 3, 1), by_head(v, 1, 3)
    image = np.arange(batch * heads) // heads * (mask is not None and mask.shape[0] > 1)

    def head(parts: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, index = parts
        scores = q @ k
        if mask is not None:
            scores = jnp.where(mask[index, 0], scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        return (weights @ v) / weights.sum(axis=-1, keepdims=True)

    out = lax.map(head, (q, k, v, jnp.asarray(image)))
    return out.reshape(batch, heads, queries, width).swapaxes(1, 2)
