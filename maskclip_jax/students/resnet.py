"""The dilated ResNet under every student (He et al. 2016; "v1c" stem: He et al. 2019; dilation: Yu & Koltun 2017).

Three stems share the four stages: `v1c` (three 3×3 convolutions: gluon, mmsegmentation), `v1` (one 7×7: torchvision,
`microsoft/resnet-*`) and `clip` (three 3×3 and average pools, strides anti-aliased: CLIP's ModifiedResNet, which the
fine-tuned CLIP of the paper's §3.2 starts from). Parameters are named as OpenAI's: conv1, bn1, …, layer1_0, …
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from maskclip_jax.students.layers import BatchNorm, Conv, SyncAxis, Valid, average_pool, masked, max_pool, strided

Stem = Literal["v1c", "v1", "clip"]


@dataclass(frozen=True)
class Variant:
    """Blocks per stage, width of the first stage's bottleneck, and how much wider a block's output is."""

    layers: tuple[int, int, int, int]
    base_width: int = 64
    expansion: int = 4


VARIANTS = {
    "resnet50": Variant((3, 4, 6, 3)),
    "resnet101": Variant((3, 4, 23, 3)),
    # for the embedded demo: with a DeepLabv2 head of width 128, 1.6 M parameters in all
    "small": Variant((1, 1, 2, 1), base_width=16, expansion=2),
}

# output stride -> (stride, dilation) of each stage
STAGES = {
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
}


class Stages(NamedTuple):
    """The outputs of the four stages; c is 4·base_width (expansion 4) and doubles from stage to stage.

    `valid1` and `valid4` say what of stages 1 and 4 is image, in a padded batch.
    """

    stage1: Float[Array, "B h1 w1 c1"]  # stride 4
    stage2: Float[Array, "B h2 w2 c2"]  # stride 8
    stage3: Float[Array, "B h3 w3 c3"]
    stage4: Float[Array, "B h4 w4 c4"]
    valid1: Valid | None = None
    valid4: Valid | None = None


class Bottleneck(nn.Module):
    """1×1, 3×3 (stride and dilation here, as PyTorch's "v1.5"), 1×1, and the shortcut."""

    planes: int
    expansion: int
    stride: int = 1
    dilation: int = 1
    antialias: bool = False  # CLIP's: an average pool strides, the convolutions do not
    project: bool = False  # the first block of a stage: 1×1 convolution on the shortcut
    zero_init_residual: bool = True
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W c"], train: bool, valid: Valid | None = None) -> Float[Array, "B h w d"]:
        stride, pool = (1, self.stride) if self.antialias else (self.stride, 1)
        width = self.planes * self.expansion
        y = Conv(self.planes, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(BatchNorm(self.sync, name="bn1")(y, train))
        y = Conv(self.planes, 3, stride, self.dilation, dtype=self.dtype, name="conv2")(y, train, valid)
        y = nn.relu(BatchNorm(self.sync, name="bn2")(y, train))
        y = Conv(width, dtype=self.dtype, name="conv3")(average_pool(y, pool))
        y = BatchNorm(self.sync, zero_scale=self.zero_init_residual, name="bn3")(y, train)
        if self.project:
            x = Conv(width, stride=stride, dtype=self.dtype, name="downsample_0")(average_pool(x, pool))
            x = BatchNorm(self.sync, name="downsample_1")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images to the outputs of the four stages.

    Args:
        variant: layers, base width, expansion.
        output_stride: 8, 16 (strides become dilations, the first block of such a stage at half its dilation) or 32.
        stem: "v1c", "v1" or "clip".
        zero_init_residual: start every block as the identity; matters only from scratch.
        sync: the devices that share batch statistics (SyncBN), or None.
        dtype: what convolutions are computed in; parameters and statistics are in its full precision.
    """

    variant: Variant
    output_stride: int = 8
    stem: Stem = "v1c"
    zero_init_residual: bool = True
    sync: SyncAxis | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"], train: bool, valid: Valid | None = None) -> Stages:
        """Normalised images [B, H, W, 3] -> Stages; sizes are H / stride, rounded up (CLIP's stem: down).

        `valid`: what of each image is image; the rest is padding, and what comes of it in a stage means nothing.
        """
        floors = self.stem == "clip"
        x, valid = self._stem(images.astype(self.dtype), train, valid)
        outputs, valids = [], []
        for stage, (stride, dilation) in enumerate(STAGES[self.output_stride]):
            for block in range(self.variant.layers[stage]):
                first = block == 0
                x = Bottleneck(
                    planes=self.variant.base_width * 2**stage,
                    expansion=self.variant.expansion,
                    stride=stride if first else 1,
                    dilation=dilation // 2 if first and dilation > 1 else dilation,
                    antialias=floors,
                    project=first,
                    zero_init_residual=self.zero_init_residual,
                    sync=self.sync,
                    dtype=self.dtype,
                    name=f"layer{stage + 1}_{block}",
                )(x, train, valid)
                valid = strided(valid, stride, floors) if first else valid
            outputs.append(x)
            valids.append(valid)
        return Stages(*outputs, valids[0], valids[-1])

    def _stem(
        self, x: Float[Array, "B H W 3"], train: bool, valid: Valid | None
    ) -> tuple[Float[Array, "B h w c"], Valid | None]:
        width = self.variant.base_width
        # (features, kernel, stride) of each convolution
        convs = [(width, 7, 2)] if self.stem == "v1" else [(width // 2, 3, 2), (width // 2, 3, 1), (width, 3, 1)]
        for i, (features, kernel, stride) in enumerate(convs, start=1):
            x = Conv(features, kernel, stride, dtype=self.dtype, name=f"conv{i}")(x, train, valid)
            x, valid = nn.relu(BatchNorm(self.sync, name=f"bn{i}")(x, train)), strided(valid, stride)
        if self.stem == "clip":
            return average_pool(x, 2), strided(valid, 2, True)
        return max_pool(masked(x, valid)), strided(valid, 2)
