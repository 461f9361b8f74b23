"""CLIP's ModifiedResNet: three-conv stem, anti-aliased strides, attention pool (docs/method.md, sections 1-2).

Read out densely, its last stages may keep a finer grid: a stride that is not taken becomes a dilation of everything
after it, with the same weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from maskclip_jax.encoders.config import ResNetConfig, cells_of
from maskclip_jax.encoders.dense import ATTENTIONS, MASKCLIP, Around, DenseMethod, mean_length, pool_value_value
from maskclip_jax.encoders.layers import Dtype, Linear, apply_folded, attend
from maskclip_jax.encoders.positions import resize_positions, token_mask, valid_mask
from maskclip_jax.ops.conv import convolve
from maskclip_jax.ops.module import BatchNorm, Module


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """2×2 average pool of stride 2 as sums of slices: its gradient is then cheap too; odd sides drop the last pixel."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :h, :w]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) * 0.25


def _blur(x: Float[Array, "B H W C"], dilation: int) -> Float[Array, "B H W C"]:
    for axis in (1, 2):
        n, pad = x.shape[axis], [(0, 0)] * 4
        pad[axis] = (dilation, dilation)
        wide = jnp.pad(x, pad)
        before, after = (jax.lax.slice_in_dim(wide, i, i + n, axis=axis) for i in (0, 2 * dilation))
        x = (before + 2 * x + after) / 4
    return x


class ImageGrid:
    """The valid area of each image in a padded batch, as a mask at any stride (None when nothing is padded)."""

    def __init__(self, sizes: Int[Array, "B 2"] | None):
        self.sizes = sizes  # valid height and width in pixels

    def __call__(self, x: Float[Array, "B H W C"], stride: int) -> Float[Array, "B H W C"]:
        """`x` with zeros outside the image, which is what a convolution would have met at the image's border."""
        mask = self.mask(x.shape[1:3], stride)
        return x if mask is None else jnp.where(mask[..., None], x, 0)

    def average(self, x: Float[Array, "B H W C"], stride: int, dilation: int) -> Float[Array, "B H W C"]:
        """What a 2×2 average pool becomes when its stride is not taken: the mean of the four pools a position is in.

        Along each axis (1, 2, 1) / 4 at `dilation` apart, over the image only: centred, so that features stay in place.
        """
        mask = self.mask(x.shape[1:3], stride)
        weight = jnp.ones((1, *x.shape[1:3], 1), x.dtype) if mask is None else mask[..., None].astype(x.dtype)
        return _blur(self(x, stride), dilation) / jnp.maximum(_blur(weight, dilation), 1 / 16)

    def mask(self, shape: tuple[int, int], stride: int) -> Bool[Array, "B h w"] | None:
        return None if self.sizes is None else valid_mask(self.cells(stride), shape)

    def cells(self, stride: int) -> Int[Array, "B 2"] | None:
        return None if self.sizes is None else cells_of(self.sizes, stride)


def _norm(train: bool, dtype: Dtype, name: str) -> BatchNorm:
    return BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name)


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


class Stem(nn.Module):
    """Three 3×3 convolutions, the first of stride 2, and an average pool: stride 4. Shares its parent's scope."""

    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W 3"], real: ImageGrid, train: bool) -> Float[Array, "B h w C"]:
        for i, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1)), 1):
            x = Conv(features, 3, stride, dtype=self.dtype, name=f"conv{i}")(real(x, min(i, 2)))
            x = nn.relu(_norm(train, self.dtype, f"bn{i}")(x))
        return average_pool(x)


class Bottleneck(nn.Module):
    """1×1, 3×3, (average pool), 1×1 convolutions and a shortcut, projected in the first block of a stage."""

    planes: int
    downsample: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, real: ImageGrid, at: int, stride: int, dilation: int, train: bool, untaken: bool = False
    ) -> Array:
        """`at`: pixels of the image from one position of `x` to the next; `stride` 2 is taken by average pools.

        `untaken`: the block was trained with stride 2, which is left out here.
        """

        def pool(y: Array) -> Array:
            if stride > 1:
                return average_pool(y)
            return real.average(y, at, dilation) if untaken else y

        conv = lambda features, size, name: Conv(features, size, dtype=self.dtype, name=name)  # noqa: E731
        norm = lambda name: _norm(train, self.dtype, name)  # noqa: E731
        out = nn.relu(norm("bn1")(conv(self.planes, 1, "conv1")(x)))
        # The 3×3 is the only place where neighbours mix, so the only place where padding could leak into the image.
        out = nn.relu(norm("bn2")(conv(self.planes, 3, "conv2")(real(out, at), dilation)))
        out = norm("bn3")(conv(self.planes * 4, 1, "conv3")(pool(out)))
        if self.downsample:
            x = norm("downsample_1")(conv(self.planes * 4, 1, "downsample_0")(pool(x)))
        return nn.relu(out + x)


