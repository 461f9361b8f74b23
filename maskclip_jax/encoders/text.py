"""CLIP's text tower: a causal transformer, read at the end-of-text token (docs/method.md, section 1)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import TextConfig
from maskclip_jax.encoders.layers import Dtype, Transformer, layer_norm
from maskclip_jax.ops.module import Module


class TextTransformer(Module):
    """Token and position embeddings, causal pre-norm blocks, `ln_final`, `text_projection`."""

    config: TextConfig
    embed_dim: int
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        normal = nn.initializers.normal
        self.token_embedding = self.param("token_embedding", normal(0.02), (c.vocab_size, c.width))
        self.positional_embedding = self.param("positional_embedding", normal(0.01), (c.context_length, c.width))
        self.transformer = Transformer(
            c.width, c.layers, c.heads, c.mlp_width, c.activation, c.layer_norm_eps, self.dtype
        )
        self.ln_final = layer_norm(c.layer_norm_eps, self.dtype)
        self.text_projection = self.param("text_projection", normal(c.width**-0.5), (c.width, self.embed_dim))

    def __call__(self, ids: Int[Array, "N T"]) -> tuple[Float[Array, "N E"], dict[str, Array]]:
        """The text embedding (unnormalised) and the named intermediate `last` (after `ln_final`)."""
        length = ids.shape[1]
        x = self.token_embedding[ids] + self.positional_embedding[:length]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        x = self.ln_final(self.transformer(x.astype(self.dtype), causal))
        # OpenAI's end-of-text token has the highest id; other vocabularies name theirs, and its first place counts.
        eot = self.config.eot_token_id
        where = ids.argmax(axis=1) if eot is None else (ids == eot).argmax(axis=1)
        feature = jnp.take_along_axis(x, where[:, None, None], axis=1)[:, 0]
        return feature @ self.text_projection.astype(feature.dtype), {"last": x}
