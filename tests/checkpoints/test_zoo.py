"""CLIPs that others trained (LAION, DataComp, MetaCLIP, DFN): their published configs, and folders of their kind."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from random_clip import compiled_apply
from safetensors.numpy import save_file

from maskclip_jax.checkpoints import architecture, folders
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.weights import abstract_variables, to_names
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.encoders.config import CLIPConfig, TextConfig, ViTConfig, variant
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError


def gelu(config):
    plain = lambda tower: dataclasses.replace(tower, activation="gelu")  # noqa: E731
    return dataclasses.replace(config, vision=plain(config.vision), text=plain(config.text))


def huge(vision, text, embed_dim, activation, layers=24):
    towers = ViTConfig(*vision, activation), TextConfig(49408, 77, text[0], layers, text[1], 4 * text[0], activation)
    return CLIPConfig(*towers, embed_dim)


def open_clip(embed_dim, vision, sizes, text=(), **more):
    text = (
        {"context_length": 77, "vocab_size": 49408}
        | dict(zip(("width", "heads", "layers"), sizes, strict=True))
        | dict(text)
    )
    return {"embed_dim": embed_dim, "vision_cfg": {"image_size": 224} | vision, "text_cfg": text} | more


QUICK = {"quick_gelu": True}
B16, L14 = {"layers": 12, "width": 768, "patch_size": 16}, {"layers": 24, "width": 1024, "patch_size": 14}
H14 = {"layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
PUBLISHED = {  # as their repositories on the hub have them, and what they are
    "laion B/16": (open_clip(512, B16, (512, 8, 12)), gelu(variant("ViT-B/16"))),
    "laion B/32": (open_clip(512, B16 | {"patch_size": 32}, (512, 8, 12)), gelu(variant("ViT-B/32"))),
    "datacomp L/14": (open_clip(768, L14, (768, 12, 12)), gelu(variant("ViT-L/14"))),
    "metaclip, DFN B/16": (open_clip(512, B16, (512, 8, 12), **QUICK), variant("ViT-B/16")),
    "metaclip, DFN L/14": (open_clip(768, L14, (768, 12, 12), **QUICK), variant("ViT-L/14")),
    "laion H/14": (
        open_clip(1024, H14, (1024, 16, 24)),
        huge((224, 14, 1280, 32, 16, 5120), (1024, 16), 1024, "gelu"),
    ),
    "DFN H/14, 378": (
        open_clip(1024, H14 | {"image_size": 378}, (1024, 16, 24), **QUICK),
        huge((378, 14, 1280, 32, 16, 5120), (1024, 16), 1024, "quick_gelu"),
    ),
    "laion g/14": (
        open_clip(
            1024,
            {"layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14},
            (1024, 16, 24),
        ),
        huge((224, 14, 1408, 40, 16, 6144), (1024, 16), 1024, "gelu"),
    ),
    "M/16 alt (layer scale)": (
        open_clip(
            384,
            {"layers": 12, "width": 512, "patch_size": 16, "ls_init_value": 1e-4},
            (384, 6, 12),
            text={"ls_init_value": 1e-4},
        ),
        gelu(
            CLIPConfig(
                ViTConfig(224, 16, 512, 12, 8, 2048, layer_scale=True),
                TextConfig(49408, 77, 384, 12, 6, 1536, layer_scale=True),
                384,
            )
        ),
    ),
    "metaclip 2 H/14": (
        open_clip(
            1024,
            H14,
            (1024, 16, 24),
            text={"hf_tokenizer_name": "facebook/xlm-v-base", "pool_type": "eos", "eos_id": 2, "vocab_size": 901629},
            **QUICK,
        ),
        CLIPConfig(
            ViTConfig(224, 14, 1280, 32, 16, 5120),
            TextConfig(901629, 77, 1024, 24, 16, 4096, eot_token_id=2),
            1024,
        ),
    ),
    "with a bias, without ln_pre": (
        open_clip(512, B16 | {"no_ln_pre": True}, (512, 8, 12), init_logit_bias=-10),
        dataclasses.replace(
            gelu(variant("ViT-B/16")),
            vision=dataclasses.replace(gelu(variant("ViT-B/16")).vision, ln_pre=False),
            logit_bias=True,
        ),
    ),
    "laion bigG/14": (
        open_clip(
            1280,
            {"layers": 48, "width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "patch_size": 14},
            (1280, 20, 32),
        ),
        huge((224, 14, 1664, 48, 16, 8192), (1280, 20), 1280, "gelu", layers=32),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_open_clip_configs(name):
    published, expected = PUBLISHED[name]
    assert architecture.from_open_clip(published) == expected
    assert architecture.from_open_clip(json.loads(json.dumps(architecture.to_open_clip(expected)))) == expected


def test_published_hf_configs():
    """MetaCLIP leaves its activation out, which is QuickGELU; LAION's B/32 says gelu; the class token ends a prompt."""
    towers = {"text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}}
    towers["vision_config"] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    }
    metaclip = architecture.from_hf({"model_type": "clip", "projection_dim": 768} | towers)
    assert (metaclip.vision, metaclip.embed_dim) == (variant("ViT-L/14").vision, 768)
    laion = architecture.from_hf(
        {
            "model_type": "clip",
            "projection_dim": 512,
            "text_config": {"hidden_act": "gelu"},
            "vision_config": {"hidden_act": "gelu"},
        }
    )
    assert laion.vision == gelu(variant("ViT-B/32")).vision
    assert laion.text.activation == "gelu"


