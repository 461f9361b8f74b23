"""`CLIP` and kin: both towers behind `encode_image`, `encode_text`, `encode_dense` (docs/method.md, sections 1-2)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.encoders.config import CLIPConfig, ViTConfig
from maskclip_jax.encoders.dense import DenseMethod, check_affinity
from maskclip_jax.encoders.layers import Dtype, fold_linear
from maskclip_jax.encoders.text import TextTransformer
from maskclip_jax.encoders.vit import VisionTransformer
from maskclip_jax.errors import UserError
from maskclip_jax.ops.matmul import in_full_precision, mixed
from maskclip_jax.ops.module import Module

IMAGE_TOWER_ALONE = (
    "texts need a text tower, but this model has an image tower alone: give classifier=rows (a unit vector for each "
    "word), or load both towers"
)


class DenseFeatures(NamedTuple):
    """What `encode_dense` reads out: unit features of every position, and the last attention's keys."""

    features: Float[Array, "B h w E"]
    keys: Float[Array, "B L D"]


class CLIP(Module):
    """CLIP with a dense reading of its image tower. Holds no arrays: call it through `model.apply(variables, …)`.

    `dtype` is what the towers compute in (bfloat16 on TPU and GPU); parameters keep their own.
    """

    config: CLIPConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        if isinstance(c.vision, ViTConfig):
            self.visual = VisionTransformer(c.vision, c.embed_dim, c.fidelity, self.dtype)
        else:
            from maskclip_jax.encoders.resnet import ModifiedResNet  # here: convolutions are a ResNet's alone

            self.visual = ModifiedResNet(c.vision, c.embed_dim, c.multiple, self.dtype)
        self.text = TextTransformer(c.text, c.embed_dim, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), ())
        if c.logit_bias and self.is_initializing():  # of logits, which are made elsewhere: towers alone run without it
            self.param("logit_bias", nn.initializers.constant(-10.0), ())

    def __call__(
        self, images: Float[Array, "B H W 3"], ids: Int[Array, "N T"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "N E"]]:
        """Both embeddings, for initialisation and training."""
        return self.encode_image(images), self.text(ids)[0]

    def encode_image(self, images: Float[Array, "B H W 3"], **kwargs) -> Float[Array, "B E"]:
        """The embedding of whole images, unnormalised, as CLIP gives it. `images` are already normalised.

        ResNets take `train=True` (batch statistics), ViTs `keep` (patches to read); both are for training.
        """
        return self.visual(images, **kwargs)[0]

    def encode_text(self, ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
        """The embedding of tokenised prompts, unnormalised, as CLIP gives it. Raises UserError without a text tower."""
        if not self.config.has_text:
            raise UserError(IMAGE_TOWER_ALONE)
        return self.text(ids)[0]

    def encode_dense(
        self,
        images: Float[Array, "B H W 3"],
        *,
        grid: Int[Array, "B 2"] | None = None,
        attention: str = "value",
        residual: bool = True,
        mlp: bool = True,
        blocks: int = 1,
        sigma: float | int = 5.0,
        share: float | int = 0.4,
        pool: bool = False,
        propagate: bool = False,
        affinity: Float[Array, "B L L"] | None = None,
    ) -> DenseFeatures:
        """Features of every position through the last layer's values alone (paper, section 3.1, equation 4).

        Args:
          images: normalised images whose sides are multiples of `config.multiple`.
          grid: when images of different sizes share a padded batch, each one's valid rows and columns in units of
            `config.multiple` pixels; `config.cells` says what features these have. What lies beyond changes nothing
            inside, and comes out meaningless.
          attention, residual, mlp, blocks, sigma, share, pool, propagate: another reading of the last blocks, as
            `DenseMethod` has them; `**dataclasses.asdict(dense_method("sclip", config))` is a published one.
          affinity: how much each patch takes of each other one, rows that sum to one, where the method asks for it
            (`maskclip_jax.segment.paired` makes it; what propagates needs more than that).

        Returns:
          features [B, h, w, E] of unit norm and keys [B, h·w, D]. Under `jit`, what is not used is not computed.
        """
        method = DenseMethod(attention, residual, mlp, blocks, sigma, share, pool, propagate)
        if propagate or (method.affinity and affinity is None):
            check_affinity(method, None)
        features, keys = self.visual.dense(images, grid, method.tower, affinity)
        features = in_full_precision(features)
        if pool:
            flat = features.reshape(len(features), -1, features.shape[-1])
            features = mixed(affinity, flat).reshape(features.shape)
        norm = jnp.linalg.norm(features, axis=-1, keepdims=True)
        return DenseFeatures(features / jnp.maximum(norm, 1e-12), keys)

    def encode_tokens(
        self, images: Float[Array, "B H W 3"], *, grid: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w D"]:
        """Every patch as the image tower leaves it: behind the last layer norm, without class tokens, of any norm.

        A ViT's alone; arguments as in `encode_dense`. Beyond an image's valid size they are finite and mean nothing.
        """
        if not isinstance(self.config.vision, ViTConfig):
            raise UserError("tokens are a ViT's, but this image tower is a ResNet: take another model")
        return self.visual.tokens(images, grid)


def fold(config: CLIPConfig, variables: dict) -> dict:
    """`variables` with the value path's two projections multiplied into one matrix (collection "folded").

    ViT: `W_v W_o` of the last block or the pooling head; ResNet: `v_proj c_proj`, 2048 → 2048 → E. `encode_dense` uses
    it when it is there; without it the same values come from the two, and gradients reach them.
    """
    visual = variables["params"]["visual"]
    if isinstance(config.vision, ViTConfig):
        last = visual["transformer"][f"resblocks_{config.vision.layers - 1}"]
        attention = (visual["head"] if config.vision.head == "map" else last)["attn"]
        value = fold_linear(attention["v_proj"], attention["out_proj"])
    else:
        value = fold_linear(visual["attnpool"]["v_proj"], visual["attnpool"]["c_proj"])
    return {**variables, "folded": {"visual": {"value": value}}}