class AttentionPool(Module):
    """One softmax attention whose query is the mean token; read densely, its values alone (paper, equation 4)."""

    grid: int
    width: int
    heads: int
    embed_dim: int
    dtype: Dtype = jnp.float32

    def setup(self):
        normal = nn.initializers.normal(self.width**-0.5)
        self.positional_embedding = self.param("positional_embedding", normal, (self.grid**2 + 1, self.width))
        self.q_proj, self.k_proj, self.v_proj = (Linear(self.width, dtype=self.dtype) for _ in range(3))
        self.c_proj = Linear(self.embed_dim, dtype=self.dtype)

    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B E"]:
        """The image embedding (unnormalised)."""
        shape, tokens = x.shape[1:3], self._tokens(x, None)
        table = self.positional_embedding
        patches = table[None, 1:]
        if shape != (self.grid, self.grid):
            patches = resize_positions(table[1:], self.grid, None, shape).reshape(1, -1, self.width)
        tokens = tokens + jnp.concatenate([table[None, :1], patches], axis=1).astype(tokens.dtype)
        out = attend(*self._heads(tokens[:, :1], tokens))
        return self.c_proj(out.reshape(*out.shape[:2], -1))[:, 0]

    def read(
        self,
        x: Float[Array, "B h w D"],
        mask: Bool[Array, "B h w"] | None,
        grid: Array | None,
        method: DenseMethod,
        affinity: Float[Array, "B L L"] | None = None,
    ) -> Float[Array, "B h w E"]:
        """Every position through another attention (`maskclip_jax.encoders.dense`); not normalised.

        Without position embedding, as MaskCLIP reads the pool; CLIP Surgery ("vv"), which has its own rule for the
        pool, keeps it.
        """
        tokens, shape, attention = self._tokens(x, mask), x.shape[1:3], ATTENTIONS[method.attention]
        if method.attention == "vv":
            patches = resize_positions(self.positional_embedding[1:], self.grid, grid, shape)
            patches = patches.reshape(len(patches), -1, self.width).astype(tokens.dtype)
            tokens, attention = tokens.at[:, 1:].add(patches), pool_value_value
            tokens = tokens.at[:, 0].add(self.positional_embedding[0].astype(tokens.dtype))
        valid = token_mask(mask, 1)
        around = Around(shape, valid, mean_length(tokens, valid), method.sigma, affinity=affinity)
        out = attention(*self._heads(tokens, tokens), around)
        return self.c_proj(out.reshape(*out.shape[:2], -1)[:, 1:]).reshape(*x.shape[:3], -1)

    def dense(self, x: Float[Array, "B h w D"], folded: dict | None) -> tuple[Array, Float[Array, "B L D"]]:
        """`c_proj(v_proj(x))` at every position (not normalised), and the keys `k_proj(x)`."""
        values = self.c_proj(self.v_proj(x)) if folded is None else apply_folded(folded, x, self.dtype)
        return values, self.k_proj(x).reshape(x.shape[0], -1, self.width)

    def _tokens(self, x: Array, mask: Array | None) -> Array:
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        if mask is None:
            mean = flat.mean(axis=1, keepdims=True)
        else:
            weights = mask.reshape(mask.shape[0], -1, 1)
            mean = jnp.where(weights, flat, 0).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
        return jnp.concatenate([mean, flat], axis=1)

    def _heads(self, queries: Array, tokens: Array) -> tuple[Array, Array, Array]:
        parts = self.q_proj(queries), self.k_proj(tokens), self.v_proj(tokens)
        return tuple(x.reshape(*x.shape[:2], self.heads, -1) for x in parts)


class ModifiedResNet(nn.Module):
    """`__call__` as it was trained (stride 32), `dense` read through the attention pool's values at `dense_stride`."""

    config: ResNetConfig
    embed_dim: int
    unit: int = 32  # pixels that one of `grid` stands for
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        self.stem = Stem(c.width, self.dtype)
        blocks = lambda stage, n: [Bottleneck(c.width * 2**stage, i == 0, self.dtype) for i in range(n)]  # noqa: E731
        self.layer1, self.layer2, self.layer3, self.layer4 = (blocks(s, n) for s, n in enumerate(c.layers))
        self.attnpool = AttentionPool(c.grid, c.width * 32, c.heads, self.embed_dim, self.dtype)

    def __call__(
        self, images: Float[Array, "B H W 3"], train: bool = False
    ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
        """The image embedding (unnormalised) and the named outputs `stem`, `layer1` … `layer4`."""
        x, out = self._trunk(images, None, 32, train)
        return self.attnpool(x), out

    def dense(
        self,
        images: Float[Array, "B H W 3"],
        grid: Int[Array, "B 2"] | None,
        method: DenseMethod = MASKCLIP,
        affinity: Float[Array, "B L L"] | None = None,
    ) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
        """Projected features of every position (not normalised) and the keys; see `CLIP.encode_dense`."""
        stride = self.config.dense_stride
        real = ImageGrid(None if grid is None else grid * self.unit)
        x, _ = self._trunk(images, real, stride, False)
        folded = self.get_variable("folded", "value") if self.has_variable("folded", "value") else None
        values, keys = self.attnpool.dense(x, folded)
        if method.attention != "value":
            values = self.attnpool.read(x, real.mask(x.shape[1:3], stride), real.cells(stride), method, affinity)
        return values, keys

    def _trunk(
        self, images: Array, real: ImageGrid | None, output_stride: int, train: bool
    ) -> tuple[Array, dict[str, Array]]:
        real = ImageGrid(None) if real is None else real
        out = {}
        x = out["stem"] = self.stem(images, real, train)
        at, dilation = 4, 1
        for stage, blocks in enumerate((self.layer1, self.layer2, self.layer3, self.layer4), 1):
            for i, block in enumerate(blocks):
                wanted = 2 if stage > 1 and i == 0 else 1
                stride = wanted if at < output_stride else 1
                x = block(x, real, at, stride, dilation, train, stride < wanted)
                at, dilation = at * stride, dilation * (wanted // stride)
            out[f"layer{stage}"] = x
        return x, out
