"""CLIP's Vision Transformer: as trained, and read through its last values (docs/method.md, sections 1-2)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import Fidelity, ViTConfig
from maskclip_jax.encoders.dense import ATTENTIONS, MASKCLIP, Around, DenseMethod, check_blocks, mean_length
from maskclip_jax.encoders.layers import Dtype, Transformer, layer_norm, resize_positions, valid_mask
from maskclip_jax.ops.matmul import full_precision, product
from maskclip_jax.ops.module import Module


class VisionTransformer(Module):
    """ViT with class token, learned position embeddings, `ln_pre`, pre-norm blocks, `ln_post` and `proj`."""

    config: ViTConfig
    embed_dim: int
    fidelity: Fidelity = Fidelity()
    dtype: Dtype = jnp.float32

    def setup(self):
        c, f = self.config, self.fidelity
        eps = c.layer_norm_eps if f.layer_norm_eps is None else f.layer_norm_eps
        activation = c.activation if f.activation == "checkpoint" else f.activation
        normal = nn.initializers.normal(c.width**-0.5)
        self.conv1 = self.param("conv1", nn.initializers.lecun_normal(), (c.patch_size, c.patch_size, 3, c.width))
        self.class_embedding = self.param("class_embedding", normal, (c.width,))
        self.positional_embedding = self.param("positional_embedding", normal, (c.grid**2 + 1, c.width))
        self.ln_pre, self.ln_post = layer_norm(eps, self.dtype), layer_norm(eps, self.dtype)
        self.transformer = Transformer(c.width, c.layers, c.heads, c.mlp_width, activation, eps, self.dtype)
        self.proj = self.param("proj", normal, (c.width, self.embed_dim))

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
        return self._project(x[:, 0]), out

    def dense(
        self,
        images: Float[Array, "B H W 3"],
        grid: Int[Array, "B 2"] | None,
        method: DenseMethod = MASKCLIP,
    ) -> tuple[Float[Array, "B h w E"], Float[Array, "B L D"]]:
        """Projected features of every patch (not normalised) and the last layer's keys; see `CLIP.encode_dense`."""
        shape = self._grid(images)
        mask = valid_mask(grid, shape)
        if mask is not None:  # the class token sees, and is seen by, every valid patch
            mask = jnp.pad(mask.reshape(mask.shape[0], -1), ((0, 0), (1, 0)), constant_values=True)[:, None, None]
        if method != MASKCLIP:
            z, keys = self._read(self._embed(images, grid), mask, shape, method)
            return self._project(z).reshape(z.shape[0], *shape, -1), keys
        x = self.transformer.penultimate(self._embed(images, grid), mask)
        folded = self.get_variable("folded", "value") if self.has_variable("folded", "value") else None
        # The class token ends here: nothing below looks from one token to another.
        z, keys = self.transformer.last_dense(x[:, 1:], self.fidelity.keys, folded)
        return self._project(z).reshape(z.shape[0], *shape, -1), keys

    def _read(
        self, x: Float[Array, "B T D"], mask: Array | None, shape: tuple[int, int], method: DenseMethod
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The last `method.blocks` blocks on a path beside the tower: patches and keys, the class token dropped."""
        check_blocks(method, self.config)
        blocks, first = self.transformer.resblocks, self.config.layers - method.blocks
        for block in blocks[:first]:
            x = block(x, mask)

        def attention(tokens: Array, q: Array, k: Array, v: Array) -> Array:
            around = Around(shape, mask, mean_length(tokens, mask), method.sigma)
            return ATTENTIONS[method.attention](q, k, v, around)

        path, switches = x, {"residual": method.residual, "mlp": method.mlp, "keys": self.fidelity.keys}
        for block in blocks[first:]:
            path, keys = block.read(x, path, attention, **switches)
            x = block(x, mask) if block is not blocks[-1] else x
        return path[:, 1:], keys[:, 1:]

    def _project(self, x: Array) -> Array:
        return product(self.ln_post(x), self.proj, full_precision(self.dtype))

    def _grid(self, images: Array) -> tuple[int, int]:
        return images.shape[1] // self.config.patch_size, images.shape[2] // self.config.patch_size

    def _embed(self, images: Array, grid: Array | None, keep: Array | None = None) -> Array:
        c, (h, w) = self.config, self._grid(images)
        p, batch = c.patch_size, images.shape[0]
        images = images[:, : h * p, : w * p]  # a rest that fills no patch is left out, as by a convolution
        patches = images.reshape(batch, h, p, w, p, 3).swapaxes(2, 3).reshape(batch, h * w, -1)
        x = product(patches, self.conv1.reshape(-1, c.width), self.dtype)
        positions = self._positions(grid, (h, w)).astype(self.dtype)
        x = x + positions[:, 1:]
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        cls = (self.class_embedding + positions[:, 0]).astype(self.dtype)
        cls = jnp.broadcast_to(cls[:, None], (batch, 1, c.width))
        return self.ln_pre(jnp.concatenate([cls, x], axis=1)).astype(self.dtype)

    def _positions(self, grid: Array | None, shape: tuple[int, int]) -> Array:
        table, g = self.positional_embedding, self.config.grid
        same = shape == (g, g)
        if self.fidelity.position_resize == "count" and shape[0] * shape[1] == g * g:
            same = True  # the released code's habit: 112×448 gets the square grid's embeddings
        if grid is None and same:
            return table[None]
        patches = resize_positions(table[1:], g, grid, shape)
        if self.fidelity.position_resize == "count" and grid is not None:
            index = jnp.arange(shape[0])[:, None] * grid[:, 1, None, None] + jnp.arange(shape[1])
            unresized = table[1:][jnp.clip(index, 0, g * g - 1)]
            patches = jnp.where((grid.prod(axis=1) == g * g)[:, None, None, None], unresized, patches)
        cls = jnp.broadcast_to(table[None, :1], (patches.shape[0], 1, table.shape[1]))
        return jnp.concatenate([cls, patches.reshape(patches.shape[0], -1, table.shape[1])], axis=1)
