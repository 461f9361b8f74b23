"""Tiny random CLIPs with a tokenizer that hashes words, and a cache folder of their own."""

import zlib

import numpy as np
import pytest
from random_clip import random_pretrained

from maskclip_jax.checkpoints.pretrained import Reading
from maskclip_jax.encoders.config import CLIPConfig, Fidelity, ResNetConfig, TextConfig, ViTConfig

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


def make_pretrained(kind, fidelity="clip", short_side=32, long_side=96, seed=0):
    config = CLIPConfig(VISION[kind], TEXT, 12, Fidelity.named(fidelity))
    sizes = {"short_side": short_side, "long_side": long_side}
    return random_pretrained(config, tokenizer, seed=seed, reading=Reading(short_side=short_side), **sizes)


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
