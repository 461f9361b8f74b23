"""The towers against what the released PyTorch code and transformers compute from the same weights.

Figures in `tests/golden` (its README says how they were made). The bar is 1e-5 of an array's largest magnitude.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.checkpoints.load import load_clip, load_visual
from maskclip_jax.encoders.config import Fidelity

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def run(model, variables, x, method, **kwargs):
    """`model.apply`, compiled: much faster here than operation by operation."""
    return jax.jit(lambda v, x: model.apply(v, x, method=method, **kwargs))(variables, x)


def agree(ours, golden):
    ours, golden = np.asarray(ours), np.asarray(golden)
    assert ours.shape == golden.shape
    error = np.abs(ours - golden).max() / np.abs(golden).max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def nhwc(array):
    return jnp.asarray(np.moveaxis(array, 1, -1))


def released(name):
    """The file's arrays, its image tower under `Fidelity.released()`, and its text classifier [C, E]."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    weights = {key[2:]: value for key, value in arrays.items() if key.startswith("w/")}
    model, variables = load_visual(weights, fidelity="released")
    assert model.config.fidelity == Fidelity.released()
    return arrays, model, variables


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_the_released_vit(shape):
    arrays, model, variables = released("official_vit_tiny")
    images = nhwc(arrays[f"{shape}/image_nchw"])
    dense = run(model, variables, images, "encode_dense")
    agree(dense.keys, arrays[f"{shape}/keys"])
    agree(dense.features, nhwc(arrays[f"{shape}/value_features_nchw"]))
    agree(dense.features @ arrays["text"].T, nhwc(arrays[f"{shape}/logits_nchw"]))
    naive = run(model, variables, images, "encode_dense", attention="qk")
    agree(naive.features @ arrays["text"].T, nhwc(arrays[f"{shape}/naive_logits_nchw"]))
    agree(naive.keys, arrays[f"{shape}/keys"])


@pytest.mark.parametrize("shape", ["square", "wide"])
def test_the_released_resnet(shape):
    arrays, model, variables = released("official_rn_tiny")
    images = nhwc(arrays[f"{shape}/image_nchw"])
    _, stages = run(model, variables, images, lambda clip, x: clip.visual(x))
    agree(stages["layer4"], nhwc(arrays[f"{shape}/stage4_nchw"]))
    dense = run(model, variables, images, "encode_dense")
    agree(dense.features @ arrays["text"].T, nhwc(arrays[f"{shape}/logits_nchw"]))
    naive = run(model, variables, images, "encode_dense", attention="qk")
    agree(naive.features @ arrays["text"].T, nhwc(arrays[f"{shape}/naive_logits_nchw"]))
    if shape == "square":
        agree(run(model, variables, images, "encode_image"), arrays["square/image_embedding"])


def test_folding_the_value_path_changes_nothing():
    for name in ("official_vit_tiny", "official_rn_tiny"):
        arrays, model, variables = released(name)
        assert "folded" in variables
        unfolded = {key: value for key, value in variables.items() if key != "folded"}
        images = nhwc(arrays["wide/image_nchw"])
        a, b = (run(model, v, images, "encode_dense") for v in (variables, unfolded))
        agree(a.features, b.features)
        agree(a.keys, b.keys)


def test_transformers_clip():
    pretrained = load_clip(GOLDEN / "hf_clip_tiny")
    with np.load(GOLDEN / "hf_clip_tiny" / "expected.npz") as file:
        expected = dict(file)
    images, ids = nhwc(expected["pixel_values_nchw"]), jnp.asarray(expected["input_ids"], jnp.int32)
    apply = lambda x, method: run(pretrained.model, pretrained.variables, x, method)  # noqa: E731

    _, vision = apply(images, method=lambda clip, x: clip.visual(x))
    agree(vision["penultimate"], expected["vision_penultimate"])
    agree(vision["last"], expected["vision_last_hidden_state"])
    _, text = apply(ids, method=lambda clip, x: clip.text(x))
    agree(text["last"], expected["text_last_hidden_state"])
    _, wide = apply(nhwc(expected["wide_pixel_values_nchw"]), method=lambda clip, x: clip.visual(x))
    agree(wide["last"], expected["wide_last_hidden_state"])

    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    image, prompt = (unit(apply(x, method=m)) for x, m in ((images, "encode_image"), (ids, "encode_text")))
    agree(image, unit(expected["image_embeds"]))
    agree(prompt, unit(expected["text_embeds"]))
    logits = np.exp(pretrained.variables["params"]["logit_scale"]) * image @ prompt.T
    agree(logits, expected["logits_per_image"])
