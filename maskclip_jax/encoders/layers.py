"""The pieces both towers share. Parameter names follow OpenAI's checkpoints; kernels are `[in, out]` and HWIO."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.ops.conv import convolve
from maskclip_jax.ops.matmul import attend as attend
from maskclip_jax.ops.matmul import full_precision, in_full_precision, product
from maskclip_jax.ops.module import LayerNorm, Module

Dtype = jnp.dtype | type


def quick_gelu(x: Array) -> Array:
    """OpenAI's fast GELU, `x · sigmoid(1.702 x)`, in full precision; by way of tanh, which CPUs do twice as fast."""
    wide = in_full_precision(x)
    return (wide * (0.5 + 0.5 * jnp.tanh(0.851 * wide))).astype(x.dtype)


def gelu(x: Array) -> Array:
    """Exact GELU (with erf)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class Linear(Module):
    """`x W + b` over the last axis."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch i"]) -> Float[Array, "*batch o"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        out = product(x, kernel, self.dtype)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


def layer_norm(epsilon: float, dtype: Dtype = jnp.float32) -> LayerNorm:
    """Layer normalisation in full precision whatever the dtype around it, with the two-pass variance of PyTorch's."""
    return LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=full_precision(dtype))


class Conv(Module):
    """A convolution without bias, kernel HWIO, padding `dilation · (k // 2)` on every side."""

    features: int
    size: int = 3
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W i"], dilation: int = 1) -> Float[Array, "B H2 W2 o"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return convolve(x, kernel, stride=self.stride, dilation=dilation, dtype=self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention whose value and key projections can be read on their own (paper, section 3.1)."""

    width: int
    heads: int
    dtype: Dtype = jnp.float32

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(self.width, dtype=self.dtype) for _ in range(4))

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "#B 1 #T T"] | None = None) -> Float[Array, "B T D"]:
        """`mask` is True where a query (third axis) may look at a key (fourth axis)."""
        q, k, v = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self._merge(attend(q, k, v, mask)))

    def read(self, x: Float[Array, "B T D"], attention: Callable[[Array, Array, Array], Array]) -> tuple[Array, Array]:
        """What comes out when `attention` (of q, k, v, each [B, T, N, d]) replaces the softmax; and the keys."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self._merge(attention(*map(self._split, (q, k, v))))), k

    def value(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`W_o (W_v x + b_v) + b_o`: what attention would give if every token looked only at itself (equation 4)."""
        return self.out_proj(self.v_proj(x))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _merge(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1)


class MLP(nn.Module):
    """`c_proj(act(c_fc(x)))`."""

    width: int
    hidden: int
    activation: str
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = Linear(self.hidden, dtype=self.dtype, name="c_fc")(x)
        return Linear(self.width, dtype=self.dtype, name="c_proj")(ACTIVATIONS[self.activation](x))


