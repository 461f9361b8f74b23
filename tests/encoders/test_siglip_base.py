"""SigLIP at base size against transformers' `SiglipModel`, whose answers are in `tests/golden/siglip_base.npz`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_siglip_base import CONFIG, drawn, inputs, strided

from maskclip_jax.checkpoints.architecture import from_hf
from maskclip_jax.checkpoints.names import abstract_variables, entries
from maskclip_jax.checkpoints.weights import to_variables
from maskclip_jax.encoders.model import CLIP

GOLDEN = Path(__file__).parents[1] / "golden"


def agree(name, ours, golden):
    """To 1e-4 of the largest magnitude: float32 here, float64 there."""
    ours = np.asarray(ours)
    assert ours.shape == golden.shape, name
    assert np.abs(ours - golden).max() < 1e-4 * np.abs(golden).max(), name


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.slow
def test_siglip_at_base_size():
    config = from_hf(CONFIG)
    ours = abstract_variables(config)
    arrays = {}
    for entry in entries(config, "hf"):
        parts = [np.broadcast_to(np.float32(0), ours[path].shape) for path in entry.paths]
        arrays[entry.key] = drawn(entry.key, entry.layout.write(parts).shape)
    arrays |= {name: arrays[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    variables = to_variables(arrays, config)
    images, ids = inputs()

    @jax.jit
    def read(variables, images):
        def everything(clip, images):
            pooled, out = clip.visual(images)
            return *clip.visual.dense(images, None), clip.visual.ln_post(out["last"]), pooled

        return CLIP(config).apply(variables, images, method=everything)

    with np.load(GOLDEN / "siglip_base.npz") as golden, jax.default_matmul_precision("highest"):
        for shape, image in images.items():
            values, keys, encoded, pooled = read(variables, image.transpose(0, 2, 3, 1))
            flat = {"values": np.asarray(values).reshape(encoded.shape), "keys": keys, "encoded": encoded}
            for name, array in flat.items():
                agree(f"{shape}/{name}", strided(name, np.asarray(array)), golden[f"{shape}/{name}"])
            agree(f"{shape}/pooled", pooled, golden[f"{shape}/pooled"])
            if shape == "square":
                square = pooled
        text = CLIP(config).apply(variables, jnp.asarray(ids, jnp.int32), method="encode_text")
        agree("text", unit(text), golden["text"])
        scale, bias = (np.asarray(variables["params"][f"logit_{name}"]) for name in ("scale", "bias"))
        agree("logits", np.exp(scale) * unit(np.asarray(square)) @ unit(text).T + bias, golden["logits"])
