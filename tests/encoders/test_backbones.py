"""DINO, DINOv2 and DINOv3 against transformers' models (`tests/golden`), padded batches, and what is no backbone."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskclip_jax.checkpoints import dino
from maskclip_jax.checkpoints.load import load_backbone, load_clip
from maskclip_jax.errors import UserError

NAMES = ("vit", "dinov2", "dinov2_swiglu", "dinov2_with_registers", "dinov3", "dinov3_gated")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "hf_backbones_tiny.npz") as file:
        return {key: file[key] for key in file.files}


def write(folder, golden, name, **changes):
    """The model as transformers saved it; with other values in its config."""
    config = json.loads(golden[f"{name}/config"].tobytes()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    prefix = f"{name}/w/"
    save_file(
        {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}, folder / "model.safetensors"
    )
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_against_transformers(tmp_path, golden, name):
    """Patches of a square and a wide image (tables are resized), alone and in a padded batch; the class token."""
    found = load_backbone(write(tmp_path, golden, name))
    first, read = found.config.vision.class_tokens, jax.jit(found.model.apply, static_argnames="method")
    images = [golden[side].transpose(0, 2, 3, 1).astype(np.float32)[0] for side in ("image", "wide")]
    batch, grid = np.full((2, 32, 80, 3), 7, np.float32), np.array([[4, 4], [3, 10]])
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    padded = read(found.variables, jnp.asarray(batch), grid=jnp.asarray(grid), method="encode_tokens")
    for side, ours, (h, w) in zip(("image", "wide"), padded, grid, strict=True):
        theirs = golden[f"{name}/{side}"]
        agree(ours[:h, :w].reshape(h * w, -1), theirs[first:])
    agree(read(found.variables, jnp.asarray(images[1])[None], method="encode_tokens")[0], theirs[first:])
    whole = read(found.variables, jnp.asarray(images[0])[None], method="encode_image")
    agree(whole[0], golden[f"{name}/image"][0])
    assert np.isfinite(padded).all()
    assert found.preprocess.mean == dino.PREPROCESS.mean


def agree(ours, theirs):
    error = np.abs(np.reshape(ours, theirs.shape) - theirs).max() / np.abs(theirs).max()
    assert error < 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("dinov3", {"model_type": "dinov3_convnext"}, "DINOv3's ConvNeXt: take one of its ViTs"),
        ("dinov3", {"hidden_act": "silu"}, "has hidden_act 'gelu', or 'silu' with use_gated_mlp"),
        ("dinov3", {"proj_bias": False}, "got proj_bias or mlp_bias false"),
        ("dinov3", {"num_attention_heads": 16}, "heads of a multiple of 4"),
        ("dinov3", {"rope_theta": 0}, "rope_theta"),
        ("dinov3", {"key_bias": True}, r"4 missing|2 missing \(layer.0.attention.k_proj.bias"),
        ("dinov2", {"model_type": "dinov2_with_registers"}, "missing .embeddings.register_tokens"),
        ("dinov2", {"mlp_ratio": -1}, "mlp_ratio"),
        ("dinov2", {"image_size": 64}, "of another shape .embeddings.position_embeddings"),
        ("vit", {"model_type": "vit_mae"}, "'vit', 'dinov2', 'dinov2_with_registers', 'dinov3_vit', not 'vit_mae'"),
    ],
)
def test_one_line_for_what_is_no_backbone(tmp_path, golden, name, changes, words):
    with pytest.raises(UserError, match=words) as error:
        load_backbone(write(tmp_path, golden, name, **changes))
    assert "\n" not in str(error.value)


def test_a_backbone_is_no_model(tmp_path, golden):
    for source in (write(tmp_path, golden, "dinov2"), tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"got one without text tower .dinov2.: give it as the affinity"):
            load_clip(source)
    with pytest.raises(UserError, match="got embedded-resnet, a ResNet"):
        load_backbone("embedded-resnet")
    own = load_backbone("embedded")  # a CLIP's own image tower will do, too
    read = functools.partial(own.model.apply, method="encode_tokens")
    assert jax.eval_shape(read, own.variables, jnp.zeros((1, 16, 24, 3))).shape == (1, 2, 3, 128)
