"""One set of parameters, written as every kind of checkpoint, is one model."""

import dataclasses
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskclip_jax.checkpoints import architecture
from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.weights import to_names, to_variables
from maskclip_jax.encoders.config import Fidelity, ResNetConfig, variant

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_clip_tiny"
FORMS = [
    ("vit", "hf"),
    ("vit", "hf-sharded"),
    ("vit", "hf-flax"),
    ("vit", "open_clip"),
    ("vit", "open_clip-text"),
    ("resnet", "open_clip"),
    ("resnet", "open_clip-text"),
]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_folders(tmp_path, checkpoints, kind, form):
    folder = checkpoints.write_folder(tmp_path / form, kind, form)
    pretrained = load_clip(folder)
    assert pretrained.config == checkpoints.CONFIGS[kind]
    checkpoints.assert_same(checkpoints.answers(pretrained.config, pretrained.variables), checkpoints.outputs(kind))
    np.testing.assert_array_equal(pretrained.tokenizer(["a photo of dog"]), [[8, 1, 2, 3, 5, 9, 0, 0]])
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)) if form.startswith("hf") else ((0.5,) * 3, (0.25,) * 3)
    assert (pretrained.preprocess.mean, pretrained.preprocess.std) == (mean, std)
    assert pretrained.preprocess.multiple == (8 if kind == "vit" else 32)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_mapping_of_openai_names(checkpoints, kind, prefix):
    config, variables = checkpoints.random_clip(kind)
    arrays = {prefix + name: array for name, array in to_names(variables, config, "openai").items()}
    if kind == "resnet":
        arrays[f"{prefix}visual.bn1.num_batches_tracked"] = np.asarray(3)
    arrays[f"{prefix}input_resolution"] = np.asarray(config.vision.image_size)
    pretrained = load_clip(arrays, fold=False)
    assert pretrained.config == config
    assert "folded" not in pretrained.variables
    same = jax.tree.map(np.array_equal, pretrained.variables, variables)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(tmp_path, checkpoints, dtype):
    config, variables = checkpoints.random_clip("resnet")
    halved = {name: np.asarray(jnp.asarray(a, dtype)) for name, a in to_names(variables, config, "openai").items()}
    save_file(halved, tmp_path / "weights.SafeTensors")  # named as some systems name files
    pretrained = load_clip(tmp_path / "weights.SafeTensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(pretrained.variables)} == {np.dtype(np.float32)}
    kernel = pretrained.variables["params"]["visual"]["stem"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel, halved["visual.conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0))


def test_openai_names_written_out_by_hand():
    """transformers' golden model under OpenAI's names, renamed here without the tables, has its golden outputs."""
    hf = load_file(GOLDEN / "model.safetensors")
    arrays = {
        "visual.conv1.weight": hf["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": hf["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": hf["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": hf["visual_projection.weight"].T,
        "token_embedding.weight": hf["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": hf["text_model.embeddings.position_embedding.weight"],
        "text_projection": hf["text_projection.weight"].T,
        "logit_scale": hf["logit_scale"],
    }
    for part in ("weight", "bias"):
        arrays[f"visual.ln_pre.{part}"] = hf[f"vision_model.pre_layrnorm.{part}"]
        arrays[f"visual.ln_post.{part}"] = hf[f"vision_model.post_layernorm.{part}"]
        arrays[f"ln_final.{part}"] = hf[f"text_model.final_layer_norm.{part}"]
        for ours, theirs, layers in (("visual.transformer", "vision_model", 3), ("transformer", "text_model", 2)):
            for i in range(layers):
                a, b = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                qkv = [hf[f"{b}.self_attn.{p}_proj.{part}"] for p in "qkv"]
                arrays[f"{a}.attn.in_proj_{part}"] = np.concatenate(qkv)
                arrays[f"{a}.attn.out_proj.{part}"] = hf[f"{b}.self_attn.out_proj.{part}"]
                arrays[f"{a}.ln_1.{part}"] = hf[f"{b}.layer_norm1.{part}"]
                arrays[f"{a}.ln_2.{part}"] = hf[f"{b}.layer_norm2.{part}"]
                arrays[f"{a}.mlp.c_fc.{part}"] = hf[f"{b}.mlp.fc1.{part}"]
                arrays[f"{a}.mlp.c_proj.{part}"] = hf[f"{b}.mlp.fc2.{part}"]
    original = load_clip(GOLDEN, fold=False)
    renamed = to_variables(arrays, original.config)
    same = jax.tree.map(np.array_equal, original.variables, renamed)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(("kind", "naming"), [("vit", "hf"), ("vit", "flax"), ("vit", "openai"), ("resnet", "openai")])
def test_names_there_and_back(checkpoints, kind, naming):
    config, variables = checkpoints.random_clip(kind)
    back = to_variables(to_names(variables, config, naming), config)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, variables)))


def test_config_from_hf_uses_transformers_defaults():
    """`openai/clip-vit-base-patch32` was published with keys left out that equal the defaults of that time, and now."""
    config = architecture.from_hf({"model_type": "clip", "text_config": {"eos_token_id": 2}, "vision_config": {}})
    assert config == variant("ViT-B/32")
    large = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu"},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
        },
    }
    config = architecture.from_hf(large)
    assert (config.text.activation, config.vision.activation) == ("gelu", "quick_gelu")
    assert (config.text.layer_norm_eps, config.vision.layer_norm_eps) == (1e-5, 1e-6)
    assert config.text.eot_token_id == 49407  # no legacy 2: the first end-of-text token


def test_config_from_open_clip():
    """open_clip's own configs of OpenAI's RN50 and of ViT-B/16 without (LAION) and with (OpenAI) `quick_gelu`."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    vision = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64, "patch_size": None}
    resnet = architecture.from_open_clip(
        {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    )
    assert resnet == variant("RN50")
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16}
    vit = architecture.from_open_clip({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text})
    assert (vit.vision.activation, vit.text.activation) == ("gelu", "gelu")
    quick = architecture.from_open_clip({"embed_dim": 512, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text})
    assert quick == variant("ViT-B/16")


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px", "RN101", "RN50x16"])
def test_open_clip_config_there_and_back(name):
    assert architecture.from_open_clip(json.loads(json.dumps(architecture.to_open_clip(variant(name))))) == variant(
        name
    )


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px"])
def test_hf_config_there_and_back(name):
    assert architecture.from_hf(json.loads(json.dumps(architecture.to_hf(variant(name))))) == variant(name)
    text = dataclasses.replace(variant(name).text, eot_token_id=49407)
    assert architecture.from_hf(architecture.to_hf(dataclasses.replace(variant(name), text=text))).text == text


def test_fidelity_and_reading(tmp_path, checkpoints):
    folder = checkpoints.write_folder(tmp_path / "resnet", "resnet", "open_clip")
    plain = load_clip(folder)
    assert (plain.reading.dense_stride, plain.preprocess.short_side, plain.config.stride) == (32, 512, 32)
    reading = {"dense_stride": 8, "short_side": 128, "prompt_denoising": 0.7, "templates": "maskclip"}
    (folder / "maskclip.json").write_text(json.dumps(reading))
    read = load_clip(folder)
    assert read.config.stride == read.reading.dense_stride == 8
    assert (read.preprocess.short_side, read.reading.prompt_denoising, read.reading.templates) == (128, 0.7, "maskclip")
    assert load_clip(folder, dense_stride=16).reading.dense_stride == 16
    assert load_clip(folder, dense_stride=16).config.multiple == 16  # the strides taken, not the whole 32

    released = load_clip(folder, fidelity="released")
    assert released.config.fidelity == released.model.config.fidelity == Fidelity.released()
    np.testing.assert_allclose(np.multiply(released.preprocess.mean, 255), [123.675, 116.28, 103.53])
    np.testing.assert_allclose(np.multiply(released.preprocess.std, 255), [58.395, 57.12, 57.375])
    assert load_clip(folder, dtype=jnp.bfloat16).model.dtype == jnp.bfloat16
    assert isinstance(read.config.vision, ResNetConfig)


def test_pickled_folders_need_no_torch(tmp_path, checkpoints):
    """`pytorch_model.bin` of transformers' layout, written here opcode by opcode."""
    config, variables = checkpoints.random_clip("vit")
    folder = checkpoints.write_folder(tmp_path / "hf", "vit", "hf")
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        opcodes = b"("
        for i, (name, array) in enumerate(to_names(variables, config, "hf").items()):
            numbers = lambda xs: b"(" + b"".join(b"I%d\n" % x for x in xs) + b"t"  # noqa: E731
            strides = [stride // array.itemsize for stride in array.strides]
            storage = b"(Vstorage\nctorch\nFloatStorage\nV%d\nVcpu\nI%d\ntQ" % (i, array.size)
            rest = b"I0\n" + numbers(array.shape) + numbers(strides) + b"I00\nN"
            opcodes += b"V%s\nctorch._utils\n_rebuild_tensor_v2\n(%s%stR" % (name.encode(), storage, rest)
            archive.writestr(f"archive/data/{i}", array.tobytes())
        archive.writestr("archive/data.pkl", opcodes + b"d.")
    pretrained = load_clip(folder, fold=False)
    assert pretrained.config == config
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, pretrained.variables, variables)))
