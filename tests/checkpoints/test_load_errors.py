"""What cannot be loaded says so in one line: what is wrong with which file, and what to do."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maskclip_jax.checkpoints.files import read_arrays
from maskclip_jax.checkpoints.load import load_clip, load_visual
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


def fails(pattern, source, **kwargs):
    with pytest.raises(UserError, match=pattern) as caught:
        load_clip(source, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path, checkpoints):
    return checkpoints.write_folder(tmp_path / "model", "vit", "hf")


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "pattern"),
    [(b"", "is empty"), (PNG, "is not a whole"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_files_of_the_wrong_kind(folder, name, content, pattern):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert name in fails(pattern, folder)
    assert name in fails(pattern, folder / name)


@pytest.mark.parametrize("form", ["hf", "hf-flax"])
@pytest.mark.parametrize("keep", [5, 0.1, 0.9])
def test_truncated_files(tmp_path, checkpoints, form, keep):
    folder = checkpoints.write_folder(tmp_path / "model", "vit", form)
    file = next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".msgpack"))
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep >= 1 else int(keep * len(content))])
    fails("is not a whole", folder)


def test_a_picture_is_no_model(tmp_path):
    (tmp_path / "cat.png").write_bytes(PNG)
    fails(r"weights are a file of \.safetensors", tmp_path / "cat.png")


def test_missing_files(folder, tmp_path, checkpoints):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    fails("holds config.json but no weights: add one of model.safetensors", folder)
    (folder / "config.json").unlink()
    fails("none: add one", folder)
    fails("need config.json beside them", folder / "elsewhere.safetensors")
    sharded = checkpoints.write_folder(tmp_path / "sharded", "vit", "hf-sharded")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    fails("model-00002-of-00002.safetensors must be a file, but is missing", sharded)


def test_an_index_that_points_out_of_its_folder(tmp_path, checkpoints):
    sharded = checkpoints.write_folder(tmp_path / "sharded", "vit", "hf-sharded")
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    fails("a shard is a file in the folder", sharded)


def test_broken_configs(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, pattern in [
        ({"model_type": "siglip2"}, r"model_type .clip., .metaclip_2., .siglip., not .siglip2. \(SigLIP 2.s NaFlex"),
        ({"model_type": None}, "not None"),
        (
            {"vision_config": {"hidden_act": "relu"}},
            "hidden_act is quick_gelu, gelu or gelu_pytorch_tanh",
        ),
        (
            {"vision_config": {"hidden_size": "wide"}},
            "hidden_size is a whole number from 1 to 65536, got 'wide'",
        ),
        ({"vision_config": {"num_channels": 4}}, "num_channels is 3, for RGB, got 4"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        fails(pattern, folder)
    (folder / "config.json").write_text("{")
    fails("not valid JSON", folder)
    (folder / "config.json").write_text("[]")
    fails("must hold an object", folder)


def test_open_clip_architectures_that_are_not_openais(tmp_path, checkpoints):
    folder = checkpoints.write_folder(tmp_path / "model", "vit", "open_clip")
    content = json.loads((folder / "open_clip_config.json").read_text())
    for part, change in [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("vision_cfg", {"attentional_pool": True}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"no_such_key": 1}),
    ]:
        changed = json.loads(json.dumps(content))
        changed["model_cfg"][part] |= change
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        assert next(iter(change)) in fails("not OpenAI's architecture", folder)
    del content["model_cfg"]["embed_dim"]
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    fails("embed_dim", folder)


def test_names_are_reported_on_both_sides(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["vision_model.surprise"] = arrays.pop("vision_model.post_layernorm.bias")
    arrays["visual_projection.weight"] = arrays["visual_projection.weight"][:-1]
    save_file(arrays, folder / "model.safetensors")
    message = fails("weights must fit the model exactly", folder)
    assert "1 missing (vision_model.post_layernorm.bias)" in message
    assert "1 unknown (vision_model.surprise)" in message
    assert "1 of another shape (visual_projection.weight 31×128, not 32×128)" in message


def test_fused_projections_of_another_shape(checkpoints):
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    name = "transformer.resblocks.1.attn.in_proj_weight"
    arrays[name] = arrays[name][:-1]
    assert f"{name} 191×64, not 192×64" in fails("1 of another shape", arrays)


def test_long_lists_are_cut(folder):
    arrays = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in arrays.items() if not k.startswith("text_model.encoder")}, folder / "model.safetensors")
    assert "… 28 more" in fails("32 missing", folder)


def test_weights_of_another_model(folder, tmp_path, checkpoints):
    other = checkpoints.write_folder(tmp_path / "other", "resnet", "open_clip")
    shutil.copy(other / "open_clip_model.safetensors", folder / "model.safetensors")
    fails("names of the openai kind", folder)
    fails("a checkpoint has OpenAI's names .* got nothing", {})
    fails("got encoder.weight", {"encoder.weight": np.zeros(3)})
    config, variables = checkpoints.random_clip("vit")
    fails("give the folder with its config.json", to_names(variables, config, "hf"))
    arrays = to_names(variables, config, "openai")
    towers = {name: array for name, array in arrays.items() if name.startswith("visual.")}
    half = towers | {"positional_embedding": arrays["positional_embedding"]}
    fails("needs token_embedding.weight, which is missing: give both towers", half)
    assert load_visual(towers)[0].config.vision == config.vision


def test_sources_that_do_not_exist(tmp_path):
    fails("got 'no_such_folder': check the spelling", "no_such_folder")
    fails("missing.safetensors': check the spelling", tmp_path / "missing.safetensors")
    for odd in ("", "a\0b", "x" * 5000, "~nobody-of-that-name/x"):
        assert len(fails("got .*: check the spelling", odd)) < 300
    fails("ViT-B-16.pt': check the spelling", "weights/ViT-B-16.pt")
    # HF_HUB_OFFLINE is set for tests, and nothing is cached under this name
    fails("'no-such-owner/no-such-clip' is neither a path here nor to be had", "no-such-owner/no-such-clip")
    with pytest.raises(UserError, match="must be a file, but is missing"):
        read_arrays(tmp_path / "missing.safetensors")


def test_strides_and_settings(folder, tmp_path, checkpoints):
    fails("a ViT reads out at its patch size, 8, not at 16", folder, dense_stride=16)
    resnet = checkpoints.write_folder(tmp_path / "resnet", "resnet", "open_clip")
    fails("8, 16 or 32, not 4", resnet, dense_stride=4)
    for content, pattern in [
        ({"strid": 8}, "got strid"),
        ({"short_side": 0}, "short_side is a number"),
        ({"prompt_denoising": 7}, "in 0..1"),
        ({"templates": ["a"]}, "name of a template set"),
        ({"dense_stride": 12}, "8, 16 or 32, not 12"),
    ]:
        (resnet / "maskclip.json").write_text(json.dumps(content))
        fails(pattern, resnet)
    fails("fidelity is 'clip', 'released'", folder, fidelity="published")
