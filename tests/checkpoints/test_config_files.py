"""Configs as people have them: what is legal loads, what is absurd is one line before anything is built."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.checkpoints import architecture
from maskclip_jax.checkpoints.config_rules import from_json, to_json
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.encoders.config import variant
from maskclip_jax.errors import UserError

HF = architecture.to_hf(variant("ViT-B/16"))
OPEN_CLIP = architecture.to_open_clip(variant("ViT-B/16"))
ABSURD = [None, True, -1, 0, 1.5, 10**30, 1e300, "x", "x" * 10**4, [], [1], {}, [[2, 2]]]
ONE_LINE = r"^.{1,400}$"


@pytest.mark.parametrize("tower", ["vision_config", "text_config"])
def test_absurd_transformers_configs(tower):
    keys = [key for key in HF[tower] if key not in ("projection_dim", "num_channels")]
    for key in keys:
        for value in ABSURD:
            if (key, value) in (("eos_token_id", None), ("eos_token_id", 0), ("layer_norm_eps", True)):
                continue
            with pytest.raises(UserError, match=ONE_LINE):
                architecture.from_hf(HF | {tower: HF[tower] | {key: value}})
    for value in ("x", 3, [], [{}]):
        with pytest.raises(UserError, match=f"{tower} must be an object of keys"):
            architecture.from_hf(HF | {tower: value})


@pytest.mark.parametrize("part", ["vision_cfg", "text_cfg", None])
def test_absurd_open_clip_configs(part):
    inner = OPEN_CLIP if part is None else OPEN_CLIP[part]
    for key in inner:
        for value in ABSURD:
            if (key, value) in (("quick_gelu", True), ("mlp_ratio", 1.5), ("vision_cfg", {}), ("text_cfg", {})):
                continue  # legal: all left out
            changed = inner | {key: value}
            with pytest.raises(UserError, match=ONE_LINE):
                architecture.from_open_clip(changed if part is None else OPEN_CLIP | {part: changed})


@pytest.mark.parametrize("name", ["ViT-B/16", "RN50x4"])
def test_absurd_converted_configs(name):
    """`clip.json`, which this project writes: there and back, and by the same rules."""
    content = json.loads(json.dumps(to_json(variant(name))))
    assert from_json(content, "clip.json") == variant(name)
    for part in ("vision", "text"):
        for key in content[part]:
            for value in ABSURD:
                flag = value is True and isinstance(content[part][key], bool)
                if not flag and (key, value) not in (("eot_token_id", None), ("rotary_period", 1.5)):
                    with pytest.raises(UserError, match=ONE_LINE):
                        from_json(content | {part: content[part] | {key: value}}, "clip.json")


def test_legal_open_clip_configs():
    """Sides as pairs, and open_clip's own defaults written out (its CLIPVisionCfg and CLIPTextCfg of 2026)."""
    vision = {
        "image_size": [224, 224],
        "patch_size": [16, 16],
        "image_seq_len": None,
        "ls_init_value": None,
        "patch_dropout": 0.0,
        "attentional_pool": False,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "final_ln_after_pool": False,
        "pool_type": "tok",
        "output_tokens": False,
        "act_kwargs": None,
        "norm_kwargs": None,
        "block_type": None,
        "qk_norm": False,
        "scaled_cosine_attn": False,
        "scale_heads": False,
        "scale_attn_inner": False,
        "scale_attn": False,
        "scale_fc": False,
        "timm_model_name": None,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": False,
        "timm_drop": 0.0,
        "timm_drop_path": None,
        "timm_model_kwargs": None,
    }
    text = {
        "text_arch": "clip",
        "variable_text": False,
        "hf_tokenizer_name": None,
        "tokenizer_mode": None,
        "tokenizer_kwargs": None,
        "ls_init_value": None,
        "embed_cls": False,
        "pad_id": 0,
        "bos_id": None,
        "eos_id": None,
        "tokenizer_type": "",
        "tiktoken_name": "cl100k_base",
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "attention_mode": "causal",
        "pos_embed": "rope",
        "mlp_type": "swiglu",
        "norm_type": None,
        "norm_eps": 1e-6,
        "reg_tokens": 0,
        "attention_bias": None,
        "mlp_bias": None,
        "gate_bias": None,
        "hf_model_name": None,
        "hf_model_pretrained": True,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "hf_model_config": None,
    }
    model = {"nonscalar_logit_scale": False, "init_logit_scale": 2.6593, "init_logit_bias": None, "custom_text": False}
    model |= {"vision_cfg": OPEN_CLIP["vision_cfg"] | vision, "text_cfg": OPEN_CLIP["text_cfg"] | text}
    assert architecture.from_open_clip(OPEN_CLIP | model) == variant("ViT-B/16")
    for key, value in (("scale_fc", True), ("timm_model_name", "vit_base"), ("block_type", "custom")):
        changed = OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | {key: value}}
        with pytest.raises(UserError, match=f"{key} = .* not OpenAI's architecture"):
            architecture.from_open_clip(changed)
    with pytest.raises(UserError, match=r"patch_size is .* \(a square\), or null, got \[16, 8\]"):
        architecture.from_open_clip(OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | {"patch_size": [16, 8]}})


