"""Image-only backbones in transformers' form: DINO (its `ViTModel`), DINOv2 with and without registers, DINOv3's ViTs.

They have no text tower: what is alike in their patches sharpens a CLIP's masks (`Options.affinity`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskclip_jax.checkpoints.config_rules import EPSILON, LAYERS, MLP, SIDE, WIDTH, checked
from maskclip_jax.data import schema
from maskclip_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from maskclip_jax.encoders.config import DINO_VIT, NO_TEXT, CLIPConfig, ViTConfig
from maskclip_jax.errors import UserError

PREPROCESS = Preprocess(IMAGENET_MEAN, IMAGENET_STD)  # of files that bring none
_RULES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "layer_norm_eps": EPSILON,
    "image_size": schema.square(SIDE),
    "patch_size": schema.square(SIDE),
    "num_channels": schema.Rule("3, for RGB", lambda x: x if x == 3 else schema.UNFIT),
    "hidden_act": schema.one_of("gelu", "silu"),
    "intermediate_size": MLP,
    "mlp_ratio": schema.number(1e-3, 1e3),
    "num_register_tokens": schema.whole(0, 63),
    "rope_theta": schema.number(1e-3, 1e9),
    **dict.fromkeys(("qkv_bias", "use_swiglu_ffn", "query_bias", "key_bias", "value_bias"), schema.FLAG),
    **dict.fromkeys(("proj_bias", "mlp_bias", "use_gated_mlp"), schema.FLAG),
}
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
_SIZES |= {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
_DINOV2 = _SIZES | {"mlp_ratio": 4, "qkv_bias": True, "use_swiglu_ffn": False, "num_register_tokens": 0}
_DEFAULTS: dict[str, dict[str, Any]] = {  # transformers' own, which files leave out
    "vit": _SIZES | {"layer_norm_eps": 1e-12, "intermediate_size": 3072, "qkv_bias": True},
    "dinov2": _DINOV2 | {"patch_size": 14},
    "dinov2_with_registers": _DINOV2 | {"num_register_tokens": 4},
    "dinov3_vit": _SIZES
    | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5}
    | {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}
    | {"use_gated_mlp": False, "num_register_tokens": 0, "rope_theta": 100.0},
}
MODEL_TYPES = tuple(_DEFAULTS)


def from_hf(config: Mapping[str, Any]) -> CLIPConfig:
    """From the dict of a `config.json` whose `model_type` is one of `MODEL_TYPES`. Raises UserError for others."""
    kind = config["model_type"]
    c = _DEFAULTS[kind] | schema.fields(config, _RULES, "config.json")
    width, gated = c["hidden_size"], c.get("use_gated_mlp", False) or c.get("use_swiglu_ffn", False)
    if kind == "dinov3_vit":
        biases = "".join(q for q in "qkv" if c[{"q": "query_bias", "k": "key_bias", "v": "value_bias"}[q]])
        if not (c["proj_bias"] and c["mlp_bias"]):
            raise UserError(
                "DINOv3's projections and MLPs have biases, got proj_bias or mlp_bias false: take Meta's checkpoints"
            )
    else:
        biases = "qkv" if c["qkv_bias"] else ""
    if (c["hidden_act"] == "silu") != (gated and kind == "dinov3_vit"):
        raise UserError(
            f"config.json: a {kind} has hidden_act 'gelu', or 'silu' with use_gated_mlp, got {c['hidden_act']!r}: "
            "take the original file"
        )
    if "mlp_ratio" in c:
        hidden = int(width * c["mlp_ratio"])
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden
    else:
        hidden = c["intermediate_size"]
    vision = ViTConfig(
        c["image_size"],
        c["patch_size"],
        width,
        c["num_hidden_layers"],
        c["num_attention_heads"],
        hidden,
        "swiglu" if gated else "gelu",
        c["layer_norm_eps"],
        class_tokens=1 + c.get("num_register_tokens", 0),
        layer_scale=kind != "vit",
        biases=biases,
        **DINO_VIT,
    )
    if kind == "dinov2_with_registers":
        vision = dataclasses.replace(vision, position_filter="bicubic_antialias")
    if kind == "dinov3_vit":
        rotary = {"positions": "rotary", "rotary_period": c["rope_theta"], "class_position": False}
        vision = dataclasses.replace(vision, **rotary)
    return checked(CLIPConfig(vision, NO_TEXT, width), "config.json")
