"""Every encoder by every method, in a padded batch, against NumPy image by image; what means nothing for an encoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tower_by_definition import variables_of, vit_by_definition

from maskclip_jax.checkpoints import architecture
from maskclip_jax.encoders.config import (
    DINO_VIT,
    SIGLIP_TEXT,
    SIGLIP_VIT,
    TIPS_TEXT,
    TIPS_VIT,
    CLIPConfig,
    Fidelity,
    TextConfig,
    ViTConfig,
    variant,
    with_activation,
    with_fidelity,
)
from maskclip_jax.encoders.dense import ALONE, DenseMethod, dense_method
from maskclip_jax.encoders.model import CLIP, fold
from maskclip_jax.errors import UserError

SIZES = (32, 8, 24, 2, 3, 32)  # image, patch, width, layers, heads, MLP
TEXT = (20, 8, 24, 1, 3, 32)  # vocabulary, context, width, layers, heads, MLP


def vision(**fields):
    width = SIZES[2] if fields.get("head", "projection") != "projection" else 16
    return CLIPConfig(ViTConfig(*SIZES, **fields), architecture.NO_TEXT, width)


V3 = {"positions": "rotary", "class_position": False, "class_tokens": 3, "activation": "swiglu", "biases": "qv"}
V3 |= {"layer_scale": True, "rotary_period": 7.0}
ENCODERS = {
    "open_clip with layer scale, without ln_pre": vision(activation="gelu", ln_pre=False, layer_scale=True),
    "siglip": vision(**SIGLIP_VIT),
    "tips": vision(**TIPS_VIT),
    "tips of PyTorch's, g": vision(**TIPS_VIT | {"activation": "swiglu", "class_position": True, "layer_scale": True}),
    "dinov3": vision(**DINO_VIT | V3),
}


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def padded_batch():
    """Two images of 6 × 7 and 9 × 4 patches in a batch of 9 × 7, what is beyond them being sevens.

    Of 31 patches or fewer the two that lie farthest apart are SC-CLIP's outliers alike: rounding would choose.
    """
    sizes, rng = [(6, 7), (9, 4)], np.random.default_rng(2)
    images = [rng.normal(size=(8 * h, 8 * w, 3)) for h, w in sizes]
    batch = np.full((2, 72, 56, 3), 7.0, np.float32)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return images, jnp.asarray(batch), jnp.asarray(sizes)


@pytest.mark.parametrize(
    "methods",
    [("maskclip", "naclip"), pytest.param(tuple(ALONE), marks=pytest.mark.slow)],
    ids=["two methods", "all methods"],
)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_by_every_method(encoder, methods):
    """SigLIP by its pooling head's own projections, TIPS and CLIP by their last blocks'; padding changes nothing."""
    config = ENCODERS[encoder]
    methods = {name: dense_method(name, config) for name in methods}
    if len(methods) > 2 and config.family != "siglip":
        methods["two blocks"] = DenseMethod("vv", blocks=2)
    variables, (images, batch, grid) = variables_of(config), padded_batch()

    def read(v):
        encode = functools.partial(CLIP(config).apply, v, batch, grid=grid, method="encode_dense")
        return {name: encode(**dataclasses.asdict(method)) for name, method in methods.items()}

    found = jax.jit(read)(fold(config, variables))
    for name, (features, keys) in found.items():
        np.testing.assert_allclose(keys, found["maskclip"].keys, atol=1e-5)
        for image, ours, size in zip(images, features, grid, strict=True):
            expected = vit_by_definition(config.vision, variables["params"]["visual"], image, methods[name])
            np.testing.assert_allclose(ours[: size[0], : size[1]], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("fields", "end"), [(SIGLIP_TEXT, [1]), (TIPS_TEXT, [])], ids=["siglip", "tips"])
def test_texts(fields, end):
    """SigLIP's tower sees every place, what pads it too; TIPS' sees words alone, and of no word it makes zeros."""
    config = CLIPConfig(ViTConfig(*SIZES, **(SIGLIP_VIT if end else TIPS_VIT)), TextConfig(*TEXT, **fields), SIZES[2])
    run = jax.jit(functools.partial(CLIP(config).apply, method="encode_text"))
    encode = lambda ids: np.asarray(run(variables_of(config), jnp.asarray(ids)))  # noqa: E731
    words = [5, 7, 3, *end]
    padded = [words + [0] * (8 - len(words)), words + [1] * (8 - len(words))]
    one, other = encode(padded)
    assert np.abs(one - other).max() > 1e-2
    short = encode([words])[0]
    assert (np.abs(short - one).max() < 1e-6) == (not end)
    swapped = encode([[7, 5, *padded[0][2:]]])[0]
    assert np.abs(swapped - one).max() > 1e-2  # places count
    if not end:
        np.testing.assert_array_equal(encode([[0] * 8]), 0)


def test_what_means_nothing_for_an_encoder():
    for config, name in ((ENCODERS["siglip"], "SigLIP"), (ENCODERS["tips"], "TIPS")):
        with pytest.raises(UserError, match=f"reads CLIP alone, but this is {name} .*: use fidelity 'clip'"):
            with_fidelity(config, Fidelity.released())
        with pytest.raises(UserError, match=f"{name} has one of its own"):
            with_activation(config, "gelu")
        pipeline = Fidelity(upsample="stretched", probability_scale=100.0, all_denoised="drop_all")
        assert with_fidelity(config, pipeline).fidelity == pipeline
    assert with_fidelity(variant("RN50"), Fidelity.released()).fidelity == Fidelity.released()
    assert [c.family for c in (*ENCODERS.values(), variant("RN50"))] == [
        "clip",
        "siglip",
        "tips",
        "tips",
        "tips",
        "clip",
    ]
    assert dense_method("gem", ENCODERS["siglip"]).blocks == 1
    with pytest.raises(UserError, match="is read as one block, got 2"):
        dense_method(DenseMethod("vv", blocks=2), ENCODERS["siglip"])
