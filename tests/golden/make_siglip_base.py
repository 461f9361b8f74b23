"""Writes siglip_base.npz: what transformers' `SiglipModel` answers at base size, in float64.

    python tests/golden/make_siglip_base.py          # needs torch and transformers (5.24 wrote the file)

Weights and inputs are drawn from their names (`drawn`), here and in `tests/encoders/test_siglip_base.py`, so that the
file holds answers alone, every few of them.
"""

import zlib
from pathlib import Path

import numpy as np

CONFIG = {"model_type": "siglip", "vision_config": {"image_size": 224, "patch_size": 16}, "text_config": {}}
STEPS = {"encoded": (1, 13, 29), "values": (1, 13, 29), "keys": (1, 13, 29)}  # of a batch, tokens, channels
SHAPES = {"square": (224, 224), "wide": (160, 320)}


def drawn(name, shape):
    """Numbers that depend on a weight's name and shape alone: about 1 for a layer norm's scale, else about 0."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * x
    if name in ("logit_scale", "logit_bias"):
        return np.full(shape, 2.0 if name == "logit_scale" else -3.0, np.float32)
    fan_in = (
        shape[-1] if len(shape) == 2 and "embedding" not in name else np.prod(shape[1:]) if len(shape) == 4 else 400
    )
    return x * np.float32(1 / np.sqrt(fan_in))


def inputs():
    """Images [2, 3, H, W] by shape, and ids [3, 64] that are padded with 1, as SigLIP's are."""
    ids = np.random.default_rng(1).integers(2, 32000, (3, 64))
    for row, length in zip(ids, (64, 9, 1), strict=True):
        row[length:] = 1
    return {name: drawn(name, (2, 3, *shape)) for name, shape in SHAPES.items()}, ids


def strided(name, array):
    """The part of an answer that is kept."""
    return array[tuple(slice(None, None, step) for step in STEPS[name])] if name in STEPS else array


def main():
    import torch
    import transformers

    config = transformers.SiglipConfig(vision_config=CONFIG["vision_config"], text_config={})
    config._attn_implementation = "eager"
    model = transformers.SiglipModel(config).eval()
    model.load_state_dict({k: torch.from_numpy(drawn(k, tuple(v.shape))) for k, v in model.state_dict().items()})
    model = model.double()
    images, ids = inputs()
    out = {}
    with torch.no_grad():
        for shape, image in images.items():
            vision = model.vision_model(torch.from_numpy(image).double(), interpolate_pos_encoding=True)
            tokens, head = vision.last_hidden_state, model.vision_model.head
            batch, length, width = tokens.shape
            alone = head(tokens.reshape(-1, 1, width)).reshape(batch, length, width)
            weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
            keys = tokens @ weight[width : 2 * width].T + bias[width : 2 * width]
            for name, array in (("encoded", tokens), ("values", alone), ("keys", keys)):
                out[f"{shape}/{name}"] = strided(name, array)
            out[f"{shape}/pooled"] = vision.pooler_output
        answers = model(torch.from_numpy(ids), torch.from_numpy(images["square"]).double())
        out["text"], out["logits"] = answers.text_embeds, answers.logits_per_image
    arrays = {name: np.asarray(array, np.float32) for name, array in out.items()}
    np.savez_compressed(Path(__file__).with_name("siglip_base.npz"), **arrays)


if __name__ == "__main__":
    main()
