"""Tiny CLIPs with random weights, and the checkpoint folders they can be written as."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from random_clip import random_variables
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from maskclip_jax.checkpoints.architecture import to_hf, to_open_clip
from maskclip_jax.checkpoints.weights import to_names
from maskclip_jax.encoders.config import (
    SIGLIP_TEXT,
    SIGLIP_VIT,
    TIPS_TEXT,
    TIPS_VIT,
    CLIPConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from maskclip_jax.encoders.model import CLIP

WORDS = "a photo of cat dog grass the".split()
TEXT = TextConfig(vocab_size=len(WORDS) + 3, context_length=8, width=64, layers=2, heads=1, mlp_width=256)
_KIN = (128, 16, 48, 2, 3, 64)  # of text towers: as many tokens as a SentencePiece model that tests train, and some
CONFIGS = {
    "vit": CLIPConfig(ViTConfig(32, 8, 128, 2, 2, 512), TEXT, 32),
    "resnet": CLIPConfig(ResNetConfig(64, 8, (1, 2, 1, 1), 4), TEXT, 32),
    "siglip": CLIPConfig(
        ViTConfig(32, 8, 48, 2, 3, 64, **SIGLIP_VIT), TextConfig(*_KIN, **SIGLIP_TEXT), 48, logit_bias=True
    ),
    "tips": CLIPConfig(
        ViTConfig(32, 8, 48, 2, 3, 64, **TIPS_VIT | {"activation": "swiglu"}),
        TextConfig(128, 64, *_KIN[2:], **TIPS_TEXT),
        48,
    ),
    "tips_torch": CLIPConfig(
        ViTConfig(32, 8, 64, 2, 1, 64, **TIPS_VIT | {"class_position": True, "layer_scale": True}),
        TextConfig(128, 64, 64, 2, 1, 64, **TIPS_TEXT),
        64,
    ),
}


@functools.cache
def random_clip(kind):
    """A tiny CLIP of `CONFIGS`: config and variables."""
    return CONFIGS[kind], random_variables(CONFIGS[kind])


def write_tokenizer(folder):
    """A word-level tokenizer with start and end tokens, as `tokenizer.json`."""
    vocab = {"<unk>": 0, **{word: i for i, word in enumerate(WORDS, 1)}, "<start>": 8, "<end>": 9}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<start> $A <end>", special_tokens=[("<start>", 8), ("<end>", 9)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_folder(folder: Path, kind, form):
    """Writes `random_clip(kind)` as a folder: "hf", "hf-sharded", "hf-flax", "open_clip" or "open_clip-text"."""
    config, variables = random_clip(kind)
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    if form.startswith("hf"):
        (folder / "config.json").write_text(json.dumps(to_hf(config)))
        preprocess = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3, "size": 32}
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocess))
    else:
        content = {"model_cfg": to_open_clip(config), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
    arrays = to_names(variables, config, "hf" if form.startswith("hf") else "openai")
    if form == "hf":
        buffer = {"text_model.embeddings.position_ids": np.arange(8)[None]}  # in files from before transformers 4.31
        save_file(arrays | buffer, folder / "model.safetensors")
    elif form == "hf-sharded":
        weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(arrays)}
        for file in set(weight_map.values()):
            save_file({name: arrays[name] for name in arrays if weight_map[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif form == "hf-flax":
        tree = unflatten_dict(to_names(variables, config, "flax"), sep=".")
        (folder / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    elif form == "open_clip":
        save_file(arrays, folder / "open_clip_model.safetensors")
    elif form == "open_clip-text":  # open_clip's CustomTextCLIP
        custom = {
            name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": a for name, a in arrays.items()
        }
        save_file(custom | {"text.attn_mask": np.zeros((8, 8), np.float32)}, folder / "model.safetensors")
    return folder


@functools.cache
def outputs(kind):
    """What `random_clip(kind)` answers: image and text embeddings, dense features and keys."""
    config, variables = random_clip(kind)
    return answers(config, variables)


def answers(config, variables):
    """Image and text embeddings, dense features and keys of a fixed input."""
    side = config.vision.image_size
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, side, side, 3)), jnp.float32)
    ids = jnp.asarray([[8, 1, 4, 9, 0, 0, 0, 0], [8, 1, 2, 3, 5, 6, 7, 9]], jnp.int32)
    return compiled(config)({name: variables[name] for name in variables if name != "folded"}, images, ids)


@functools.cache
def compiled(config):
    def everything(clip, images, ids):
        return clip.encode_image(images), clip.encode_text(ids), clip.encode_dense(images)

    return jax.jit(lambda v, images, ids: CLIP(config).apply(v, images, ids, method=everything))


def assert_same(ours, expected, tolerance=1e-6):
    """All arrays equal to `tolerance` of the largest magnitude."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()
