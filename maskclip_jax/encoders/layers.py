"""The pieces both towers share. Parameter names follow OpenAI's checkpoints; kernels are `[in, out]` and HWIO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from maskclip_jax.encoders.config import TextConfig, ViTConfig
from maskclip_jax.encoders.positions import Rotation, rotated
from maskclip_jax.ops.matmul import attend as attend
from maskclip_jax.ops.matmul import attention_matrix, full_precision, in_full_precision, jitted, product
from maskclip_jax.ops.module import LayerNorm, Module

Dtype = jnp.dtype | type


def quick_gelu(x: Array) -> Array:
    """OpenAI's fast GELU, `x · sigmoid(1.702 x)`, in full precision; by way of tanh, which CPUs do twice as fast."""
    wide = in_full_precision(x)
    return (wide * (0.5 + 0.5 * jnp.tanh(0.851 * wide))).astype(x.dtype)


def gelu(x: Array) -> Array:
    """Exact GELU (with erf)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,  # of the one factor, see `MLP`
}


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


class Attention(nn.Module):
    """Multi-head self-attention whose value and key projections can be read on their own (paper, section 3.1)."""

    width: int
    heads: int
    dtype: Dtype = jnp.float32
    biases: str = "qkv"  # the projections that have one

    def setup(self):
        linear = functools.partial(Linear, self.width, dtype=self.dtype)
        self.q_proj, self.k_proj, self.v_proj = (linear(use_bias=name in self.biases) for name in "qkv")
        self.out_proj = linear()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: Bool[Array, "#B 1 #Q T"] | None = None,
        queries: Float[Array, "B Q D"] | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Array, "B Q D"]:
        """`mask` is True where a query (third axis) may look at a key (fourth axis); other `queries` may ask `x`."""
        q, k = self.queries_keys(x, queries, rotation)
        return self.out_proj(self._merge(attend(q, k, self._split(self.v_proj(x)), mask)))

    def queries_keys(
        self, x: Float[Array, "B T D"], queries: Float[Array, "B Q D"] | None = None, rotation: Rotation | None = None
    ) -> tuple[Float[Array, "B Q N d"], Float[Array, "B T N d"]]:
        """Heads of queries and keys, turned by their places where the tower does so."""
        q, k = self.q_proj(x if queries is None else queries), self.k_proj(x)
        return self._turned(q, rotation), self._turned(k, rotation)

    def read(
        self,
        x: Float[Array, "B T D"],
        attention: Callable[[Array, Array, Array], Array],
        rotation: Rotation | None = None,
    ) -> tuple[Array, Array]:
        """What comes out when `attention` (of q, k, v, each [B, T, N, d]) replaces the softmax; and the keys."""
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        heads = self._turned(q, rotation), self._turned(k, rotation), self._split(v)
        return self.out_proj(self._merge(attention(*heads))), k

    def value(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`W_o (W_v x + b_v) + b_o`: what attention would give if every token looked only at itself (equation 4)."""
        return self.out_proj(self.v_proj(x))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _turned(self, x: Array, rotation: Rotation | None) -> Array:
        return self._split(x) if rotation is None else rotated(self._split(x), rotation)

    def _merge(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1)


class MLP(nn.Module):
    """`c_proj(act(c_fc(x)))`; as SwiGLU (Shazeer, 2020) `c_proj(silu(c_fc(x)) · c_up(x))`."""

    width: int
    hidden: int
    activation: str
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = ACTIVATIONS[self.activation](Linear(self.hidden, dtype=self.dtype, name="c_fc")(x))
        if self.activation == "swiglu":
            hidden = hidden * Linear(self.hidden, dtype=self.dtype, name="c_up")(x)
        return Linear(self.width, dtype=self.dtype, name="c_proj")(hidden)


