"""Tiny random CLIPs with a tokenizer that hashes words, and a cache folder of their own."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskclip_jax.checkpoints.folders import Reading
from maskclip_jax.checkpoints.load import Pretrained
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.encoders.config import CLIPConfig, Fidelity, ResNetConfig, TextConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.ops.module import shapes_of

VISION = {
    "vit": ViTConfig(image_size=32, patch_size=8, width=16, layers=2, heads=2, mlp_width=32),
    "resnet": ResNetConfig(image_size=64, width=4, layers=(1, 1, 1, 1), heads=4, dense_stride=16),
}
TEXT = TextConfig(vocab_size=64, context_length=40, width=16, layers=1, heads=2, mlp_width=32)


def tokenizer(prompts):
    """Start 62, a hashed id per word, end 63, zeros."""
    out = np.zeros((len(prompts), TEXT.context_length), np.int32)
    for row, prompt in zip(out, prompts, strict=True):
        ids = [62, *(1 + zlib.crc32(word.encode()) % 60 for word in prompt.split()), 63]
        row[: len(ids)] = ids
    return out


def _fill(rng, path, shape):
    """Random numbers of a sensible size: compiling `init` would take most of the tests' time."""
    name = path[-1].key
    if name == "logit_scale":
        return np.float32(np.log(30))
    if name in ("bias", "mean"):
        return rng.normal(0, 0.1, shape).astype(np.float32)
    if name in ("scale", "var"):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    fan_in = np.prod(shape[:-1]) if name in ("kernel", "conv1") else shape[0] if name == "proj" else 1
    return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)


def make_pretrained(kind, fidelity="clip", short_side=32, long_side=96, seed=0):
    config = CLIPConfig(VISION[kind], TEXT, 12, Fidelity.named(fidelity))
    model = CLIP(config)
    side = config.vision.image_size
    shapes = shapes_of(model, jnp.zeros((1, side, side, 3)), jnp.zeros((1, 40), jnp.int32))
    rng = np.random.default_rng(seed)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.device_put(_fill(rng, path, leaf.shape)), shapes
    )
    preprocess = Preprocess(
        (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), short_side=short_side, long_side=long_side, multiple=config.multiple
    )
    if config.fidelity.image_resize == "opencv":
        preprocess = dataclasses.replace(preprocess, interpolation="opencv")
    return Pretrained(model, variables, config, tokenizer, preprocess, Reading(short_side=short_side))


@pytest.fixture(scope="session")
def pretrained():
    """`pretrained("vit" | "resnet", …)`, made once."""
    made = {}

    def get(kind, fidelity="clip", **options):
        key = kind, str(fidelity), *sorted(options.items())
        if key not in made:
            made[key] = make_pretrained(kind, fidelity, **options)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("MASKCLIP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_images(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="session")
def images():
    """`images((height, width), …)`: random uint8 pictures."""
    return random_images
