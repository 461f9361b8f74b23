"""The last layer of a student: the text embeddings as a fixed 1×1 classifier (paper §3.3), or a learned one."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from maskclip_jax.ops.matmul import in_full_precision, unit
from maskclip_jax.ops.module import Dense, Module

EXACT = lax.Precision.HIGHEST  # TPUs and GPUs would round float32 to 8 to 11 bits: classes differ by less
MapperKind = Literal["identity", "linear", "mlp"]


class Mapper(nn.Module):
    """M(t): classifier weights from text embeddings, [C, E] -> [C, width] (fine-tuned CLIP, paper §3.2).

    `identity` has no parameters; `linear` is one matrix and bias; `mlp` is two with a ReLU between, hidden width E.
    """

    kind: MapperKind
    width: int

    @nn.compact
    def __call__(self, text: Float[Array, "C E"]) -> Float[Array, "C D"]:
        if self.kind == "identity":
            return text
        if self.kind == "mlp":
            text = nn.relu(Dense(text.shape[-1], param_dtype=text.dtype, precision=EXACT, name="hidden")(text))
        return Dense(self.width, param_dtype=text.dtype, precision=EXACT, name="out")(text)


class TextHead(Module):
    """Features · text embeddings: no scale, no bias, features not normalised.

    The embeddings are an argument, not a parameter: no optimiser touches them and another vocabulary needs no surgery.

    Args:
        width: E, of the features.
        dropout: rate at which whole channels of the features are dropped in training (mmsegmentation's Dropout2d).
        background: put a learnable embedding, normalised when used, in front of the others: background becomes class 0.
        norm_feat: divide features by their length first (then logits are cosines).
        mapper: M(t) between embeddings and weights.
    """

    width: int
    dropout: float = 0.0
    background: bool = False
    norm_feat: bool = False
    mapper: MapperKind = "identity"

    @nn.compact
    def __call__(
        self, features: Float[Array, "B h w E"], text: Float[Array, "C D"], train: bool
    ) -> Float[Array, "B h w classes"]:
        """Features [B, h, w, E] of any float type, text [C, D] -> logits [B, h, w, C (+ 1 with background)].

        They are in full precision: class scores differ by less than bfloat16 resolves.
        """
        features = in_full_precision(features)
        weights = Mapper(self.mapper, self.width, name="mapper")(text.astype(features.dtype))
        if self.background:
            embedding = self.param("background", nn.initializers.normal(1.0), (1, self.width), features.dtype)
            weights = jnp.concatenate([embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True), weights])
        features = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(features, deterministic=not train)
        if self.norm_feat:
            features = unit(features)  # also of dropped-out features, which must not give NaN gradients
        return jnp.matmul(features, weights.T, precision=EXACT)


class LearnedHead(nn.Module):
    """An ordinary 1×1 classifier (`kernel` [E, C], `bias` [C]): the fully supervised student."""

    num_classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "B h w E"], train: bool) -> Float[Array, "B h w classes"]:
        features = nn.Dropout(self.dropout, broadcast_dims=(1, 2))(in_full_precision(features), deterministic=not train)
        return Dense(
            self.num_classes,
            param_dtype=features.dtype,
            precision=EXACT,
            kernel_init=nn.initializers.normal(0.01),
            name="conv_seg",
        )(features)
