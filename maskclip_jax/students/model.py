"""The student as one module: backbone, head, classifier, chosen by a frozen config that can be written as JSON."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from maskclip_jax.data.schema import check_choices, check_ranges, read_config
from maskclip_jax.data.whole_files import cut
from maskclip_jax.errors import UserError
from maskclip_jax.students.classifier import LearnedHead, TextHead
from maskclip_jax.students.heads import DeepLabV2, DeepLabV3Plus, PSPHead
from maskclip_jax.students.layers import SyncAxis, valid_part
from maskclip_jax.students.resnet import STAGES, VARIANTS, ResNet, Stages, Variant

CHOICES = {
    "backbone": tuple(VARIANTS),
    "head": ("deeplabv2", "deeplabv3plus", "pspnet"),
    "stem": ("v1c", "v1", "clip"),
    "output_stride": tuple(STAGES),
    "classifier": ("text", "learned"),
    "mapper": ("identity", "linear", "mlp"),
    "dtype": ("float32", "bfloat16", "float64"),
}

RANGES = {
    "width": (1, 2**16), "layers": (1, 1000), "base_width": (1, 2**12), "expansion": (1, 64), "rates": (1, 2**12),
    "bottleneck": (1, 2**16), "decoder_width": (1, 2**16), "low_level_width": (1, 2**16), "num_classes": (1, 2**16),
    "bn_group_size": (1, 2**16),
}  # fmt: skip


@dataclass(frozen=True)
class StudentConfig:
    """What a student is. Every field is a number, string, bool, tuple or None, so `asdict` of it is JSON.

    Args:
        width: E, the width of the text embeddings (with `mapper`, of the features).
        head: "deeplabv2" (the paper's), "deeplabv3plus" (zero-shot Context) or "pspnet".
        backbone: "resnet50", "resnet101" or "small".
        layers, base_width, expansion: replace the backbone's own, or None.
        stem: "v1c", "v1" (for `microsoft/resnet-*` weights) or "clip" (CLIP's ModifiedResNet).
        output_stride: 8, 16 or 32.
        rates: the ASPP's dilations or PSPNet's pool scales, or None for the head's own. The published dilations reach
            24–36 positions: on a 96-pixel image (12 positions) they reach only padding; choose smaller ones.
        bottleneck: channels that DeepLabv2's branches see, by a 1×1 convolution; None: the backbone's, as published.
        decoder_width: channels of a decoder after DeepLabv2's branches, which makes its grid one of stride 4; None:
            without, as published.
        low_level_width: DeepLabv3+'s branch from stage 1.
        dropout: rate before the classifier, whole channels; 0 in every released config.
        background: learnable embedding as class 0 (VOC 21).
        classifier: "text" (fixed text embeddings) or "learned" (needs `num_classes`).
        norm_feat: normalise features before the text classifier.
        mapper: M(t), "identity", "linear" or "mlp" (fine-tuned CLIP).
        zero_init_residual: as in `ResNet`.
        bn_axis_name: the mapped axis of SyncBN, or None outside pmap.
        bn_group_size: devices of it that share batch statistics, which divide their number, or None for all.
        dtype: of the computation, "float32", "bfloat16" or (with JAX_ENABLE_X64) "float64"; parameters are float32, or
            float64 where that is it.

    Raises:
        UserError: for a value outside these (choices are plain strings: this check is before a type checker's).
    """

    width: int
    head: str = "deeplabv2"
    backbone: str = "resnet101"
    layers: tuple[int, int, int, int] | None = None
    base_width: int | None = None
    expansion: int | None = None
    stem: str = "v1c"
    output_stride: int = 8
    rates: tuple[int, ...] | None = None
    bottleneck: int | None = None
    decoder_width: int | None = None
    low_level_width: int = 48
    dropout: float = 0.0
    background: bool = False
    classifier: str = "text"
    num_classes: int | None = None
    norm_feat: bool = False
    mapper: str = "identity"
    zero_init_residual: bool = True
    bn_axis_name: str | None = None
    bn_group_size: int | None = None
    dtype: str = "float32"

    def __post_init__(self):
        check_choices(self, CHOICES, "student.")
        check_ranges(self, RANGES, "student.")
        for name, counts in (("layers", (4,)), ("rates", range(1, 65))):
            value = getattr(self, name)
            if value is not None and len(value) not in counts:
                wanted = "4 numbers" if name == "layers" else "1 to 64 numbers"
                raise UserError(f"student.{name} is {wanted}, got {cut(value)}: correct it")
        if not 0 <= self.dropout < 1:
            raise UserError(f"student.dropout is at least 0 and below 1, got {cut(self.dropout)}: correct it")
        for name in ("bottleneck", "decoder_width"):
            if getattr(self, name) is not None and self.head != "deeplabv2":
                raise UserError(f"student.{name} is deeplabv2's, got the head {self.head}: leave one of them out")
        if self.classifier == "learned" and self.num_classes is None:
            raise UserError("a learned classifier needs num_classes: set it, or use classifier='text'")
        if self.classifier == "learned" and (self.background or self.norm_feat or self.mapper != "identity"):
            raise UserError("background, norm_feat and mapper belong to the text classifier: use classifier='text'")

    @property
    def variant(self) -> Variant:
        """The backbone's layers, width and expansion, with this config's replacements."""
        own = {name: getattr(self, name) for name in ("layers", "base_width", "expansion")}
        return replace(VARIANTS[self.backbone], **{name: value for name, value in own.items() if value is not None})

    @property
    def grid_stride(self) -> int:
        """Pixels from one of its cells to the next."""
        return 4 if self.head == "deeplabv3plus" or self.decoder_width is not None else self.output_stride

    def cells(self, pixels: int) -> int:
        """Of its grid along a side of so many pixels: what is left over at the end is a cell, but with CLIP's stem."""
        if self.stem == "clip":
            return (pixels + 1) // 2 // (self.grid_stride // 2)
        return -(-pixels // self.grid_stride)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StudentConfig":
        """From `dataclasses.asdict` of one, also after JSON. Raises UserError as `data.schema.read_config` does."""
        return read_config(cls, values, "student")


class Student(nn.Module):
    """Images to logits at feature resolution (stride 8; with a decoder, as DeepLabv3+ has, 4); upsampling is the
    caller's.

    Use::

        variables = student.init(key, images, text)
        logits = student.apply(variables, images, text)
        logits, updates = student.apply(variables, images, text, train=True, mutable=["batch_stats"],
                                        rngs={"dropout": key})
        features = student.apply(variables, images, method="features")
    """

    config: StudentConfig

    def setup(self):
        config = self.config
        sync = None if config.bn_axis_name is None else SyncAxis(config.bn_axis_name, config.bn_group_size)
        common: dict[str, Any] = {"sync": sync, "dtype": jnp.dtype(config.dtype)}
        self.backbone = ResNet(config.variant, config.output_stride, config.stem, config.zero_init_residual, **common)
        if config.rates is not None:
            common["pool_scales" if config.head == "pspnet" else "dilations"] = config.rates
        for name in ("bottleneck", "decoder_width"):
            if getattr(config, name) is not None:
                common[name] = getattr(config, name)
        if config.head == "deeplabv3plus":
            self.head = DeepLabV3Plus(config.width, low_level_width=config.low_level_width, **common)
        else:
            self.head = {"deeplabv2": DeepLabV2, "pspnet": PSPHead}[config.head](config.width, **common)
        if config.classifier == "learned":
            self.classifier = LearnedHead(config.num_classes, config.dropout)
        else:
            self.classifier = TextHead(config.width, config.dropout, config.background, config.norm_feat, config.mapper)

    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        text_embeddings: Float[Array, "C E"] | None = None,
        train: bool = False,
        sizes: Int[Array, "B 2"] | None = None,
    ) -> Float[Array, "B h w classes"]:
        """Normalised images [B, H, W, 3] and text embeddings [C, E] -> logits [B, h, w, C] in full precision.

        With `background`, C + 1 logits, class 0 first. A learned classifier ignores `text_embeddings`. `sizes`: height
        and width of each image, where the rest of the array is padding, below and on the right: the logits of the
        first `config.cells(size)` rows and columns are those of the image alone (not in training).

        Raises:
            UserError: when the text embeddings are missing or of another width than the student.
        """
        features = self.features(images, train, sizes)
        if self.config.classifier == "learned":
            return self.classifier(features, train)
        width = None if text_embeddings is None else text_embeddings.shape[-1]
        if width is None or (self.config.mapper == "identity" and width != self.config.width):
            raise UserError(
                f"the student's width {self.config.width} must be that of the text embeddings, got {width}: "
                "pass the teacher's text embeddings, or set width to theirs"
            )
        return self.classifier(features, text_embeddings, train)

    def features(
        self, images: Float[Array, "B H W 3"], train: bool = False, sizes: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B h w E"]:
        """The classifier's input (before dropout), [B, h, w, E] in the config's dtype."""
        valid = None if sizes is None else valid_part(sizes, images.shape[1:3])
        return self.head(self.backbone(images, train, valid), train)

    def stages(self, images: Float[Array, "B H W 3"], train: bool = False) -> Stages:
        """The backbone's four outputs."""
        return self.backbone(images, train)


def create_student(config: StudentConfig) -> Student:
    """The linen module of a config; it holds no arrays. Raises UserError for float64 where JAX has none."""
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]: flags are added at run time
    if config.dtype == "float64" and not wide:
        raise UserError(
            "dtype float64 needs 64-bit numbers, but JAX has them off: set JAX_ENABLE_X64=1, or use float32"
        )
    return Student(config)