def test_metaclip_2_of_transformers():
    """XLM-V's end of text is 2, which in CLIP's own configs is a mistake for "the highest id"."""
    towers = {"text_config": {"eos_token_id": 2, "vocab_size": 901629}}
    assert architecture.from_hf({"model_type": "metaclip_2"} | towers).text.eot_token_id == 2
    assert architecture.from_hf({"model_type": "clip"} | towers).text.eot_token_id is None


def test_a_metaclip_2_folder(tmp_path, checkpoints):
    """transformers' names of a CLIP; the end of a prompt is the token that the config names."""
    folder = checkpoints.write_folder(tmp_path / "model", "vit", "hf")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["eos_token_id"] = 9
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "metaclip_2"}))
    found = load_clip(folder, fold=False)
    assert found.config.text.eot_token_id == 9
    assert list(found.tokenizer(["a cat"])[0]) == [8, 1, 4, 9, 0, 0, 0, 0]
    checkpoints.assert_same(checkpoints.answers(found.config, found.variables), checkpoints.outputs("vit"))


def test_bare_arrays_of_kin(checkpoints):
    """Layer scale and a bias of the logits are in the arrays; without `ln_pre` a part may as well be missing."""
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    for tower in ("visual.", ""):
        for i in range(2):
            width = len(arrays[f"{tower}transformer.resblocks.{i}.ln_1.bias"])
            arrays |= {f"{tower}transformer.resblocks.{i}.ls_{n}.gamma": np.ones(width, np.float32) for n in (1, 2)}
    found = load_clip(arrays | {"logit_bias": np.float32([-10])}, fold=False)
    assert (found.config.vision.layer_scale, found.config.text.layer_scale, found.config.logit_bias) == (True,) * 3
    checkpoints.assert_same(checkpoints.answers(found.config, found.variables), checkpoints.outputs("vit"))
    del arrays["visual.ln_pre.bias"], arrays["visual.ln_pre.weight"]
    with pytest.raises(UserError, match=r"2 missing \(visual.ln_pre.weight"):
        load_clip(arrays)


