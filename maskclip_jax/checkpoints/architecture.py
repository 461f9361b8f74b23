"""Which architecture a checkpoint is: from transformers' config or from the arrays' shapes alone.

For open_clip's config see `open_clip.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskclip_jax.checkpoints import dino
from maskclip_jax.checkpoints.config_rules import CONTEXT, EPSILON, LAYERS, MLP, SIDE, VOCABULARY, WIDTH, checked
from maskclip_jax.checkpoints.open_clip import from_open_clip as from_open_clip
from maskclip_jax.checkpoints.open_clip import to_open_clip as to_open_clip
from maskclip_jax.data import schema
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders.config import NO_TEXT as NO_TEXT
from maskclip_jax.encoders.config import SIGLIP_TEXT, SIGLIP_VIT, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
WIDER_HEADS = {1280: 80, 1408: 88, 1664: 104}  # width of the ViT -> of a head, in H/14, g/14 and bigG/14


_HF_ACTIVATIONS: dict[str, Any] = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_HF_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "hidden_act": schema.Rule(
        "quick_gelu, gelu or gelu_pytorch_tanh",
        lambda x: _HF_ACTIVATIONS.get(x, schema.UNFIT) if isinstance(x, str) else schema.UNFIT,
    ),
    "layer_norm_eps": EPSILON,
}
_HF_RULES = {
    "vision_config": _HF_TOWER
    | {
        "num_channels": schema.Rule("3, for RGB", lambda x: x if x == 3 else schema.UNFIT),
        "image_size": schema.square(SIDE),
        "patch_size": schema.square(SIDE),
        "vision_use_head": schema.FLAG,
    },
    "text_config": _HF_TOWER
    | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": schema.optional(schema.whole(0, 2**24)),
        "projection_size": schema.optional(WIDTH),
    },
}
_CLIP_TOWER = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' own, which files leave out
    "vision_config": _CLIP_TOWER
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"image_size": 224, "patch_size": 32},
    "text_config": _CLIP_TOWER
    | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
}


_SIGLIP_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_DEFAULTS = {
    "vision_config": _SIGLIP_TOWER | {"image_size": 224, "patch_size": 16, "vision_use_head": True},
    "text_config": _SIGLIP_TOWER | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
}
MODEL_TYPES = ("clip", "metaclip_2", "siglip")
_OTHERS = {  # what people may well try, by its `model_type`
    "siglip2": "SigLIP 2's NaFlex: take one of a fixed resolution, google/siglip2-base-patch16-256",
    "tipsv2": "TIPSv2 in transformers' form: take scenic's or PyTorch's pair of .npz files",
    "altclip": "AltCLIP",
    "align": "ALIGN",
    "aimv2": "AIMv2",
    "blip": "BLIP",
    "chinese_clip": "Chinese-CLIP",
    "clap": "CLAP",
    "clip_vision_model": "CLIP's image tower alone",
    "clip_text_model": "CLIP's text tower alone",
    "clipseg": "CLIPSeg",
    "dinov3_convnext": "DINOv3's ConvNeXt: take one of its ViTs, facebook/dinov3-vitb16-pretrain-lvd1689m",
    "flava": "FLAVA",
    "siglip_vision_model": "SigLIP's image tower alone",
    "siglip_text_model": "SigLIP's text tower alone",
    "vision-text-dual-encoder": "a dual encoder of other towers",
    "xclip": "X-CLIP",
}


def from_hf(config: Mapping[str, Any], *, backbone: bool = False) -> CLIPConfig:
    """From the dict of a `config.json` of transformers' `CLIPModel`, `MetaClip2Model` or `SiglipModel`; keys it leaves
    out are transformers' defaults. (`backbone`: or of a model of `dino.MODEL_TYPES`.)"""
    check_model_type(config, backbone)
    if config["model_type"] in dino.MODEL_TYPES:
        return dino.from_hf(config)
    if config["model_type"] == "siglip":
        return _siglip(config)
    v, t = (_hf_tower(config, name, _HF_DEFAULTS) for name in ("vision_config", "text_config"))
    vision = ViTConfig(v["image_size"], v["patch_size"], *_sizes(v))
    # transformers wrote 2 by mistake into every early CLIP, and has since taken it to mean "the highest id"; in
    # MetaCLIP 2's vocabulary it is the end.
    eot = None if t["eos_token_id"] == 2 and config["model_type"] == "clip" else t["eos_token_id"]
    text = TextConfig(t["vocab_size"], t["max_position_embeddings"], *_sizes(t), eot)
    embed_dim = schema.fields(config, {"projection_dim": WIDTH}, "config.json").get("projection_dim", 512)
    return checked(CLIPConfig(vision, text, embed_dim), "config.json")


