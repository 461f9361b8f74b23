"""What the numbers of an architecture may be, whatever file they come from; and our own `clip.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from maskclip_jax.data import schema
from maskclip_jax.encoders.config import NO_TEXT, CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.errors import UserError

LAYERS, WIDTH, MLP = schema.whole(1, 1024), schema.whole(1, 2**16), schema.whole(1, 2**18)
SIDE, CONTEXT, VOCABULARY = schema.whole(1, 2**14), schema.whole(2, 2**16), schema.whole(1, 2**24)
EPSILON, ACTIVATION = schema.number(1e-12, 1), schema.one_of("quick_gelu", "gelu", "gelu_tanh", "relu", "swiglu")
BLOCKS = schema.several(schema.whole(1, 256), 4, 4)
_TRANSFORMER = {
    "width": WIDTH,
    "layers": LAYERS,
    "heads": WIDTH,
    "mlp_width": MLP,
    "activation": ACTIVATION,
    "layer_norm_eps": EPSILON,
    "layer_scale": schema.FLAG,
}
_VIT = {
    "image_size": SIDE,
    "patch_size": SIDE,
    "class_tokens": schema.whole(0, 64),
    "class_position": schema.FLAG,
    "positions": schema.one_of("learned", "rotary"),
    "rotary_period": schema.number(1e-3, 1e9),
    "position_filter": schema.one_of("bicubic", "bicubic_antialias", "bilinear"),
    "biases": schema.one_of("qkv", "qv", "q", "k", "v", "qk", "kv", ""),
    "patch_bias": schema.FLAG,
    "ln_pre": schema.FLAG,
    "head": schema.one_of("projection", "map", "none"),
}
_TOWERS = {
    "vit": (ViTConfig, _VIT | _TRANSFORMER),
    "resnet": (
        ResNetConfig,
        {"image_size": SIDE, "width": WIDTH, "layers": BLOCKS, "heads": WIDTH, "dense_stride": schema.whole(8, 32)},
    ),
}
_TEXT = {"vocab_size": VOCABULARY, "context_length": CONTEXT, "eot_token_id": schema.optional(VOCABULARY)}
_TEXT |= _TRANSFORMER | {
    "pool": schema.one_of("eot", "last", "mean"),
    "causal": schema.FLAG,
    "positions": schema.one_of("learned", "sinusoidal"),
    "head": schema.one_of("projection", "linear", "none"),
}


def checked(config: CLIPConfig, where: str) -> CLIPConfig:
    """`config` when its numbers fit each other. Raises UserError, naming `where` they come from, when not."""
    v, t = config.vision, config.text
    resnet = isinstance(v, ResNetConfig)
    for name, width, heads in (("image", 32 * v.width if resnet else v.width, v.heads), ("text", t.width, t.heads)):
        if not heads or width % heads:
            raise UserError(
                f"{where}: the {name} tower's width is a multiple of its heads, got {width} and {heads}: "
                "take the original file"
            )
    patch = 32 if resnet else v.patch_size
    if not 0 < patch <= v.image_size:
        raise UserError(f"{where}: an image has at least a patch, {patch}, got {v.image_size}: take the original")
    if not all((config.embed_dim, t.vocab_size, t.layers, *(v.layers if resnet else (v.layers,)))):
        raise UserError(f"{where}: a tower has layers and a width, got a zero: check the weights")
    widths = [v.width] * (getattr(v, "head", "projection") != "projection") + [t.width] * (t.head == "none")
    if any(width != config.embed_dim for width in widths) and t != NO_TEXT:
        raise UserError(
            f"{where}: towers without a projection meet in their own width, got {widths} and {config.embed_dim}: "
            "take the original file"
        )
    if not resnet and v.positions == "rotary" and (v.class_position or v.width // v.heads % 4):
        raise UserError(
            f"{where}: rotary positions take heads of a multiple of 4 and no table, got a width of {v.width} in "
            f"{v.heads} heads: take the original file"
        )
    if not resnet and v.class_tokens < (v.class_position or v.head != "map"):
        raise UserError(f"{where}: a tower has a class token or a pooling head, got neither: take the original file")
    return config


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """`config` without its fidelity, as JSON has it: what `from_json` reads back."""
    kind = "resnet" if isinstance(config.vision, ResNetConfig) else "vit"
    vision = {"kind": kind, **dataclasses.asdict(config.vision)}
    text = dataclasses.asdict(config.text)
    return {"embed_dim": config.embed_dim, "logit_bias": config.logit_bias, "vision": vision, "text": text}


def from_json(content: Any, where: str) -> CLIPConfig:
    """What `to_json` made. Raises UserError for anything else."""
    rules = {"embed_dim": WIDTH, "vision": schema.OBJECT, "text": schema.OBJECT, "logit_bias": schema.FLAG}
    given = schema.fields(content, rules, where, needed=("embed_dim", "vision", "text"), only=True)
    kind = schema.fields(given["vision"], {"kind": schema.one_of(*_TOWERS)}, f"{where}: vision", needed=("kind",))
    tower, rules = _TOWERS[kind["kind"]]
    vision = {key: value for key, value in given["vision"].items() if key != "kind"}
    vision = tower(**_all(vision, tower, rules, f"{where}: vision"))
    text = TextConfig(**_all(given["text"], TextConfig, _TEXT, f"{where}: text"))
    return checked(CLIPConfig(vision, text, given["embed_dim"], logit_bias=given.get("logit_bias", False)), where)


def _all(content: Any, cls: type, rules: dict[str, schema.Rule], where: str) -> dict[str, Any]:
    needed = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    return schema.fields(content, rules, where, needed, only=True)
