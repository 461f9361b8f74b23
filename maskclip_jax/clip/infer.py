"""Which architecture a checkpoint is: from transformers' config, from open_clip's, or from the arrays' shapes alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from maskclip_jax.clip.config import NO_TEXT as NO_TEXT
from maskclip_jax.clip.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.clip.transformers_quietly import transformers
from maskclip_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
WIDER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # width of the ViT -> of a head, in H/14, g/14 and bigG/14


def from_hf(config: Mapping[str, Any]) -> CLIPConfig:
    """From the dict of a `config.json` of transformers' `CLIPModel`; keys it leaves out are transformers' defaults."""
    check_model_type(config)
    try:
        full = transformers().CLIPConfig.from_dict(dict(config))
    except Exception as error:  # transformers checks types and head counts, with exceptions of its own
        raise UserError(f"config.json is not one transformers can read: {_line(error)}") from error
    v, t = full.vision_config, full.text_config
    if v.num_channels != 3:
        raise UserError(f"images have 3 channels, but config.json says {v.num_channels}: only RGB models are read")
    vision = ViTConfig(
        _whole(v.image_size, "image_size"),
        _whole(v.patch_size, "patch_size"),
        v.hidden_size,
        v.num_hidden_layers,
        v.num_attention_heads,
        v.intermediate_size,
        _activation(v.hidden_act),
        v.layer_norm_eps,
    )
    text = TextConfig(
        t.vocab_size,
        t.max_position_embeddings,
        t.hidden_size,
        t.num_hidden_layers,
        t.num_attention_heads,
        t.intermediate_size,
        _activation(t.hidden_act),
        t.layer_norm_eps,
        # transformers wrote 2 by mistake into every early CLIP, and has since taken it to mean "the highest id".
        None if t.eos_token_id == 2 else t.eos_token_id,
    )
    return CLIPConfig(vision, text, full.projection_dim)


def to_hf(config: CLIPConfig) -> dict[str, Any]:
    """`config` as transformers' `config.json`: what `from_hf` reads back. ViTs only."""
    v, t = config.vision, config.text
    if isinstance(v, ResNetConfig):
        raise UserError("transformers' CLIP has no ResNet: write an open_clip folder")
    widths = lambda c: {  # noqa: E731
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_act": c.activation,
        "layer_norm_eps": c.layer_norm_eps,
        "projection_dim": config.embed_dim,
    }
    vision = {"image_size": v.image_size, "patch_size": v.patch_size, "num_channels": 3}
    text = {
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.context_length,
        "eos_token_id": 2 if t.eot_token_id is None else t.eot_token_id,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "vision_config": widths(v) | vision,
        "text_config": widths(t) | text,
    }


def check_model_type(config: Mapping[str, Any]) -> None:
    """Raises UserError unless a `config.json` is of transformers' `CLIPModel`."""
    came = config.get("model_type")
    if came != "clip":
        raise UserError(f"config.json must be of model_type 'clip', not {came!r}: only CLIP's own architecture is read")


@dataclasses.dataclass(frozen=True)
class _OpenClipVision:
    """open_clip's `vision_cfg` with open_clip's defaults, as far as it describes OpenAI's architectures."""

    layers: int | list[int] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | None = 16
    image_size: int = 224


