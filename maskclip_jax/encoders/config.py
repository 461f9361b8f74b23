"""What a checkpoint is (`CLIPConfig`) and how faithfully to repeat the released code (`Fidelity`).

CLIP's kin (SigLIP, TIPS) are the same towers with other fields: `SIGLIP_VIT`, `TIPS_TEXT` and so on say which.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from maskclip_jax.errors import UserError

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "relu", "swiglu"]
Family = Literal["clip", "siglip", "tips"]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The released PyTorch code's habits, each a named field (`Differences from the released code` in the README).

    The defaults are what CLIP was trained with and what the paper says; `Fidelity.released()` repeats the code
    that produced the published numbers. The two differ in every field.

    Fields:
      activation: image tower's activation; "checkpoint" (QuickGELU for OpenAI weights) or exact "gelu".
      layer_norm_eps: image tower's epsilon; None is the checkpoint's (1e-5), the released code has 1e-6.
      keys: ViT keys `W_k y + b_k` ("k_proj") or passed on through the output projection ("out_proj").
      key_normalization: keys of unit length over "channels" (a cosine) or over "positions" (`F.normalize`, dim=1).
      image_statistics: mean/std of the "checkpoint" or of "imagenet".
      probability_scale: None is `exp(logit_scale)`; the released code writes 100.
      all_denoised: when every class would be denoised away, "keep_best" or "drop_all" (all logits -100).
      upsample: logits "aligned" with the image's pixels, or the padded grid "stretched" over the unpadded image.
      upsample_steps: cells become pixels of the original image in 1 bilinear resize, or in 2, the resized image's
        pixels in between. (Sliding windows are averaged there, and so take 2 in any case.)
      image_resize: by the "checkpoint"'s filter, antialiased, or as "opencv" does it: bilinear between half-pixel
        centres, no antialias when shrinking, rounded to uint8 in fixed point.
      resnet_input: images for a ResNet are "padded" to its stride, or "unpadded": strided convolutions pad by 1 and
        average pools drop the last row or column of an odd side (512×683 pixels make 16×21 cells at stride 32). A side
        shorter than the stride, of which nothing would be left, is padded to it with zeros.
      position_resize: resize position embeddings whenever the grid's "shape" differs, or only its token "count".
    """

    activation: Literal["checkpoint", "gelu"] = "checkpoint"
    layer_norm_eps: float | None = None
    keys: Literal["k_proj", "out_proj"] = "k_proj"
    key_normalization: Literal["channels", "positions"] = "channels"
    image_statistics: Literal["checkpoint", "imagenet"] = "checkpoint"
    probability_scale: float | None = None
    all_denoised: Literal["keep_best", "drop_all"] = "keep_best"
    upsample: Literal["aligned", "stretched"] = "aligned"
    upsample_steps: Literal[1, 2] = 1
    image_resize: Literal["checkpoint", "opencv"] = "checkpoint"
    resnet_input: Literal["padded", "unpadded"] = "padded"
    position_resize: Literal["shape", "count"] = "shape"

    @classmethod
    def clip(cls) -> Fidelity:
        """What CLIP was trained with and what the paper says."""
        return cls()

    @classmethod
    def released(cls) -> Fidelity:
        """What chongzhou96/MaskCLIP does, for its published numbers."""
        return cls(
            activation="gelu",
            layer_norm_eps=1e-6,
            keys="out_proj",
            key_normalization="positions",
            image_statistics="imagenet",
            probability_scale=100.0,
            all_denoised="drop_all",
            upsample="stretched",
            upsample_steps=2,
            image_resize="opencv",
            resnet_input="unpadded",
            position_resize="count",
        )

    @classmethod
    def named(cls, value: str | Fidelity) -> Fidelity:
        """`"clip"`, `"released"` or a `Fidelity` as it is."""
        if isinstance(value, Fidelity):
            return value
        if value not in ("clip", "released"):
            raise UserError(f"fidelity is 'clip', 'released' or a Fidelity, not {value!r}: choose one of them")
        return getattr(cls, value)()


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer: CLIP's by default, SigLIP's, TIPS' or a DINO's by its fields.

    Fields beyond the usual sizes:
      image_size: the square side (pixels) its position embeddings were trained at.
      activation: of the MLPs; "gelu_tanh" is GELU by way of tanh, "swiglu" multiplies two layers of `mlp_width`.
      class_tokens: tokens in front of the patches; those after the first have no position (registers).
      class_position: the position table's first row belongs to the class token.
      positions: a "learned" table, or "rotary": queries and keys are turned by row and column (DINOv3).
      rotary_period: of the slowest turn, in half image sides.
      position_filter: how the table is resized: "bicubic" as PyTorch's `interpolate`, "bicubic_antialias" as that with
        `antialias`, or "bilinear", antialiased where it shrinks, as `jax.image.resize`.
      biases: which of the "qkv" projections have a bias.
      patch_bias: the patch embedding has a bias.
      ln_pre: a layer norm in front of the blocks.
      layer_scale: a factor per channel behind every attention and MLP.
      head: behind the last layer norm: a "projection" to E (CLIP), attention pooling ("map", SigLIP), or "none" (TIPS).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    class_tokens: int = 1
    class_position: bool = True
    positions: Literal["learned", "rotary"] = "learned"
    rotary_period: float = 100.0
    position_filter: Literal["bicubic", "bicubic_antialias", "bilinear"] = "bicubic"
    patch_bias: bool = False
    ln_pre: bool = True
    layer_scale: bool = False
    biases: str = "qkv"
    head: Literal["projection", "map", "none"] = "projection"

    @property
    def grid(self) -> int:
        """Side of the trained patch grid."""
        return self.image_size // self.patch_size

    @property
    def stride(self) -> int:
        """Pixels from one dense feature to the next."""
        return self.patch_size


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """CLIP's ModifiedResNet. `width` is the stem's (64 for RN50); `dense_stride` is where `encode_dense` reads out."""

    image_size: int
    width: int
    layers: tuple[int, ...]
    heads: int
    dense_stride: Literal[8, 16, 32] = 32

    @property
    def grid(self) -> int:
        """Side of the grid the attention pool's position embedding was trained at."""
        return self.image_size // 32

    @property
    def stride(self) -> int:
        """Pixels from one dense feature to the next."""
        return self.dense_stride


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A text transformer: CLIP's by default, SigLIP's or TIPS' by its fields.

    Fields beyond the usual sizes:
      eot_token_id: the end-of-text token; None takes the highest id in the prompt (OpenAI's `argmax`).
      pool: the feature is read at the end-of-text token ("eot"), at the "last" of all positions, or is the "mean" over
        those whose id is not 0 (which the others then do not look at either).
      causal: no token looks at those behind it.
      positions: a "learned" table, or "sinusoidal" (Vaswani et al., 2017; tokens are then scaled by √width).
      head: to E by a matrix ("projection"), by a "linear" layer with bias, or "none".
      layer_scale: as in `ViTConfig`.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: Activation = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eot_token_id: int | None = None
    pool: Literal["eot", "last", "mean"] = "eot"
    causal: bool = True
    positions: Literal["learned", "sinusoidal"] = "learned"
    head: Literal["projection", "linear", "none"] = "projection"
    layer_scale: bool = False


# What makes a tower SigLIP's or TIPS', beside its sizes.
_GOOGLE: dict[str, Any] = {"layer_norm_eps": 1e-6, "class_position": False, "patch_bias": True, "ln_pre": False}
SIGLIP_VIT = _GOOGLE | {"activation": "gelu_tanh", "class_tokens": 0, "head": "map"}
TIPS_VIT = _GOOGLE | {"activation": "gelu_tanh", "class_tokens": 2, "position_filter": "bilinear", "head": "none"}
DINO_VIT = {"patch_bias": True, "ln_pre": False, "head": "none"}
SIGLIP_TEXT: dict[str, Any] = {"activation": "gelu_tanh", "layer_norm_eps": 1e-6}
SIGLIP_TEXT |= {"pool": "last", "causal": False, "head": "linear"}
TIPS_TEXT: dict[str, Any] = {"activation": "relu", "layer_norm_eps": 1e-6}
TIPS_TEXT |= {"pool": "mean", "causal": False, "positions": "sinusoidal", "head": "none"}
NO_TEXT = TextConfig(1, 2, 1, 1, 1, 1)  # the least there can be, where a checkpoint holds the image tower alone


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, the width E they meet in, and the fidelity they are read with.

    With `logit_bias` the logit of an image and a text is `exp(logit_scale) · cosine + logit_bias`, whose sigmoid is a
    probability of its own (SigLIP); a softmax over texts does not change by it.
    """

    vision: ViTConfig | ResNetConfig
    text: TextConfig
    embed_dim: int
    fidelity: Fidelity = Fidelity()
    logit_bias: bool = False

    @property
    def family(self) -> Family:
        """How the image tower answers: by a projection ("clip"), a pooling head ("siglip"), or as it is ("tips")."""
        head = getattr(self.vision, "head", "projection")
        return {"projection": "clip", "map": "siglip", "none": "tips"}[head]

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.text != NO_TEXT

    @property
    def stride(self) -> int:
        """Pixels from one dense feature to the next."""
        return self.vision.stride

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this to be read densely: the patch, or the strides that a ResNet takes.

        1 for a ResNet that reads images unpadded. A valid size inside a padded batch (`grid`) is counted in this unit.
        """
        unpadded = isinstance(self.vision, ResNetConfig) and self.fidelity.resnet_input == "unpadded"
        return 1 if unpadded else self.vision.stride

    def padded(self, side: int) -> int:
        """The side that `side` pixels are padded to by themselves: a multiple of `multiple`, and one cell at least."""
        return max(-(-side // self.multiple) * self.multiple, self.stride)

    def cells(self, units: Any) -> Any:
        """Dense features along a padded side of so many `multiple`s of pixels; ints or arrays, traced ones too."""
        return units if self.multiple == self.stride else cells_of(units * self.multiple, self.stride)


def cells_of(pixels: Any, stride: int) -> Any:
    """Positions at `stride` along a side of so many pixels: strided 3×3 convolutions that pad by 1 round up, 2×2 pools
    down. A ResNet's first halving is a convolution, all others are pools; multiples of the stride are never rounded."""
    return pixels if stride == 1 else (pixels + 1) // 2 // (stride // 2)


def with_activation(config: CLIPConfig, activation: str) -> CLIPConfig:
    """`config` with this activation in its transformers (a ResNet's image tower has ReLU). Raises UserError."""
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"activation is 'quick_gelu' or 'gelu', not {activation!r}: choose one of them")
    if config.family != "clip":
        raise UserError(f"activation is chosen for CLIPs, but {_NAMES[config.family]} has one of its own: leave it out")
    text = dataclasses.replace(config.text, activation=activation)
    vision = config.vision
    if isinstance(vision, ViTConfig):
        vision = dataclasses.replace(vision, activation=activation)
    return dataclasses.replace(config, vision=vision, text=text)


def with_fidelity(config: CLIPConfig, fidelity: Fidelity) -> CLIPConfig:
    """`config` read with these habits. Those of the pipeline (resizing, smoothing, scale) serve every encoder.

    Raises UserError for a habit of the released code's image tower where the tower is not CLIP's: it has none there.
    """
    own = [name for name in _TOWER_HABITS if getattr(fidelity, name) != getattr(Fidelity(), name)]
    if own and config.family != "clip":
        raise UserError(
            f"the released code reads CLIP alone, but this is {_NAMES[config.family]} (fidelity: {', '.join(own)}): "
            "use fidelity 'clip'"
        )
    return dataclasses.replace(config, fidelity=fidelity)


_NAMES = {"siglip": "SigLIP", "tips": "TIPS"}
_TOWER_HABITS = ("activation", "layer_norm_eps", "keys", "image_statistics", "position_resize")

_VITS = {  # image size, patch, width, layers, heads; embed_dim; text width, heads
    "ViT-B/32": ((224, 32, 768, 12, 12), 512, (512, 8)),
    "ViT-B/16": ((224, 16, 768, 12, 12), 512, (512, 8)),
    "ViT-L/14": ((224, 14, 1024, 24, 16), 768, (768, 12)),
    "ViT-L/14@336px": ((336, 14, 1024, 24, 16), 768, (768, 12)),
}
_RESNETS = {  # image size, width, layers, heads; embed_dim; text width, heads
    "RN50": ((224, 64, (3, 4, 6, 3), 32), 1024, (512, 8)),
    "RN101": ((224, 64, (3, 4, 23, 3), 32), 512, (512, 8)),
    "RN50x4": ((288, 80, (4, 6, 10, 6), 40), 640, (640, 10)),
    "RN50x16": ((384, 96, (6, 8, 18, 8), 48), 768, (768, 12)),
    "RN50x64": ((448, 128, (3, 15, 36, 10), 64), 1024, (1024, 16)),
}
VARIANTS = (*_VITS, *_RESNETS)


def variant(name: str) -> CLIPConfig:
    """OpenAI's nine released architectures by the names OpenAI gave them, e.g. `variant("ViT-B/16")`."""
    if name not in VARIANTS:
        raise UserError(f"variant is one of {', '.join(VARIANTS)}, not {name!r}: choose one of them")
    numbers, embed_dim, (text_width, text_heads) = (_VITS | _RESNETS)[name]
    if name in _VITS:
        vision = ViTConfig(*numbers, mlp_width=4 * numbers[2])
    else:
        vision = ResNetConfig(*numbers)
    text = TextConfig(49408, 77, text_width, 12, text_heads, 4 * text_width)
    return CLIPConfig(vision, text, embed_dim)
