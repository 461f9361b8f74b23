"""The nine released architectures: parameter counts, shapes, and loading at full size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from maskclip_jax.checkpoints import architecture, names, weights
from maskclip_jax.checkpoints.load import folded
from maskclip_jax.encoders.config import VARIANTS, variant
from maskclip_jax.encoders.model import CLIP

COUNTS = {  # of OpenAI's models, batch statistics left out
    "RN50": 102_007_137,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name):
    config = variant(name)
    wanted = weights.abstract_variables(config)
    if name in COUNTS:
        assert sum(math.prod(leaf.shape) for path, leaf in wanted.items() if path.startswith("params/")) == COUNTS[name]
    # Each table names every parameter exactly once.
    for naming in ("openai", "hf", "flax") if "ViT" in name else ("openai",):
        paths = [path for entry in names.entries(config, naming) for path in entry.paths]
        assert sorted(paths) == sorted(wanted)
    # OpenAI's rules recover the architecture from shapes alone.
    shapes = {
        key: layout.write([np.broadcast_to(np.float32(0), wanted[path].shape) for path in paths]).shape
        for key, paths, layout in names.entries(config, "openai")
    }
    assert architecture.from_shapes(shapes) == config


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_reading_at_512_by_672(name):
    config = variant(name)
    side = lambda pixels: -(-pixels // config.multiple) * config.multiple  # noqa: E731
    images = jax.ShapeDtypeStruct((1, side(512), side(672), 3), jnp.float32)
    variables = weights.unflatten_dict(weights.abstract_variables(config), sep="/")
    variables = jax.eval_shape(lambda v: folded(config, v), variables)
    dense = jax.eval_shape(lambda v, x: CLIP(config).apply(v, x, method="encode_dense"), variables, images)
    h, w = images.shape[1] // config.stride, images.shape[2] // config.stride
    width = config.vision.width * (1 if "ViT" in name else 32)
    assert dense.features.shape == (1, h, w, config.embed_dim)
    assert dense.keys.shape == (1, h * w, width)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/14", "RN50x64"])
def test_loading_at_full_size(name):
    """From a generated state dict; every array one constant, so that memory is the model's and nothing more."""
    from maskclip_jax.checkpoints.load import load_clip

    config = variant(name)
    wanted = weights.abstract_variables(config)
    arrays, values = {}, {}
    for i, (key, paths, layout) in enumerate(names.entries(config, "openai")):
        shape = layout.write([np.broadcast_to(np.float32(0), wanted[path].shape) for path in paths]).shape
        value = 4.5 if key == "logit_scale" else 1 + i  # a logarithm: of more than 10 loading refuses
        arrays[key] = np.broadcast_to(np.float32(value), shape)
        values |= dict.fromkeys(paths, value)
    pretrained = load_clip(arrays)
    assert pretrained.config == config
    flat = flatten_dict({k: v for k, v in pretrained.variables.items() if k != "folded"}, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in wanted.items()}
    assert all(leaf.reshape(-1)[0] == leaf.reshape(-1)[-1] == values[path] for path, leaf in flat.items())