@dataclasses.dataclass(frozen=True)
class _OpenClipText:
    """open_clip's `text_cfg` with open_clip's defaults, as far as it describes OpenAI's text tower."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0


@dataclasses.dataclass(frozen=True)
class _OpenClipModel:
    embed_dim: int
    vision_cfg: dict
    text_cfg: dict
    quick_gelu: bool = False
    custom_text: bool = False  # only moves names under `text.`
    init_logit_scale: float | None = None  # initial values, dropped for the trained ones
    init_logit_bias: None = None


# Switches of open_clip that change the computation: these values are OpenAI's architecture, others another one.
_OPENAI_VISION = {
    "ls_init_value": (None,),
    "patch_dropout": (0, 0.0, 0.5),  # in training only
    "attentional_pool": (False,),
    "input_patchnorm": (False,),
    "global_average_pool": (False,),
    "no_ln_pre": (False,),
    "pos_embed_type": ("learnable",),
    "final_ln_after_pool": (False,),
    "pool_type": ("tok",),
    "output_tokens": (False,),
    "timm_model_name": (None,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
}
_OPENAI_TEXT = {
    "ls_init_value": (None,),
    "embed_cls": (False,),
    "pad_id": (0,),
    "eos_id": (2, 49407),
    "no_causal_mask": (False,),
    "final_ln_after_pool": (False,),
    "pool_type": ("argmax",),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "output_tokens": (False,),
    "hf_model_name": (None,),
    "hf_tokenizer_name": (None, ""),
    "tokenizer_kwargs": (None, {}),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
}


def from_open_clip(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """From the `model_cfg` of an `open_clip_config.json`; unknown keys are an unknown architecture."""
    model = _strict(_OpenClipModel, model_cfg, {}, "model_cfg")
    v = _strict(_OpenClipVision, model.vision_cfg, _OPENAI_VISION, "vision_cfg")
    t = _strict(_OpenClipText, model.text_cfg, _OPENAI_TEXT, "text_cfg")
    activation = "quick_gelu" if model.quick_gelu else "gelu"
    if isinstance(v.layers, list):
        heads = v.width * 32 // v.head_width
        vision = ResNetConfig(v.image_size, v.width, tuple(v.layers), heads)
    else:
        heads = v.width // v.head_width
        mlp = int(v.width * v.mlp_ratio)
        vision = ViTConfig(v.image_size, v.patch_size, v.width, v.layers, heads, mlp, activation)
    text = TextConfig(
        t.vocab_size, t.context_length, t.width, t.layers, t.heads, int(t.width * t.mlp_ratio), activation
    )
    return CLIPConfig(vision, text, model.embed_dim)


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """`config` as open_clip's `model_cfg`: what `from_open_clip` reads back."""
    v, t = config.vision, config.text
    vision: dict[str, Any] = {"image_size": v.image_size, "width": v.width}
    if isinstance(v, ResNetConfig):
        vision |= {"layers": list(v.layers), "patch_size": None, "head_width": v.width * 32 // v.heads}
    else:
        vision |= {"layers": v.layers, "patch_size": v.patch_size, "head_width": v.width // v.heads}
        vision["mlp_ratio"] = v.mlp_width / v.width
    text = {name: getattr(t, name) for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": t.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text | {"mlp_ratio": t.mlp_width / t.width},
    }


def from_shapes(shapes: Shapes) -> CLIPConfig:
    """From OpenAI-named arrays' shapes, by OpenAI's own rules: 64 channels to a head, and QuickGELU.

    Nothing in the shapes tells QuickGELU from GELU: weights trained with GELU need a config.
    """
    vision, embed_dim = vision_from_shapes(shapes)
    vocab_size, width = _shape(shapes, "token_embedding.weight", 2)
    context_length, _ = _shape(shapes, "positional_embedding", 2)
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    mlp_width, _ = _shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)
    return CLIPConfig(
        vision, TextConfig(vocab_size, context_length, width, layers, _heads(width), mlp_width), embed_dim
    )


def vision_from_shapes(shapes: Shapes) -> tuple[ViTConfig | ResNetConfig, int]:
    """The image tower and the joint embedding's width E, from the shapes of OpenAI-named `visual.…` arrays."""
    if "visual.proj" in shapes:
        width, _, _, patch = _shape(shapes, "visual.conv1.weight", 4)
        if width in WIDER_HEADS:  # 64 divides these too, and would be silently wrong
            raise UserError(
                f"a ViT of width {width} is not OpenAI's: its heads are {WIDER_HEADS[width]} wide, and its arrays do "
                "not tell its activation: put its open_clip_config.json (or config.json) beside the weights"
            )
        image_size = _side(_shape(shapes, "visual.positional_embedding", 2)) * patch
        layers = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        mlp_width, _ = _shape(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)
        vit = ViTConfig(image_size, patch, width, layers, _heads(width), mlp_width)
        return vit, _shape(shapes, "visual.proj", 2)[1]
    width = _shape(shapes, "visual.layer1.0.conv1.weight", 4)[0]
    side = _side(_shape(shapes, "visual.attnpool.positional_embedding", 2))
    layers = tuple(_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    embed_dim = _shape(shapes, "visual.attnpool.c_proj.weight", 2)[0]
    return ResNetConfig(side * 32, width, layers, _heads(width * 32)), embed_dim


def _strict(cls, given: Any, fixed: Mapping[str, tuple], where: str):
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be an object of keys, not {type(given).__name__}: take the original file")
    names = {field.name for field in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in names and (key not in fixed or value not in fixed[key]):
            raise UserError(f"{where} has {key} = {value!r}, which is not OpenAI's architecture: it cannot be read")
    try:
        return cls(**{key: value for key, value in given.items() if key in names})
    except TypeError as error:
        raise UserError(f"{where} is incomplete ({_line(error)}): take the original file") from error


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"an OpenAI-named CLIP needs {name}, which is missing: give both towers' arrays")
    if len(shapes[name]) != rank:
        raise UserError(f"{name} must have {rank} dimensions, but its shape is {shapes[name]}: check the weights")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, shapes) if match})


def _side(shape: tuple[int, ...]) -> int:
    side = round((shape[0] - 1) ** 0.5)
    if side < 1 or side**2 + 1 != shape[0]:
        raise UserError(f"a position embedding has a square grid and one more row, not {shape[0]}: check the weights")
    return side


def _heads(width: int) -> int:
    if width % 64:
        raise UserError(f"OpenAI's heads are 64 wide, but the width is {width}: give a folder with a config")
    return width // 64


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int):
        raise UserError(f"{name} must be one whole number (a square), but config.json says {value!r}")
    return value


def _activation(name: str) -> str:
    if name not in ("quick_gelu", "gelu"):
        raise UserError(f"hidden_act must be quick_gelu or gelu, but config.json says {name!r}: it cannot be read")
    return name


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
