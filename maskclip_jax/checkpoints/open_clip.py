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
_ANY, _OFF = None, (False,)


def _switches(names: str, values: tuple | None) -> dict[str, tuple | None]:
    return dict.fromkeys(names.split(), values)


_OPENAI_BLOCK = {
    **_switches("final_ln_after_pool output_tokens qk_norm scaled_cosine_attn scale_heads scale_attn_inner", _OFF),
    **_switches("scale_attn scale_fc", _OFF),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
}
# Moving names under `text.`, and initial values, dropped for the trained ones.
_OPENAI_MODEL = _switches("custom_text init_logit_scale nonscalar_logit_scale cast_dtype output_dict", _ANY)
_OPENAI_VISION = _OPENAI_BLOCK | {
    **_switches("attentional_pool input_patchnorm global_average_pool", _OFF),
    **_switches("patch_dropout attn_pooler_queries attn_pooler_heads n_queries", _ANY),  # the first in training only
    "image_seq_len": (None,),
    "pos_embed_type": ("learnable",),
    "pool_type": ("tok",),
    "timm_model_name": (None,),  # without which the others of timm say nothing
    **_switches("timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path", _ANY),
    "timm_model_kwargs": _ANY,
}
_OPENAI_TEXT = _OPENAI_BLOCK | {
    **_switches("variable_text embed_cls no_causal_mask proj_bias attn_gated pre_norm value_residual", _OFF),
    "text_arch": ("clip",),
    "pad_id": (0,),
    "bos_id": _ANY,
    "proj_type": ("linear",),
    "tokenizer_mode": (None, "clip"),
    "tokenizer_kwargs": (None, {}),
    "tokenizer_type": ("",),
    "tiktoken_name": _ANY,
    "attention_mode": ("causal",),
    "norm_type": (None, "layernorm"),
    **_switches("attention_bias mlp_bias", (None, True)),
    "gate_bias": (None,),
    "norm_placement": ("pre",),
    "reg_tokens": (0,),
    **_switches("pos_embed rope_temperature mlp_type norm_eps zero_init_residual", _ANY),  # text_arch modern
    "hf_model_name": (None, ""),  # without which the others of transformers say nothing
    "hf_tokenizer_name": _ANY,  # whose file lies beside the weights
    **_switches("hf_model_pretrained hf_proj_type hf_pooler_type hf_model_config proj pooler_type", _ANY),
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