OTHERS = {  # the words of open_clip's own configs of 2026
    "EVA": {"vision_cfg": {"timm_model_name": "eva02_base_patch16_clip_224"}},
    "PE-Core": {"vision_cfg": {"timm_model_name": "vit_pe_core_base_patch16_224", "timm_pool": "map"}},
    "ConvNeXt": {"vision_cfg": {"timm_model_name": "convnext_base"}},
    "MobileCLIP": {"vision_cfg": {"timm_model_name": "fastvit_mci1"}},
    "SigLIP in timm's form": {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_256"}},
    "CoCa": {"vision_cfg": {"attentional_pool": True}, "multimodal_cfg": {"width": 512}},
    "NLLB": {"text_cfg": {"hf_model_name": "facebook/nllb-200-distilled-600M"}},
    "XLM-RoBERTa": {"text_cfg": {"hf_model_name": "xlm-roberta-base", "hf_proj_type": "mlp"}},
    "CLIPA": {"vision_cfg": {"pool_type": "avg", "no_ln_pre": True}},
    "not OpenAI's architecture": {"vision_cfg": {"timm_model_name": "hiera_base"}},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_are_named(name):
    config = open_clip(512, B16, (512, 8, 12))
    for part, change in OTHERS[name].items():
        config[part] = config.get(part, {}) | change
    with pytest.raises(UserError, match=f"which is {name}") as error:
        architecture.from_open_clip(config)
    assert "\n" not in str(error.value)


BARE = {  # a key of their weights, beside a CLIP's own
    "visual.blocks.0.attn.q_proj.weight": "EVA",
    "visual.trunk.blocks.0.mlp.fc1_g.weight": "EVA",
    "visual.trunk.stages.0.blocks.0.conv_dw.weight": "ConvNeXt",
    "visual.trunk.stages.1.blocks.0.token_mixer.conv.weight": "MobileCLIP",
    "image_encoder.model.patch_embed.0.weight": "MobileCLIP",
    "visual.attn_pool.probe": "PE-Core",
    "visual.attn_pool.query": "CoCa",
    "text_decoder.resblocks.0.ln_1.weight": "CoCa",
    "visual.trunk.attn_pool.latent": "SigLIP in timm's form",
    "visual.trunk.cls_token": "an image tower of timm",
    "text.transformer.layers.0.fc1.weight": "a CLIP whose text tower is NLLB",
    "text.transformer.encoder.layer.0.output.dense.weight": "a CLIP whose text tower is XLM-RoBERTa",
}


@pytest.mark.parametrize("key", BARE)
def test_bare_weights_of_others_are_named(checkpoints, caplog, key):
    """Whatever else they have; and nothing is said of an assumed activation first."""
    arrays = to_names(checkpoints.random_clip("vit")[1], checkpoints.CONFIGS["vit"], "openai")
    for weights in ({key: np.zeros(3, np.float32)}, arrays | {key: np.zeros(3, np.float32)}):
        with pytest.raises(UserError, match=f"got {BARE[key]}") as error:
            load_clip(weights)
        assert "\n" not in str(error.value)
    assert not caplog.records


def test_a_config_is_read_before_the_weights(tmp_path):
    """Or fetched: what cannot be read is known from the config."""
    model = open_clip(512, B16 | OTHERS["EVA"]["vision_cfg"], (512, 8, 12))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError, match="which is EVA"):
        folders.candidates(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_siglip_512"}))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"not None \(timm's vit_base_patch16_siglip_512\)"):
        folders.candidates(tmp_path)


@pytest.mark.parametrize("model_type", ["siglip2", "chinese_clip", "siglip_vision_model", None, 3, ["clip"]])
def test_other_model_types_are_named(model_type):
    with pytest.raises(UserError, match=r"must be of model_type .* only these architectures") as error:
        architecture.from_hf({"model_type": model_type})
    assert "\n" not in str(error.value)


def test_preprocessing_that_squashes_is_read():
    """DFN's config resizes without keeping the aspect ratio, to classify: dense reading keeps it."""
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
    assert Preprocess.from_open_clip(statistics).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("form", ["open_clip", "hf"])
def test_folders_of_their_kind(tmp_path, checkpoints, form, activation):
    """Heads that are not 64 wide and an MLP that is not four times the width, as H, g and G have: read as written.

    open_clip's with layer scale, without `ln_pre`, and with a bias of the logits.
    """
    kin = {"ln_pre": False, "layer_scale": True} if form == "open_clip" else {}
    vision = ViTConfig(32, 8, 40, 2, 2, int(40 * 4.9231), activation, **kin)
    text = dataclasses.replace(checkpoints.TEXT, layers=1, activation=activation, layer_scale=form == "open_clip")
    config = CLIPConfig(vision, text, 16, logit_bias=form == "open_clip")
    rng, flat = np.random.default_rng(0), {}
    for path, leaf in abstract_variables(config).items():
        flat[path] = jnp.asarray(rng.normal(size=leaf.shape) * 0.2, jnp.float32)
    variables = unflatten_dict(flat, sep="/")
    if form == "open_clip":
        content = {"model_cfg": architecture.to_open_clip(config) | {"quick_gelu": activation == "quick_gelu"}}
        content["model_cfg"]["vision_cfg"]["mlp_ratio"] = 4.9231
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        save_file(to_names(variables, config, "openai"), tmp_path / "open_clip_model.safetensors")
    else:
        (tmp_path / "config.json").write_text(json.dumps(architecture.to_hf(config)))
        save_file(to_names(variables, config, "hf"), tmp_path / "model.safetensors")
    loaded = load_clip(tmp_path, fold=False)
    assert loaded.config == config
    same = jax.tree.map(np.array_equal, loaded.variables, variables)
    assert all(jax.tree.leaves(same))
    images = jnp.asarray(rng.normal(size=(1, 32, 32, 3)), jnp.float32)
    options = {"method": "encode_dense", "attention": "qq"}
    read = lambda c: np.asarray(compiled_apply(CLIP(c), variables, images, **options).features)  # noqa: E731
    np.testing.assert_array_equal(read(loaded.config), read(config))
    other = dataclasses.replace(vision, activation={"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation])
    assert np.abs(read(config) - read(dataclasses.replace(config, vision=other))).max() > 1e-4


@pytest.mark.parametrize("width", architecture.WIDER_HEADS)
def test_bare_arrays_of_the_wider_ones_are_not_guessed(width):
    shapes = {"visual.proj": (width, 1024), "visual.conv1.weight": (width, 3, 14, 14)}
    with pytest.raises(UserError, match=f"width {width} is not OpenAI's") as error:
        architecture.vision_from_shapes(shapes)
    assert "\n" not in str(error.value)
