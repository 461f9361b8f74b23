"""The Vision Transformer of CLIP and its kin: as trained, and read through its last values (docs/method.md, 1-2)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import Fidelity, ViTConfig
from maskclip_jax.encoders.dense import ATTENTIONS, MASKCLIP, Around, DenseMethod, check_blocks, mean_length
from maskclip_jax.encoders.layers import Dtype, PoolingHead, Transformer, layer_norm
from maskclip_jax.encoders.positions import resize_positions, valid_mask
from maskclip_jax.ops.matmul import full_precision, product
from maskclip_jax.ops.module import Module


class VisionTransformer(Module):
    """Patches with learned position embeddings, class tokens, pre-norm blocks, `ln_post`, and the config's head."""

    config: ViTConfig
    embed_dim: int
    fidelity: Fidelity = Fidelity()
    dtype: Dtype = jnp.float32

    def setup(self):
        c, f = self.config, self.fidelity
        eps = c.layer_norm_eps if f.layer_norm_eps is None else f.layer_norm_eps
        activation = c.activation if f.activation == "checkpoint" else f.activation
        blocks = dataclasses.replace(c, activation=activation, layer_norm_eps=eps)
        normal = nn.initializers.normal(c.width**-0.5)
        self.conv1 = self.param("conv1", nn.initializers.lecun_normal(), (c.patch_size, c.patch_size, 3, c.width))
        if c.patch_bias:
            self.conv1_bias = self.param("conv1_bias", nn.initializers.zeros, (c.width,))
        if c.class_tokens:
            self.class_embedding = self.param("class_embedding", normal, (c.width,))
        if c.class_tokens > 1:
            self.registers = self.param("registers", normal, (c.class_tokens - 1, c.width))
        self.positional_embedding = self.param("positional_embedding", normal, (c.grid**2 + c.class_position, c.width))
        if c.ln_pre:
            self.ln_pre = layer_norm(eps, self.dtype)
        self.transformer = Transformer(blocks, self.dtype)
        self.ln_post = layer_norm(eps, self.dtype)
        if c.head == "projection":
            self.proj = self.param("proj", normal, (c.width, self.embed_dim))
        elif c.head == "map":
            self.head = PoolingHead(blocks, self.dtype)

    def __call__(
        self, images: Float[Array, "B H W 3"], keep: Array | None = None
    ) -> tuple[Float[Array, "B E"], dict[str, Array]]:
        """The image embedding (unnormalised) and the named intermediates `embedded`, `penultimate`, `last`.

        `keep` [B, n] (optional) are indices of the patches to read, the rest is dropped (FLIP, for training).
        """
        out = {}
        x = out["embedded"] = self._embed(images, None, keep)
        x = out["penultimate"] = self.transformer.penultimate(x)
        x = out["last"] = self.transformer.last(x)
        return self.head(self.ln_post(x)) if self.config.head == "map" else self._project(x[:, 0]), out

    def dense(
        self,
        images: Float[Array, "B H W 3"],
        grid: Int[Array, "B 2"] | None,
        method: DenseMethod = MASKCLIP,
    ) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
        """Projected features of every patch (not normalised) and the last attention's keys; see `CLIP.encode_dense`."""
        shape, first = self._grid(images), self.config.class_tokens
        mask = valid_mask(grid, shape)
        if mask is not None:  # class tokens see, and are seen by, every valid patch
            mask = jnp.pad(mask.reshape(mask.shape[0], -1), ((0, 0), (first, 0)), constant_values=True)[:, None, None]
        x = self._embed(images, grid)
        folded = self.get_variable("folded", "value") if self.has_variable("folded", "value") else None
        if method != MASKCLIP:
            z, keys = self._read(x, mask, shape, method)
        elif self.config.head == "map":
            z, keys = self.head.dense(self.ln_post(self.transformer(x, mask)), folded)
        else:  # class tokens end here: nothing below looks from one token to another
            x = self.transformer.penultimate(x, mask)
            z, keys = self.transformer.last_dense(x[:, first:], self.fidelity.keys, folded)
        z = z if self.config.head == "map" else self._project(z)
        return z.reshape(z.shape[0], *shape, -1), keys

    def _read(
        self, x: Float[Array, "B T D"], mask: Array | None, shape: tuple[int, int], method: DenseMethod
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The last attention by another method, class tokens dropped: a pooling head's, or that of the last
        `method.blocks` blocks, on a path beside the tower."""
        check_blocks(method, self.config)

        def attention(tokens: Array, q: Array, k: Array, v: Array) -> Array:
            around = Around(shape, mask, mean_length(tokens, mask), method.sigma)
            return ATTENTIONS[method.attention](q, k, v, around)

        if self.config.head == "map":
            return self.head.read(self.ln_post(self.transformer(x, mask)), attention, mlp=method.mlp)
        blocks, first = self.transformer.resblocks, self.config.layers - method.blocks
        for block in blocks[:first]:
            x = block(x, mask)
        path, switches = x, {"residual": method.residual, "mlp": method.mlp, "keys": self.fidelity.keys}
        for block in blocks[first:]:
            path, keys = block.read(x, path, attention, **switches)
            x = block(x, mask) if block is not blocks[-1] else x
        return path[:, self.config.class_tokens :], keys[:, self.config.class_tokens :]

    def _project(self, x: Array) -> Array:
        x = self.ln_post(x)
        return product(x, self.proj, full_precision(self.dtype)) if self.config.head == "projection" else x

    def _grid(self, images: Array) -> tuple[int, int]:
        return images.shape[1] // self.config.patch_size, images.shape[2] // self.config.patch_size

    def _embed(self, images: Array, grid: Array | None, keep: Array | None = None) -> Array:
        c, (h, w) = self.config, self._grid(images)
        p, batch = c.patch_size, images.shape[0]
        images = images[:, : h * p, : w * p]  # a rest that fills no patch is left out, as by a convolution
        patches = images.reshape(batch, h, p, w, p, 3).swapaxes(2, 3).reshape(batch, h * w, -1)
        x = product(patches, self.conv1.reshape(-1, c.width), self.dtype)
        if c.patch_bias:
            x = x + self.conv1_bias.astype(self.dtype)
        x = x + self._positions(grid, (h, w)).astype(self.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        if c.class_tokens:
            first = self.class_embedding + self.positional_embedding[0] if c.class_position else self.class_embedding
            tokens = first[None] if c.class_tokens == 1 else jnp.concatenate([first[None], self.registers])
            tokens = jnp.broadcast_to(tokens.astype(self.dtype), (batch, *tokens.shape))
            x = jnp.concatenate([tokens, x], axis=1)
        return self.ln_pre(x).astype(self.dtype) if c.ln_pre else x

    def _positions(self, grid: Array | None, shape: tuple[int, int]) -> Float[Array, "#B L D"]:
        """The patches' position embeddings, for each image's valid size."""
        table, g = self.positional_embedding[int(self.config.class_position) :], self.config.grid
        same = shape == (g, g)
        if self.fidelity.position_resize == "count" and shape[0] * shape[1] == g * g:
            same = True  # the released code's habit: 112×448 gets the square grid's embeddings
        if grid is None and same:
            return table[None]
        patches = resize_positions(table, g, grid, shape, self.config.position_filter)
        if self.fidelity.position_resize == "count" and grid is not None:
            index = jnp.arange(shape[0])[:, None] * grid[:, 1, None, None] + jnp.arange(shape[1])
            unresized = table[jnp.clip(index, 0, g * g - 1)]
            patches = jnp.where((grid.prod(axis=1) == g * g)[:, None, None, None], unresized, patches)
        return patches.reshape(patches.shape[0], -1, table.shape[1])
