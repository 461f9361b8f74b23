"""The Vision Transformer of CLIP and its kin: as trained, and read through its last values (docs/method.md, 1-2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import Fidelity, ViTConfig
from maskclip_jax.encoders.dense import ATTENTIONS, MASKCLIP, Around, DenseMethod, check_blocks, mean_length
from maskclip_jax.encoders.layers import Dtype, PoolingHead, Transformer, layer_norm
from maskclip_jax.encoders.positions import Rotation, axial_rotation, resize_positions, token_mask, valid_mask
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
        if c.positions == "learned":
            places = c.grid**2 + c.class_position
            self.positional_embedding = self.param("positional_embedding", normal, (places, c.width))
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
        rotation = self._rotation(None, self._grid(images))
        x = out["penultimate"] = self.transformer.walk(x, None, rotation).tokens
        x = out["last"] = self.transformer.resblocks[-1](x, None, rotation)
        return self.head(self.ln_post(x)) if self.config.head == "map" else self._project(x[:, 0]), out

    def dense(
        self,
        images: Float[Array, "B H W 3"],
        grid: Int[Array, "B 2"] | None,
        method: DenseMethod = MASKCLIP,
        affinity: Float[Array, "B L L"] | None = None,
    ) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
        """Projected features of every patch (not normalised) and the last attention's keys; see `CLIP.encode_dense`."""
        shape, first = self._grid(images), self.config.class_tokens
        x, mask, rotation = self._embed(images, grid), self._mask(grid, shape), self._rotation(grid, shape)
        folded = self.get_variable("folded", "value") if self.has_variable("folded", "value") else None
        if method != MASKCLIP:
            z, keys = self._read(x, mask, rotation, shape, method, affinity)
        elif self.config.head == "map":
            z, keys = self.head.dense(self.ln_post(self.transformer(x, mask, rotation)), folded)
        else:  # class tokens end here: nothing below looks from one token to another
            x = self.transformer.walk(x, mask, rotation).tokens
            z, keys = self.transformer.resblocks[-1].dense(x[:, first:], self.fidelity.keys, folded)
        z = z if self.config.head == "map" else self._project(z)
        return z.reshape(z.shape[0], *shape, -1), keys

    def tokens(self, images: Float[Array, "B H W 3"], grid: Int[Array, "B 2"] | None) -> Float[Array, "B h w D"]:
        """Every patch behind all blocks and the last layer norm; see `CLIP.encode_tokens`."""
        shape = self._grid(images)
        x = self.transformer(self._embed(images, grid), self._mask(grid, shape), self._rotation(grid, shape))
        return self.ln_post(x[:, self.config.class_tokens :]).reshape(len(x), *shape, -1)

    def _read(
        self,
        x: Float[Array, "B T D"],
        mask: Array | None,
        rotation: Rotation | None,
        shape: tuple[int, int],
        method: DenseMethod,
        affinity: Float[Array, "B L L"] | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The last attention by another method, class tokens dropped: a pooling head's, or that of the last
        `method.blocks` blocks, on a path beside the tower."""
        check_blocks(method, self.config)
        c, first, pooled = self.config, self.config.class_tokens, self.config.head == "map"
        walked = c.layers if pooled else c.layers - method.blocks
        maps, kept = method.asked(walked, c.layers)
        walk = self.transformer.walk(x, mask, rotation, walked, tuple(kept.values()), tuple(maps.values()))
        x, last = walk.tokens, self.transformer.resblocks[walked:]
        switches = {"residual": method.residual, "mlp": method.mlp, "keys": self.fidelity.keys}

        def attention(tokens: Array, q: Array, k: Array, v: Array, mask: Array | None = mask, **found: Any) -> Array:
            found = {"affinity": affinity, "middle": walk.attention} | found
            around = Around(shape, mask, mean_length(tokens, mask), method.sigma, share=method.share, **found)
            return ATTENTIONS[method.attention](q, k, v, around)

        def patches_alone(patches: Array, affinity: Array) -> Array:
            seen = None if mask is None else mask[..., first:]
            look = functools.partial(attention, mask=seen, affinity=affinity)
            if pooled:
                return self.head.read(self.ln_post(patches), look, mlp=method.mlp)[0]
            turn = None if rotation is None else Rotation(*(part[:, first:] for part in rotation))
            return last[0].read(patches, patches, look, **switches, rotation=turn)[0]

        if kept:
            valid = None if mask is None else mask[:, 0, 0, first:]
            earlier = {n: walk.kept[i] for n, i in kept.items()}
            from maskclip_jax.encoders.calibrated import self_calibrated  # a method that few ask for

            path = self_calibrated(x, earlier, patches_alone, shape, valid)
            own = self.ln_post(x) if pooled else x[:, first:]
            return path, (self.head.dense(own, None) if pooled else last[0].dense(own, self.fidelity.keys, None))[1]
        if pooled:
            return self.head.read(self.ln_post(x), attention, mlp=method.mlp)
        path = x
        for block in last:
            path, keys = block.read(x, path, attention, **switches, rotation=rotation)
            x = block(x, mask, rotation) if block is not last[-1] else x
        return path[:, first:], keys[:, first:]

    def _project(self, x: Array) -> Array:
        x = self.ln_post(x)
        return product(x, self.proj, full_precision(self.dtype)) if self.config.head == "projection" else x

    def _grid(self, images: Array) -> tuple[int, int]:
        return images.shape[1] // self.config.patch_size, images.shape[2] // self.config.patch_size

    def _mask(self, grid: Array | None, shape: tuple[int, int]) -> Array | None:
        return token_mask(valid_mask(grid, shape), self.config.class_tokens)

    def _embed(self, images: Array, grid: Array | None, keep: Array | None = None) -> Array:
        c, (h, w) = self.config, self._grid(images)
        p, batch = c.patch_size, images.shape[0]
        images = images[:, : h * p, : w * p]  # a rest that fills no patch is left out, as by a convolution
        patches = images.reshape(batch, h, p, w, p, 3).swapaxes(2, 3).reshape(batch, h * w, -1)
        x = product(patches, self.conv1.reshape(-1, c.width), self.dtype)
        if c.patch_bias:
            x = x + self.conv1_bias.astype(self.dtype)
        if c.positions == "learned":
            x = x + self._positions(grid, (h, w)).astype(self.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        if c.class_tokens:
            first = self.class_embedding + self.positional_embedding[0] if c.class_position else self.class_embedding
            tokens = first[None] if c.class_tokens == 1 else jnp.concatenate([first[None], self.registers])
            tokens = jnp.broadcast_to(tokens.astype(self.dtype), (batch, *tokens.shape))
            x = jnp.concatenate([tokens, x], axis=1)
        return self.ln_pre(x).astype(self.dtype) if c.ln_pre else x

    def _rotation(self, grid: Array | None, shape: tuple[int, int]) -> Rotation | None:
        c = self.config
        if c.positions != "rotary":
            return None
        return axial_rotation(grid, shape, c.class_tokens, c.width // c.heads, c.rotary_period)

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