class Block(nn.Module):
    """A pre-norm transformer block; `dense` is the same block with the attention matrix replaced by the identity."""

    width: int
    heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    dtype: Dtype = jnp.float32

    def setup(self):
        self.ln_1, self.ln_2 = (layer_norm(self.layer_norm_eps, self.dtype) for _ in range(2))
        self.attn = Attention(self.width, self.heads, self.dtype)
        self.mlp = MLP(self.width, self.mlp_width, self.activation, self.dtype)

    def __call__(self, x: Float[Array, "B T D"], mask: Array | None = None) -> Float[Array, "B T D"]:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))

    def dense(
        self, x: Float[Array, "B L D"], keys: str, folded: dict | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """Tokens after the value path, and the keys for smoothing (docs/method.md, section 2)."""
        y = self.ln_1(x)
        z = x + (self.attn.value(y) if folded is None else apply_folded(folded, y, self.dtype))
        k = self.attn.k_proj(y)
        k = self.attn.out_proj(k) if keys == "out_proj" else k
        return z + self.mlp(self.ln_2(z)), k

    def read(
        self,
        x: Float[Array, "B T D"],
        beside: Float[Array, "B T D"],
        attention: Callable[[Array, Array, Array, Array], Array],
        *,
        residual: bool,
        mlp: bool,
        keys: str,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """One block of a reading that runs on a path beside the tower, and the keys; `attention` takes tokens, q, k, v.

        q, k and v come from the tower's own tokens `x`; residual and MLP, where kept, act on the path.
        """
        y = self.ln_1(x)
        z, k = self.attn.read(y, lambda q, k, v: attention(y, q, k, v))
        z = beside + z if residual else z
        z = z + self.mlp(self.ln_2(z)) if mlp else z
        return z, self.attn.out_proj(k) if keys == "out_proj" else k


def fold_linear(first: dict, second: dict) -> dict:
    """One `{kernel, bias}` for `second(first(x))`: `W = W1 W2`, `b = b1 W2 + b2`."""
    return {
        "kernel": first["kernel"] @ second["kernel"],
        "bias": first["bias"] @ second["kernel"] + second["bias"],
    }


def apply_folded(folded: dict, x: Float[Array, "*batch i"], dtype: Dtype) -> Float[Array, "*batch o"]:
    """`x W + b` with the arrays `fold_linear` made."""
    return product(x, folded["kernel"], dtype) + folded["bias"].astype(dtype)


class Transformer(nn.Module):
    """`resblocks_0 … resblocks_{n-1}`; the last block can be left to the caller."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    dtype: Dtype = jnp.float32

    def setup(self):
        self.resblocks = [
            Block(self.width, self.heads, self.mlp_width, self.activation, self.layer_norm_eps, self.dtype)
            for _ in range(self.layers)
        ]

    def __call__(self, x: Float[Array, "B T D"], mask: Array | None = None) -> Float[Array, "B T D"]:
        return self.last(self.penultimate(x, mask), mask)

    def penultimate(self, x: Float[Array, "B T D"], mask: Array | None = None) -> Float[Array, "B T D"]:
        """All blocks but the last."""
        for block in self.resblocks[:-1]:
            x = block(x, mask)
        return x

    def last(self, x: Float[Array, "B T D"], mask: Array | None = None) -> Float[Array, "B T D"]:
        """The last block with its attention as trained."""
        return self.resblocks[-1](x, mask)

    def last_dense(self, x: Float[Array, "B L D"], keys: str, folded: dict | None) -> tuple[Array, Array]:
        """The last block, read through its values."""
        return self.resblocks[-1].dense(x, keys, folded)


def resize_positions(
    table: Float[Array, "n D"], trained: int, grid: Int[Array, "B 2"] | None, shape: tuple[int, int]
) -> Float[Array, "#B h w D"]:
    """Position embeddings of a `trained × trained` grid at another size: bicubic, a = -0.75, no antialias.

    The interpolation is separable and linear, so two small matrices do it. They are made from `grid`, the *traced*
    valid size `(h, w)` of every image inside a padded batch of static `shape`: one compiled program serves them all.
    Beyond an image's valid size the result is meaningless (those tokens are masked).
    """
    h, w = shape
    grid = jnp.asarray([[h, w]] if grid is None else grid, full_precision(table.dtype))
    rows = jax.vmap(lambda n: cubic_matrix(trained, n, h))(grid[:, 0])
    columns = jax.vmap(lambda n: cubic_matrix(trained, n, w))(grid[:, 1])
    square = table.reshape(trained, trained, -1)
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("bhi,bwj,ijd->bhwd", rows, columns, square)


def cubic_matrix(n_in: int, n_out: Float[Array, ""], rows: int) -> Float[Array, "rows n_in"]:
    """`rows` rows of the matrix that interpolates `n_in` samples at `n_out` centres, as `F.interpolate(bicubic)` does.

    `maskclip_jax.data.preprocess.interpolation_matrix` makes the same matrix on the host; here `n_out` is traced.
    """
    a = -0.75
    x = (jnp.arange(rows) + 0.5) * (n_in / n_out) - 0.5
    base = jnp.floor(x)
    matrix = jnp.zeros((rows, n_in))
    for tap in (-1, 0, 1, 2):
        d = jnp.abs(x - (base + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = a * (((d - 5) * d + 8) * d - 4)
        weight = jnp.where(d <= 1, near, jnp.where(d < 2, far, 0.0))
        source = jnp.clip(base + tap, 0, n_in - 1).astype(jnp.int32)
        matrix += weight[:, None] * jax.nn.one_hot(source, n_in)
    return matrix


def valid_mask(grid: Array | None, shape: tuple[int, int]) -> Bool[Array, "B h w"] | None:
    """True on the part of a padded `shape` that each image's `grid` (h, w) covers; None when nothing is padded."""
    if grid is None:
        return None
    rows = jnp.arange(shape[0])[None, :, None] < grid[:, 0, None, None]
    columns = jnp.arange(shape[1])[None, None, :] < grid[:, 1, None, None]
    return rows & columns
