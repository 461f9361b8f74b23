"""SigLIP and TIPS against what their authors' own code computes from the same weights (`tests/golden`).

The bar is 1e-5 of an array's largest magnitude, in float32 under "highest".
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.checkpoints.load import load_clip

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def agree(ours, golden):
    ours, golden = np.asarray(ours), np.asarray(golden)
    assert ours.shape == golden.shape
    error = np.abs(ours - golden).max() / np.abs(golden).max()
    assert error < 1e-5, f"relative error {error:.1e}"


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def golden_npz(name, prefix=""):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix(prefix): file[key] for key in file.files if key.startswith(prefix)}


def dense_and_tokens(clip, images):
    """What `encode_dense` makes, before its unit length; the tokens as they leave the tower; the image embedding."""
    embedding, out = clip.visual(images)
    return clip.visual.dense(images, None), clip.visual.ln_post(out["last"]), embedding


def run(pretrained, x, method):
    return jax.jit(lambda v, x: pretrained.model.apply(v, x, method=method))(pretrained.variables, x)


@functools.cache
def siglip(fold=True):
    arrays = golden_npz("siglip_big_vision_tiny")
    return load_clip({key: value for key, value in arrays.items() if key.startswith("params/")}, fold=fold), arrays


@pytest.mark.parametrize("fold", [True, False])
def test_siglip_of_big_vision(fold):
    found, golden = siglip(fold)
    (values, keys), encoded, embedding = run(found, jnp.asarray(golden["image"]), dense_and_tokens)
    agree(values, golden["values"])
    agree(keys, golden["keys"])
    agree(encoded, golden["encoded"])
    agree(embedding, golden["image_embedding"])
    text = run(found, jnp.asarray(golden["ids"]), "encode_text")
    agree(text, golden["text_embedding"])
    agree(unit(text), golden["text_embedding_unit"])
    params = found.variables["params"]
    assert float(params["logit_scale"]) == golden["params/t"][0]
    assert float(params["logit_bias"]) == golden["params/b"][0]
    assert found.config.family == "siglip"
    assert found.preprocess.mean == (0.5, 0.5, 0.5)


def test_siglip_of_transformers():
    found, golden = load_clip(GOLDEN / "hf_siglip_tiny"), golden_npz("hf_siglip_tiny/expected")
    image = {}
    for shape, name in (("square", "pixel_values_nchw"), ("wide", "wide_pixel_values_nchw")):
        images = jnp.asarray(np.moveaxis(golden[name], 1, -1))
        (values, keys), encoded, image[shape] = run(found, images, dense_and_tokens)
        agree(values.reshape(golden[f"{shape}/values"].shape), golden[f"{shape}/values"])
        agree(keys, golden[f"{shape}/keys"])
        agree(encoded, golden[f"{shape}/encoded"])
        agree(image[shape], golden[f"{shape}/pooled"])
    text = run(found, jnp.asarray(golden["input_ids"], jnp.int32), "encode_text")
    agree(unit(text), unit(golden["text_embeds"]))
    params = found.variables["params"]
    logits = np.exp(params["logit_scale"]) * unit(image["square"]) @ unit(text).T + params["logit_bias"]
    agree(logits, golden["logits_per_image"])


@functools.cache
def tips(kind, fold=True):
    weights = golden_npz("tips_tiny", f"{kind}/vision/") | golden_npz("tips_tiny", f"{kind}/text/")
    return load_clip(weights, fold=fold), golden_npz("tips_tiny", f"{kind}/")


@pytest.mark.parametrize(
    ("kind", "shape", "fold"),
    [(kind, shape, True) for kind in ("mlp", "swiglu") for shape in ("square", "wide", "large")]
    + [("mlp", "wide", False)],
)
def test_tips_images(kind, shape, fold):
    """A trained grid of 6 × 6, one smaller along one side and larger along the other, and one larger."""
    found, golden = tips(kind, fold)
    (values, keys), tokens, embedding = run(found, jnp.asarray(golden[f"{shape}/image"]), dense_and_tokens)
    agree(values, golden[f"{shape}/values"])
    agree(keys, golden[f"{shape}/keys"])
    agree(tokens[:, 2:].reshape(values.shape), golden[f"{shape}/patch_tokens"])
    agree(tokens[:, :2], golden[f"{shape}/cls_tokens"])
    agree(embedding, golden[f"{shape}/cls_tokens"][:, 0])


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_tips_texts(kind):
    found, golden = tips(kind)
    agree(run(found, jnp.asarray(golden["ids"]), "encode_text"), golden["text_embedding"])
    temperature = golden["text/temperature_contrastive"]
    np.testing.assert_allclose(np.exp(-found.variables["params"]["logit_scale"]), temperature, rtol=1e-6)
    assert found.config.vision.activation == {"mlp": "gelu_tanh", "swiglu": "swiglu"}[kind]
    assert (found.config.family, found.config.vision.class_tokens) == ("tips", 2)
    assert (found.preprocess.mean, found.preprocess.std) == ((0, 0, 0), (1, 1, 1))
