"""Matrix products and attention, each by the route that is fastest where it runs (convolutions: `ops/conv.py`).

What is computed never depends on the route. `docs/performance.md` has what each of them brought.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float

# From this many scores of a head on, a CPU takes attention one head at a time: they then stay in its cache.
_HEAD_BY_HEAD = 2**17


Function = TypeVar("Function", bound=Callable[..., Any])
_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """What is traced within is for any machine, its sizes perhaps symbolic: plain operations, no CPU's routes."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def is_portable() -> bool:
    """Whether `portable` is on."""
    return _PORTABLE.get()


def for_cpu() -> bool:
    """Whether what is traced runs on this machine's CPU, so that its routes are worth taking."""
    return not is_portable() and jax.default_backend() == "cpu"


def jitted(function: Function, static_argnames: str | Sequence[str] = ()) -> Function:
    """`jax.jit`, for functions whose routes `portable` changes: within that they are traced as part of their caller.

    Within another program such a function is traced once for all places with the same shapes.
    """
    compiled = jax.jit(function, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return (function if is_portable() else compiled)(*args, **options)

    return cast(Function, call)


def full_precision(dtype: DTypeLike) -> jnp.dtype:
    """What sums, norms and softmaxes are taken in beside `dtype`: float32, or float64 where `dtype` is that."""
    return jnp.promote_types(dtype, jnp.float32)


def in_full_precision(x: Array) -> Array:
    """`x` in `full_precision` of its own type."""
    return x.astype(full_precision(x.dtype))


def product(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dtype: DTypeLike) -> Float[Array, "*batch o"]:
    """`x W` over the last axis, in `dtype` (its sums in `full_precision`): one 2-D product, on CPU twice as fast in
    training as over 3-D."""
    flat, kernel = x.reshape(-1, x.shape[-1]).astype(dtype), kernel.astype(dtype)
    out = flat @ kernel if full_precision(dtype) == dtype else _low_precision(flat, kernel)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _low_precision(x: Float[Array, "n i"], kernel: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """Takes float32 sums and rounds once: what accelerators do anyway, and the one form that reaches a CPU's
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


def unit(x: Float[Array | np.ndarray, "*b D"], axis: int = -1) -> Float[Array, "*b D"]:
    """Vectors of length one along an axis; zero where they are zero. rsqrt of a floored square, not a division by a
    norm: it has a gradient there too."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=axis, keepdims=True), 1e-24))


def similarity(
    tokens: Float[Array | np.ndarray, "B L D"], valid: Bool[Array, "B L"] | None = None
) -> Float[Array, "B L L"]:
    """The cosine of every two tokens of an image, in full precision; 0 from and to those that are not `valid`."""
    x = in_full_precision(tokens if valid is None else jnp.where(valid[..., None], tokens, 0))
    return jnp.einsum("bid,bjd->bij", unit(x), unit(x), precision="highest")


def alike(similarity: Float[Array, "B L L"], threshold: ArrayLike) -> Float[Array, "B L L"]:
    """Weights of a mean over what is alike: similarities of at least `threshold`, divided by their sum."""
    kept = jnp.where(similarity < threshold, 0, similarity)
    return kept / (kept.sum(axis=-1, keepdims=True) + 1e-6)


def mixed(
    weights: Float[Array | np.ndarray, "B M L"], x: Float[Array | np.ndarray, "B L *d"]
) -> Float[Array, "B M *d"]:
    """`Σ_j weights_ij x_j`: values [B, L, heads, d] or features [B, L, E], in their own type."""
    return jnp.einsum("bml,bl...->bm...", weights.astype(x.dtype), x)


def attend(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B K N d"],
    v: Float[Array, "B K N d"],
    mask: Bool[Array, "#B 1 #Q K"] | None = None,
) -> Float[Array, "B Q N d"]:
    """Softmax attention, the softmax in full precision; `mask` is True where a query may look at a key."""
    if for_cpu() and q.shape[1] * k.shape[1] >= _HEAD_BY_HEAD:
        return _attend_by_head(q, k, v, mask).astype(v.dtype)
    return jnp.einsum("bnqk,bknd->bqnd", attention_matrix(q, k, mask).astype(v.dtype), v)


def attention_matrix(
    q: Float[Array, "B Q N d"],
    k: Float[Array, "B K N d"],
    mask: Bool[Array, "#B 1 #Q K"] | None = None,
    bias: Float[Array | np.ndarray, "#Q K"] | None = None,
) -> Float[Array, "B N Q K"]:
    """softmax(q kᵀ s + bias) in full precision; arguments as in `attend`."""
    scores = in_full_precision(jnp.einsum("bqnd,bknd->bnqk", q * q.shape[-1] ** -0.5, k))
    scores = scores if bias is None else scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def _attend_by_head(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """One head of one image at a time, in full precision, divided by the softmax's sum only after the last product."""
    batch, queries, heads, width = q.shape

    def by_head(x: Array, *axes: int) -> Array:
        """[B N, …]: every product of the loop is then one of plain matrices, none of them transposed."""
        x = in_full_precision(x).transpose(0, 2, *axes)
        return x.reshape(batch * heads, *x.shape[2:])

    q, k, v = by_head(q * width**-0.5, 1, 3), by_head(k, 3, 1), by_head(v, 1, 3)
    image = np.arange(batch * heads) // heads * (mask is not None and mask.shape[0] > 1)

    def head(parts: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, index = parts
        scores = q @ k
        if mask is not None:
            scores = jnp.where(mask[index, 0], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        return (weights @ v) / weights.sum(axis=-1, keepdims=True)

    out = lax.map(head, (q, k, v, jnp.asarray(image)))
    return out.reshape(batch, heads, queries, width).swapaxes(1, 2)
