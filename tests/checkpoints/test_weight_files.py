"""Weights as people have them: wrappers, numbers that are none, float8, weights without a config beside them."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskclip_jax.checkpoints.load import load_clip
from maskclip_jax.checkpoints.tokenizer import MissingTokenizer
from maskclip_jax.checkpoints.weights import to_names, to_variables
from maskclip_jax.errors import UserError


@pytest.mark.parametrize(
    "wrap",
    [
        "_orig_mod.module.{}",
        "module._orig_mod.{}",
        "module.module.{}",
        "_orig_mod._orig_mod.module.{}",
        "module._fsdp_wrapped_module.{}",
    ],
)
def test_wrappers_are_stripped_until_none_is_left(checkpoints, wrap):
    config, variables = checkpoints.random_clip("vit")
    arrays = {wrap.format(name): array for name, array in to_names(variables, config, "openai").items()}
    assert load_clip(arrays, fold=False).config == config


def test_wrappers_in_the_middle_and_twice(checkpoints):
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    inside = {name.replace("visual.", "visual._orig_mod."): array for name, array in arrays.items()}
    same = jax.tree.map(np.array_equal, to_variables(inside, config), to_variables(arrays, config))
    assert all(jax.tree.leaves(same))
    with pytest.raises(UserError, match=r"visual.proj come\(s\) twice"):
        to_variables(arrays | {"_orig_mod.visual.proj": arrays["visual.proj"]}, config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("visual.proj", lambda x: x * np.nan, "visual.proj holds NaN or infinity"),
        ("visual.proj", lambda x: x.astype(np.float64) * 1e300, "visual.proj holds NaN or infinity"),
        ("ln_final.bias", lambda x: np.where(np.arange(x.size) == 3, np.inf, x), "ln_final.bias holds NaN"),
        ("visual.conv1.weight", lambda x: (100 * x).astype(np.int8), "visual.conv1.weight is of type int8"),
        ("visual.conv1.weight", lambda x: (100 * x).astype(np.int64), "is of type int64"),
        ("visual.conv1.weight", lambda x: x > 0, "is of type bool"),
        ("logit_scale", lambda x: np.float32(100), r"at most 10 .*, got 100, perhaps saved after exp: store log"),
        ("logit_scale", lambda x: np.float32(14.2857), "got 14.2857"),
        ("logit_scale", lambda x: np.float32(np.nan), "logit_scale holds NaN"),
        ("logit_scale", lambda x: np.int64(4), "logit_scale is of type int64"),
    ],
)
def test_numbers_that_are_no_weights(checkpoints, name, change, message):
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    with pytest.raises(UserError, match=message):
        to_variables(arrays | {name: np.asarray(change(arrays[name]))}, config)


def test_a_negative_variance(checkpoints):
    config, variables = checkpoints.random_clip("resnet")
    arrays = to_names(variables, config, "openai")
    with pytest.raises(UserError, match=r"visual.bn1.running_var is a negative variance"):
        to_variables(arrays | {"visual.bn1.running_var": -arrays["visual.bn1.running_var"]}, config)


def test_fp8_safetensors(tmp_path, checkpoints):
    """Numbers of eight bits are read as they are; scaled ones bring arrays that no CLIP has, and are refused."""
    import ml_dtypes

    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    small = {n: a.astype(ml_dtypes.float8_e4m3fn) if a.ndim == 2 else a for n, a in arrays.items()}
    save_file(small, tmp_path / "small.safetensors")
    proj = load_clip(tmp_path / "small.safetensors").variables["params"]["visual"]["proj"]
    np.testing.assert_array_equal(proj, small["visual.proj"].astype(np.float32))
    save_file(small | {"visual.proj.scale_weight": np.ones(1, np.float32)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match=r"1 unknown \(visual.proj.scale_weight\)"):
        load_clip(tmp_path / "scaled.safetensors")


def test_bare_weights_say_which_activation_was_assumed(tmp_path, checkpoints, caplog):
    config, variables = checkpoints.random_clip("vit")
    save_file(to_names(variables, config, "openai"), tmp_path / "bare.safetensors")
    assert load_clip(tmp_path / "bare.safetensors").config == config
    (record,) = caplog.records
    assert record.name == "maskclip_jax"
    assert "bare.safetensors does not say its activation: QuickGELU was assumed" in record.getMessage()
    assert "--activation gelu" in record.getMessage()
    caplog.clear()
    gelu = load_clip(tmp_path / "bare.safetensors", activation="gelu").config
    assert (gelu.vision.activation, gelu.text.activation) == ("gelu", "gelu")
    assert load_clip(checkpoints.write_folder(tmp_path / "model", "vit", "hf")).config == config
    assert caplog.records == []
    with pytest.raises(UserError, match="activation is 'quick_gelu' or 'gelu', not 'relu'"):
        load_clip(tmp_path / "bare.safetensors", activation="relu")


def test_bare_weights_of_openais_vocabulary_read_words(checkpoints):
    """Without any tokenizer file: 49,408 tokens are OpenAI's."""
    config, variables = checkpoints.random_clip("vit")
    arrays = to_names(variables, config, "openai")
    assert isinstance(load_clip(arrays, fold=False).tokenizer, MissingTokenizer)
    arrays["token_embedding.weight"] = np.zeros((49408, 64), np.float16)
    ids = load_clip(arrays, fold=False).tokenizer(["a photo of a cat."])
    np.testing.assert_array_equal(ids, [[49406, 320, 1125, 539, 320, 2368, 269, 49407]])


def test_a_tower_of_timm_is_called_one():
    for name in ("visual.trunk.blocks.0.attn.qkv.weight", "trunk.cls_token", "patch_embed.proj.weight"):
        with pytest.raises(UserError, match=r"got an image tower of timm"):
            load_clip({name: np.zeros(3, np.float32)})
