"""The text tower of CLIP and its kin (docs/method.md, section 1)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.encoders.layers import Dtype, Linear, Transformer, layer_norm
from maskclip_jax.encoders.positions import sinusoids
from maskclip_jax.ops.module import Module


class TextTransformer(Module):
    """Token and position embeddings, pre-norm blocks, `ln_final`, and the pooling and head of the config."""

    config: TextConfig
    embed_dim: int
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        normal = nn.initializers.normal
        self.token_embedding = self.param("token_embedding", normal(0.02), (c.vocab_size, c.width))
        if c.positions == "learned":
            self.positional_embedding = self.param("positional_embedding", normal(0.01), (c.context_length, c.width))
        self.transformer = Transformer(c, self.dtype)
        self.ln_final = layer_norm(c.layer_norm_eps, self.dtype)
        if c.head == "projection":
            self.text_projection = self.param("text_projection", normal(c.width**-0.5), (c.width, self.embed_dim))
        elif c.head == "linear":
            self.head = Linear(self.embed_dim, dtype=self.dtype)

    def __call__(self, ids: Int[Array, "N T"]) -> tuple[Float[Array, "N E"], dict[str, Array]]:
        """The text embedding (unnormalised) and the named intermediate `last` (after `ln_final`)."""
        c, length = self.config, ids.shape[1]
        x = self.token_embedding[ids]
        if c.positions == "learned":
            x = x + self.positional_embedding[:length]
        else:
            x = x * c.width**0.5 + sinusoids(length, c.width)
        real = ids != 0
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None] if c.causal else None
        if c.pool == "mean":  # what is no text counts nowhere: not in the mean, and not as a key
            mask = real[:, None, None] if mask is None else mask & real[:, None, None]
        x = self.ln_final(self.transformer(x.astype(self.dtype), mask))
        feature = self._pooled(x, ids)
        if c.head == "projection":
            feature = feature @ self.text_projection.astype(feature.dtype)
        elif c.head == "linear":
            feature = self.head(feature)
        return feature, {"last": x}

    def _pooled(self, x: Float[Array, "N T D"], ids: Int[Array, "N T"]) -> Float[Array, "N D"]:
        if self.config.pool == "last":
            return x[:, -1]
        if self.config.pool == "mean":  # of no token at all: zeros, as TIPS has it
            real = (ids != 0)[..., None]
            return jnp.where(real, x, 0).sum(axis=1) / (real.sum(axis=1) + 1e-8)
        # OpenAI's end-of-text token has the highest id; other vocabularies name theirs, and its first place counts.
        eot = self.config.eot_token_id
        where = ids.argmax(axis=1) if eot is None else (ids == eot).argmax(axis=1)
        return jnp.take_along_axis(x, where[:, None, None], axis=1)[:, 0]