def _siglip(config: Mapping[str, Any]) -> CLIPConfig:
    v, t = (_hf_tower(config, name, _SIGLIP_DEFAULTS) for name in ("vision_config", "text_config"))
    if not v["vision_use_head"]:
        raise UserError(
            "SigLIP is read through its pooling head, but vision_use_head is false: take another checkpoint"
        )
    vision = ViTConfig(v["image_size"], v["patch_size"], *_sizes(v), **_beyond(SIGLIP_VIT))
    text = TextConfig(t["vocab_size"], t["max_position_embeddings"], *_sizes(t), **_beyond(SIGLIP_TEXT))
    embed_dim = t["hidden_size"] if t["projection_size"] is None else t["projection_size"]
    return checked(CLIPConfig(vision, text, embed_dim, logit_bias=True), "config.json")


def _sizes(tower: Mapping[str, Any]) -> tuple:
    """Width, layers, heads, MLP width, activation, epsilon: as `ViTConfig` and `TextConfig` have them."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    return (*(tower[name] for name in names), tower["layer_norm_eps"])


def _beyond(fields: dict[str, Any]) -> dict[str, Any]:
    """A family's fields without those that `_sizes` gives."""
    return {key: value for key, value in fields.items() if key not in ("activation", "layer_norm_eps")}


def _hf_tower(config: Mapping[str, Any], name: str, defaults: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One tower's keys; an older `…_config_dict` replaces the newer object, as in transformers."""
    older = config.get(f"{name}_dict")
    given = config.get(name, {}) if older is None else older
    given = {} if given is None else given
    return defaults[name] | schema.fields(given, _HF_RULES[name], f"config.json: {name}")


def to_hf(config: CLIPConfig) -> dict[str, Any]:
    """`config` as transformers' `config.json`: what `from_hf` reads back. ViTs only."""
    v, t = config.vision, config.text
    if isinstance(v, ResNetConfig) or config.family != "clip":
        raise UserError("transformers' CLIP is a ViT with a projection, and this is none: write an open_clip folder")
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


def check_model_type(config: Mapping[str, Any], backbone: bool = False) -> None:
    """Raises UserError, naming the architecture, unless a `config.json` is of one of `MODEL_TYPES`, or (for a
    `backbone`) of `dino.MODEL_TYPES`."""
    came = config.get("model_type")
    types = (*MODEL_TYPES, *dino.MODEL_TYPES) if backbone else MODEL_TYPES
    if came in types:
        return
    if came in dino.MODEL_TYPES:
        raise UserError(
            f"a model reads texts, got one without text tower ({came}): give it as the affinity and a CLIP as the model"
        )
    other = f" ({_OTHERS[came]})" if isinstance(came, str) and came in _OTHERS else ""
    if came is None and isinstance(config.get("architecture"), str):
        other = f" (timm's {cut(config['architecture'], 60)})"
    raise UserError(
        f"config.json must be of model_type {', '.join(map(repr, types))}, not {cut(repr(came), 60)}{other}: "
        "only these architectures are read"
    )


def from_shapes(shapes: Shapes) -> CLIPConfig:
    """From OpenAI-named arrays' shapes, by OpenAI's own rules: 64 channels to a head, and QuickGELU.

    Nothing in the shapes tells QuickGELU from GELU: weights trained with GELU need a config.
    """
    vision, embed_dim = vision_from_shapes(shapes)
    vocab_size, width = _shape(shapes, "token_embedding.weight", 2)
    context_length, _ = _shape(shapes, "positional_embedding", 2)
    layers = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    mlp_width, _ = _shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)
    scaled = "transformer.resblocks.0.ls_1.gamma" in shapes
    text = TextConfig(vocab_size, context_length, width, layers, _heads(width), mlp_width, layer_scale=scaled)
    return checked(CLIPConfig(vision, text, embed_dim, logit_bias="logit_bias" in shapes), "the weights")


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
        layers = count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
        mlp_width, _ = _shape(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight", 2)
        scaled = "visual.transformer.resblocks.0.ls_1.gamma" in shapes
        vit = ViTConfig(image_size, patch, width, layers, _heads(width), mlp_width, layer_scale=scaled)
        return vit, _shape(shapes, "visual.proj", 2)[1]
    width = _shape(shapes, "visual.layer1.0.conv1.weight", 4)[0]
    side = _side(_shape(shapes, "visual.attnpool.positional_embedding", 2))
    layers = tuple(count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    embed_dim = _shape(shapes, "visual.attnpool.c_proj.weight", 2)[0]
    return ResNetConfig(side * 32, width, layers, _heads(width * 32)), embed_dim


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"an OpenAI-named CLIP needs {name}, which is missing: give both towers' arrays")
    if len(shapes[name]) != rank:
        raise UserError(f"{name} must have {rank} dimensions, but its shape is {shapes[name]}: check the weights")
    return shapes[name]


def count(shapes: Shapes, pattern: str) -> int:
    """How many different first groups `pattern` finds in the names: of layers, their numbers."""
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
