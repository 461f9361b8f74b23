"""Heads that end in features: DeepLabv2 (Chen et al. 2017, 1606.00915), DeepLabv3+ (Chen et al. 2018, 1802.02611) and
PSPNet (Zhao et al. 2017, 1612.01105).

All stop one layer short of a segmentation network: the last 1×1 classifier is the text head's (paper, Fig. 3).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskclip_jax.students.layers import (
    BatchNorm,
    Conv,
    ConvBNReLU,
    SeparableConv,
    SyncAxis,
    adaptive_average_pool,
    resize_bilinear,
)
from maskclip_jax.students.resnet import Stages


class DeepLabV2(nn.Module):
    """Atrous spatial pyramid pooling: parallel 3×3 convolutions (conv-BN-ReLU), *summed*.

    Args:
        width: E, of every branch and of the features.
        dilations: one branch each.
        bottleneck: channels of a 1×1 convolution before the branches; None is without, as published.
        decoder_width: channels of a decoder that brings the sum to stage 1's resolution (stride 4), as DeepLabv3+'s
            does, by a residual: it begins as plain interpolation. None is without, as published.
    """

    width: int
    dilations: tuple[int, ...] = (6, 12, 18, 24)
    bottleneck: int | None = None
    decoder_width: int | None = None
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, stages: Stages, train: bool) -> Float[Array, "B h w E"]:
        """Stage 4 [B, h, w, c] -> features [B, h, w, E]; with a decoder stages 1 and 4, and stage 1's resolution."""
        x, common = stages.stage4, {"sync": self.sync, "dtype": self.dtype}
        if self.bottleneck is not None:
            x = ConvBNReLU(self.bottleneck, **common, name="bottleneck")(x, train, stages.valid4)
        x = sum(
            ConvBNReLU(self.width, 3, dilation=dilation, **common, name=f"aspp_{i}")(x, train, stages.valid4)
            for i, dilation in enumerate(self.dilations)
        )
        return x if self.decoder_width is None else self._decoded(x, self.decoder_width, stages, train)

    def _decoded(self, x: Any, channels: int, stages: Stages, train: bool) -> Float[Array, "B h w E"]:
        common = {"sync": self.sync, "dtype": self.dtype}
        x = resize_bilinear(x, stages.stage1.shape[1:3], stages.valid4, stages.valid1)
        y = jnp.concatenate([x, stages.stage1], axis=-1)
        for i, kernel in enumerate((1, 3, 3)):
            y = ConvBNReLU(channels, kernel, **common, name=f"decoder_{i}")(y, train, stages.valid1)
        y = Conv(self.width, dtype=self.dtype, name="decoder_out")(y)
        return x + BatchNorm(self.sync, zero_scale=True, name="decoder_bn")(y, train)


class DeepLabV3Plus(nn.Module):
    """Separable ASPP with image pooling at stage 4, refined by a low-level branch from stage 1.

    Args:
        width: E.
        dilations: of the ASPP; dilation 1 is a 1×1 convolution, the others are separable 3×3 ones.
        low_level_width: channels of the branch from stage 1.
    """

    width: int
    dilations: tuple[int, ...] = (1, 12, 24, 36)
    low_level_width: int = 48
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, stages: Stages, train: bool) -> Float[Array, "B h w E"]:
        """Stages 1 [B, h, w, c] and 4 -> features [B, h, w, E], at stage 1's resolution (stride 4)."""
        common = {"sync": self.sync, "dtype": self.dtype}
        x = stages.stage4
        pooled = ConvBNReLU(self.width, **common, name="image_pool")(adaptive_average_pool(x, 1, stages.valid4), train)
        branches = [resize_bilinear(pooled, x.shape[1:3])]
        for i, dilation in enumerate(self.dilations):
            if dilation == 1:
                branch = ConvBNReLU(self.width, **common, name=f"aspp_{i}")
            else:
                branch = SeparableConv(self.width, dilation, **common, name=f"aspp_{i}")
            branches.append(branch(x, train, stages.valid4))
        x = jnp.concatenate(branches, axis=-1)
        x = ConvBNReLU(self.width, 3, **common, name="bottleneck")(x, train, stages.valid4)
        low = ConvBNReLU(self.low_level_width, **common, name="low_level")(stages.stage1, train)
        resized = resize_bilinear(x, low.shape[1:3], stages.valid4, stages.valid1)
        x = jnp.concatenate([resized, low], axis=-1)
        x = SeparableConv(self.width, **common, name="refine_0")(x, train, stages.valid1)
        return SeparableConv(self.width, **common, name="refine_1")(x, train, stages.valid1)


class PSPHead(nn.Module):
    """PSPNet's pyramid pooling: stage 4 beside its means over s×s bins, each brought to E channels and back to size,
    then one 3×3 convolution.

    Args:
        width: E.
        pool_scales: the numbers of bins per side.
    """

    width: int
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, stages: Stages, train: bool) -> Float[Array, "B h w E"]:
        """Stage 4 [B, h, w, c] -> features [B, h, w, E]."""
        common = {"sync": self.sync, "dtype": self.dtype}
        x = stages.stage4
        levels = [x]
        for i, scale in enumerate(self.pool_scales):
            pooled = adaptive_average_pool(x, scale, stages.valid4)
            level = ConvBNReLU(self.width, **common, name=f"pool_{i}")(pooled, train)
            levels.append(resize_bilinear(level, x.shape[1:3], None, stages.valid4))
        x = jnp.concatenate(levels, axis=-1)
        return ConvBNReLU(self.width, 3, **common, name="bottleneck")(x, train, stages.valid4)