class Block(Module):
    """A pre-norm transformer block; `dense` is the same block with the attention matrix replaced by the identity."""

    config: ViTConfig | TextConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        self.ln_1, self.ln_2 = (layer_norm(c.layer_norm_eps, self.dtype) for _ in range(2))
        self.attn = Attention(c.width, c.heads, self.dtype, getattr(c, "biases", "qkv"))
        self.mlp = MLP(c.width, c.mlp_width, c.activation, self.dtype)
        if c.layer_scale:
            self.ls_1, self.ls_2 = (self.param(f"ls_{i}", nn.initializers.ones, (c.width,)) for i in (1, 2))

    def __call__(
        self, x: Float[Array, "B T D"], mask: Array | None = None, rotation: Rotation | None = None
    ) -> Float[Array, "B T D"]:
        return self._add_mlp(x + self._scaled(self.attn(self.ln_1(x), mask, rotation=rotation)))

    def matrix(
        self, x: Float[Array, "B T D"], mask: Array | None = None, rotation: Rotation | None = None
    ) -> Float[Array, "B N T T"]:
        """The attention of the block as it was trained: which token looks at which."""
        return attention_matrix(*self.attn.queries_keys(self.ln_1(x), rotation=rotation), mask)

    def dense(
        self, x: Float[Array, "B L D"], keys: str, folded: dict | None
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """Tokens after the value path, and the keys for smoothing (docs/method.md, section 2)."""
        y = self.ln_1(x)
        z = self.attn.value(y) if folded is None else apply_folded(folded, y, self.dtype)
        k = self.attn.k_proj(y)
        k = self.attn.out_proj(k) if keys == "out_proj" else k
        return self._add_mlp(x + self._scaled(z)), k

    def read(
        self,
        x: Float[Array, "B T D"],
        beside: Float[Array, "B T D"],
        attention: Callable[[Array, Array, Array, Array], Array],
        *,
        residual: bool,
        mlp: bool,
        keys: str,
        rotation: Rotation | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """One block of a reading that runs on a path beside the tower, and the keys; `attention` takes tokens, q, k, v.

        q, k and v come from the tower's own tokens `x`; residual and MLP, where kept, act on the path.
        """
        y = self.ln_1(x)
        z, k = self.attn.read(y, lambda q, k, v: attention(y, q, k, v), rotation)
        z = self._scaled(z)
        z = beside + z if residual else z
        return self._add_mlp(z) if mlp else z, self.attn.out_proj(k) if keys == "out_proj" else k

    def _add_mlp(self, x: Array) -> Array:
        y = self.mlp(self.ln_2(x))
        return x + (y * self.ls_2.astype(y.dtype) if self.config.layer_scale else y)

    def _scaled(self, x: Array) -> Array:
        return x * self.ls_1.astype(x.dtype) if self.config.layer_scale else x


@jax.jit
def fold_linear(first: dict, second: dict) -> dict:
    """One `{kernel, bias}` for `second(first(x))`: `W = W1 W2`, `b = b1 W2 + b2`."""
    return {
        "kernel": first["kernel"] @ second["kernel"],
        "bias": first["bias"] @ second["kernel"] + second["bias"],
    }


def apply_folded(folded: dict, x: Float[Array, "*batch i"], dtype: Dtype) -> Float[Array, "*batch o"]:
    """`x W + b` with the arrays `fold_linear` made."""
    return product(x, folded["kernel"], dtype) + folded["bias"].astype(dtype)


@functools.partial(jitted, static_argnames="block")
def _behind(block: Block, variables: dict, x: Array, mask: Array | None, rotation: Rotation | None) -> Array:
    """The tokens behind a block; the blocks of a tower differ in their weights alone."""
    return block.apply(variables, x, mask, rotation)


class Walk(NamedTuple):
    """What `Transformer.walk` brings: the last tokens, those asked for by their block's number, and a mean attention.

    Fields:
      tokens: behind the last of the blocks.
      kept: number of a block, from 1 -> the tokens behind it.
      attention: the mean of the asked blocks' matrices, None where none was asked.
    """

    tokens: Float[Array, "B T D"]
    kept: dict[int, Float[Array, "B T D"]]
    attention: Float[Array, "B N T T"] | None


class Transformer(nn.Module):
    """`resblocks_0 … resblocks_{n-1}`; the last block can be left to the caller."""

    config: ViTConfig | TextConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        self.resblocks = [Block(self.config, self.dtype) for _ in range(self.config.layers)]

    def __call__(
        self, x: Float[Array, "B T D"], mask: Array | None = None, rotation: Rotation | None = None
    ) -> Float[Array, "B T D"]:
        return self.walk(x, mask, rotation, self.config.layers).tokens

    def walk(
        self,
        x: Float[Array, "B T D"],
        mask: Array | None = None,
        rotation: Rotation | None = None,
        blocks: int = -1,
        keep: Collection[int] = (),
        maps: Sequence[int] = (),
    ) -> Walk:
        """So many first `blocks` (-1: all but the last), and what a reading asks of them on the way.

        `keep` and `maps` are numbers of blocks, from 1: whose tokens are kept, whose attention is averaged (twice what
        comes twice).
        """
        kept, attention, alone = {}, None, Block(self.config, self.dtype, parent=None)
        for i, block in enumerate(self.resblocks[:blocks], 1):
            if i in maps:
                matrix = block.matrix(x, mask, rotation) * (maps.count(i) / len(maps))
                attention = matrix if attention is None else attention + matrix
            if self.is_initializing():
                x = block(x, mask, rotation)
            else:
                x = _behind(alone, block.variables, x, mask, rotation)
            if i in keep:
                kept[i] = x
        return Walk(x, kept, attention)


class PoolingHead(Module):
    """SigLIP's attention pooling: a learned query asks all tokens, then an MLP (Zhai et al., CVPR 2022, "MAP head").

    Read densely, every token is answered as if it stood alone: the softmax over one key is 1, and its value is left.
    """

    config: ViTConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        self.probe = self.param("probe", nn.initializers.normal(c.width**-0.5), (c.width,))
        self.attn = Attention(c.width, c.heads, self.dtype)
        self.ln = layer_norm(c.layer_norm_eps, self.dtype)
        self.mlp = MLP(c.width, c.mlp_width, c.activation, self.dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """One feature for all tokens."""
        probe = jnp.broadcast_to(self.probe, (x.shape[0], 1, x.shape[-1]))
        return self._add_mlp(self.attn(x, queries=probe))[:, 0]

    def dense(self, x: Float[Array, "B T D"], folded: dict | None) -> tuple[Array, Array]:
        """Every token's own value, and the keys."""
        y = self.attn.value(x) if folded is None else apply_folded(folded, x, self.dtype)
        return self._add_mlp(y), self.attn.k_proj(x)

    def read(
        self, x: Float[Array, "B T D"], attention: Callable[[Array, Array, Array, Array], Array], *, mlp: bool
    ) -> tuple[Array, Array]:
        """Every token as a query of `attention` (of tokens, q, k, v), and the keys; there is no residual."""
        y, k = self.attn.read(x, lambda q, k, v: attention(x, q, k, v))
        return self._add_mlp(y) if mlp else y, k

    def _add_mlp(self, y: Array) -> Array:
        return y + self.mlp(self.ln(y))
