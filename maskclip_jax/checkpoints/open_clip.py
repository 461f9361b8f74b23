"""open_clip's `model_cfg` <-> `CLIPConfig`, as far as it describes OpenAI's architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskclip_jax.checkpoints.config_rules import BLOCKS, CONTEXT, LAYERS, SIDE, VOCABULARY, WIDTH, checked
from maskclip_jax.data import schema
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.errors import UserError

_RATIO = schema.number(0.01, 64)
_OPEN_CLIP_MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": schema.OBJECT,
    "text_cfg": schema.OBJECT,
    "quick_gelu": schema.FLAG,
    "init_logit_bias": schema.optional(schema.number(-1e6, 1e6)),
}
_LAYER_SCALE = schema.optional(schema.number(0, 1e6))  # its initial value: none, or 0, is no layer scale
_OPEN_CLIP_VISION = {
    "layers": schema.Rule(
        f"{LAYERS.words}, or {BLOCKS.words}", lambda x: (BLOCKS if isinstance(x, list | tuple) else LAYERS).read(x)
    ),
    "width": WIDTH,
    "head_width": WIDTH,
    "mlp_ratio": _RATIO,
    "patch_size": schema.optional(schema.square(SIDE)),
    "image_size": schema.square(SIDE),
    "no_ln_pre": schema.FLAG,
    "ls_init_value": _LAYER_SCALE,
}
_VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_VISION_DEFAULTS |= {"no_ln_pre": False, "ls_init_value": None}
_OPEN_CLIP_TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "heads": WIDTH,
    "layers": LAYERS,
    "mlp_ratio": _RATIO,
    "ls_init_value": _LAYER_SCALE,
    "pool_type": schema.one_of("argmax", "eos"),
    "eos_id": schema.optional(VOCABULARY),
}
_TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_TEXT_DEFAULTS |= {"ls_init_value": None, "pool_type": "argmax", "eos_id": None}

# open_clip's other switches: these values are OpenAI's architecture, others another one. `_ANY` changes nothing in it.
_ANY = None
_OPENAI_BLOCK = {
    "final_ln_after_pool": (False,),
    "output_tokens": (False,),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}
_OPENAI_MODEL = {
    "custom_text": _ANY,  # only moves names under `text.`
    "init_logit_scale": _ANY,  # initial values, dropped for the trained ones
    "nonscalar_logit_scale": _ANY,
    "cast_dtype": _ANY,
    "output_dict": _ANY,
}
_OPENAI_VISION = _OPENAI_BLOCK | {
    "patch_dropout": _ANY,  # in training only
    "image_seq_len": (None,),
    "attentional_pool": (False,),
    "attn_pooler_queries": _ANY,
    "attn_pooler_heads": _ANY,
    "n_queries": _ANY,
    "input_patchnorm": (False,),
    "global_average_pool": (False,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": (None,),  # without which the others of timm say nothing
    **dict.fromkeys(
        f"timm_{name}"
        for name in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path", "model_kwargs")
    ),
}
_OPENAI_TEXT = _OPENAI_BLOCK | {
    "text_arch": ("clip",),
    "variable_text": (False,),
    "embed_cls": (False,),
    "pad_id": (0,),
    "bos_id": _ANY,
    "no_causal_mask": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "tokenizer_mode": (None, "clip"),
    "tokenizer_kwargs": (None, {}),
    "tokenizer_type": ("",),
    "tiktoken_name": _ANY,
    "attention_mode": ("causal",),
    "norm_type": (None, "layernorm"),
    "attention_bias": (None, True),
    "mlp_bias": (None, True),
    "gate_bias": (None,),
    "attn_gated": (False,),
    "pre_norm": (False,),
    "norm_placement": ("pre",),
    "reg_tokens": (0,),
    "value_residual": (False,),
    **dict.fromkeys(
        ("pos_embed", "rope_temperature", "mlp_type", "norm_eps", "zero_init_residual")
    ),  # text_arch modern
    "hf_model_name": (None, ""),  # without which the others of transformers say nothing
    "hf_tokenizer_name": _ANY,  # whose file lies beside the weights
    **dict.fromkeys(
        ("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_model_config", "proj", "pooler_type")
    ),
}


def from_open_clip(model_cfg: Mapping[str, Any]) -> CLIPConfig:
    """From the `model_cfg` of an `open_clip_config.json`; unknown keys are an unknown architecture."""
    model = _strict(model_cfg, _OPEN_CLIP_MODEL, _OPENAI_MODEL, "model_cfg", ("embed_dim", "vision_cfg", "text_cfg"))
    v = _VISION_DEFAULTS | _strict(model["vision_cfg"], _OPEN_CLIP_VISION, _OPENAI_VISION, "vision_cfg")
    t = _TEXT_DEFAULTS | _strict(model["text_cfg"], _OPEN_CLIP_TEXT, _OPENAI_TEXT, "text_cfg")
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    stem = 32 if isinstance(v["layers"], tuple) else 1
    if stem * v["width"] < v["head_width"]:
        raise UserError(f"vision_cfg: head_width is at most the width, got {v['head_width']}: take the original file")
    heads = stem * v["width"] // v["head_width"]
    if isinstance(v["layers"], tuple):
        vision = ResNetConfig(v["image_size"], v["width"], v["layers"], heads)
    else:
        patch = schema.value(v["patch_size"], SIDE, "vision_cfg: patch_size")
        mlp = max(1, int(v["width"] * v["mlp_ratio"]))
        kin = {"ln_pre": not v["no_ln_pre"], "layer_scale": bool(v["ls_init_value"])}
        vision = ViTConfig(v["image_size"], patch, v["width"], v["layers"], heads, mlp, activation, **kin)
    mlp = max(1, int(t["width"] * t["mlp_ratio"]))
    eos, scale = t["eos_id"], bool(t["ls_init_value"])
    if t["pool_type"] == "eos" and eos is None:
        raise UserError("text_cfg: pool_type eos needs eos_id, the end's token: take the original file")
    sizes = t["vocab_size"], t["context_length"], t["width"], t["layers"], t["heads"], mlp, activation
    text = TextConfig(*sizes, eot_token_id=eos if t["pool_type"] == "eos" else None, layer_scale=scale)
    bias = model.get("init_logit_bias") is not None
    return checked(CLIPConfig(vision, text, model["embed_dim"], logit_bias=bias), "open_clip_config.json")


def to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """`config` as open_clip's `model_cfg`: what `from_open_clip` reads back."""
    v, t = config.vision, config.text
    vision: dict[str, Any] = {"image_size": v.image_size, "width": v.width}
    if isinstance(v, ResNetConfig):
        vision |= {"layers": list(v.layers), "patch_size": None, "head_width": v.width * 32 // v.heads}
    else:
        vision |= {"layers": v.layers, "patch_size": v.patch_size, "head_width": v.width // v.heads}
        vision["mlp_ratio"] = v.mlp_width / v.width
        vision |= ({} if v.ln_pre else {"no_ln_pre": True}) | ({"ls_init_value": 1.0} if v.layer_scale else {})
    text: dict[str, Any] = {n: getattr(t, n) for n in ("context_length", "vocab_size", "width", "heads", "layers")}
    text |= {"ls_init_value": 1.0} if t.layer_scale else {}
    text |= {} if t.eot_token_id is None else {"pool_type": "eos", "eos_id": t.eot_token_id}
    model = {
        "embed_dim": config.embed_dim,
        "quick_gelu": t.activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text | {"mlp_ratio": t.mlp_width / t.width},
    }
    return model | ({"init_logit_bias": -10.0} if config.logit_bias else {})


_NAMES = {  # of other architectures: by a key that they alone set, or a part of a value
    "multimodal_cfg": "CoCa",
    "attentional_pool": "CoCa",
    "pool_type avg": "CLIPA (mean pooling)",
    "naflex": "SigLIP 2's NaFlex",
    "siglip": "SigLIP in timm's form (take transformers' or big_vision's files)",
    "eva": "EVA",
    "pe_core": "PE-Core",
    "mci": "MobileCLIP",
    "mobileclip": "MobileCLIP",
    "fastvit": "MobileCLIP",
    "convnext": "ConvNeXt",
    "vitamin": "ViTamin",
    "nllb": "NLLB",
    "xlm": "XLM-RoBERTa",
    "roberta": "RoBERTa",
    "mt5": "mT5",
}


def _strict(
    given: Any, rules: Mapping[str, schema.Rule], fixed: Mapping[str, tuple | None], where: str, needed: tuple = ()
) -> dict[str, Any]:
    """`schema.fields`, where every other key must have a value that `fixed` knows to be OpenAI's."""
    found = schema.fields(given, rules, where, needed)
    for key, value in given.items():
        if key not in rules and (key not in fixed or (fixed[key] is not _ANY and value not in fixed[key])):
            words = f"{key} {value}".lower() if isinstance(value, str) else key
            name = next((f"{name}, " for part, name in _NAMES.items() if part in words), "")
            came = f"{cut(key, 60)} = {cut(value, 60)}"
            raise UserError(f"{where} has {came}, which is {name}not OpenAI's architecture: it cannot be read")
    return found
