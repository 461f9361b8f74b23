"""PSPNet's pyramid pooling head (Zhao et al. 2017, 1612.01105), ending in features."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskclip_jax.students.layers import ConvBNReLU, adaptive_average_pool, resize_bilinear
from maskclip_jax.students.resnet import Stages


class PSPHead(nn.Module):
    """Stage 4 beside its means over s×s bins, each brought to E channels and back to size; one 3×3 convolution.

    Args:
        width: E.
        pool_scales: the numbers of bins per side.
    """

    width: int
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    axis_name: str | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, stages: Stages, train: bool) -> Float[Array, "B h w E"]:
        """Stage 4 [B, h, w, c] -> features [B, h, w, E]."""
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        x = stages.stage4
        levels = [x]
        for i, scale in enumerate(self.pool_scales):
            level = ConvBNReLU(self.width, **common, name=f"pool_{i}")(adaptive_average_pool(x, scale), train)
            levels.append(resize_bilinear(level, x.shape[1:3]))
        return ConvBNReLU(self.width, 3, **common, name="bottleneck")(jnp.concatenate(levels, axis=-1), train)