@pytest.mark.slow
def test_transformers_own_reading():
    """Defaults, older `…_config_dict` and pairs mean what they mean to transformers."""
    transformers = pytest.importorskip("transformers")
    for given in (
        {},
        {"text_config": {"hidden_size": 768, "num_attention_heads": 12}, "projection_dim": 768},
        {"text_config": {"hidden_size": 64}, "text_config_dict": {"hidden_size": 256, "hidden_act": "gelu"}},
        {"vision_config_dict": {"patch_size": 14, "image_size": [336, 336]}, "vision_config": None},
    ):
        ours = architecture.from_hf({"model_type": "clip"} | given)
        theirs = transformers.CLIPConfig.from_dict({"model_type": "clip"} | given)
        v, t = theirs.vision_config, theirs.text_config
        side = v.image_size if isinstance(v.image_size, int) else v.image_size[0]
        assert (ours.vision.image_size, ours.vision.patch_size, ours.vision.width) == (
            side,
            v.patch_size,
            v.hidden_size,
        )
        assert (ours.text.width, ours.text.activation, ours.text.heads) == (
            t.hidden_size,
            t.hidden_act,
            t.num_attention_heads,
        )
        assert (ours.embed_dim, ours.text.eot_token_id) == (theirs.projection_dim, t.eos_token_id)


def test_a_side_that_is_no_multiple_of_the_patch(tmp_path, checkpoints):
    """38 pixels at patch 8: the convolution leaves out the rest, and so does the tower."""
    folder = checkpoints.write_folder(tmp_path / "model", "vit", "hf")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 38
    (folder / "config.json").write_text(json.dumps(config))
    pretrained = load_clip(folder)
    assert (pretrained.config.vision.grid, pretrained.config.vision.image_size) == (4, 38)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 38, 38, 3)), jnp.float32)
    encode = lambda x: pretrained.model.apply(pretrained.variables, x, method="encode_image")  # noqa: E731
    np.testing.assert_allclose(*jax.jit(lambda x: (encode(x), encode(x[:, :32, :32])))(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [3, 400, 1025, 10**9])
def test_layers_that_the_weights_have_not(tmp_path, checkpoints, layers):
    for form, file, keys in (
        ("hf", "config.json", ("text_config", "num_hidden_layers")),
        ("open_clip", "open_clip_config.json", ("model_cfg", "text_cfg", "layers")),
    ):
        folder = checkpoints.write_folder(tmp_path / form, "vit", form)
        content = json.loads((folder / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = layers
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"1[26] missing|layers and the weights have|whole number from 1 to 1024"):
            load_clip(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "open_clip"])
def test_a_config_that_asks_for_terabytes(tmp_path, checkpoints, form):
    """Every value is in its range; nothing of these sizes is made before the weights are seen to be smaller."""
    folder = checkpoints.write_folder(tmp_path / form, "vit", form)
    name = "config.json" if form == "hf" else "open_clip_config.json"
    content = json.loads((folder / name).read_text())
    if form == "hf":
        content["vision_config"] |= {"hidden_size": 2**16, "intermediate_size": 2**18, "image_size": 2**14}
        content["text_config"] |= {"hidden_size": 2**16, "vocab_size": 2**24, "max_position_embeddings": 2**16}
    else:
        content["model_cfg"]["vision_cfg"] |= {"width": 2**16, "image_size": 2**14}
        content["model_cfg"]["text_cfg"] |= {"width": 2**16, "vocab_size": 2**24, "context_length": 2**16}
    (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer.json").unlink()  # which would be refused before the weights
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="of another shape"):
            load_clip(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_every_config_is_checked_against_itself():
    config = variant("ViT-B/16")
    text = dataclasses.replace(config.text, heads=7)
    with pytest.raises(UserError, match="the text tower's width is a multiple of its heads, got 512 and 7"):
        from_json(to_json(dataclasses.replace(config, text=text)), "clip.json")
    with pytest.raises(UserError, match="an image has at least a patch, 300, got 224"):
        architecture.from_hf(HF | {"vision_config": HF["vision_config"] | {"patch_size": 300}})
