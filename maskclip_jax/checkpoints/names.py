"""Names in other people's checkpoints -> our parameters.

`name_tables` has rows "their module, our module, what kind of module it is", one table per naming. The kind says which
arrays such a module holds and how each is laid out, for PyTorch (`TORCH`), for Flax (`FLAX`, so that the same HF table
serves `model.safetensors` and `flax_model.msgpack`), and for Flax with attention heads apart (`google`: big_vision and
scenic). Every layout knows its inverse: the tables also write checkpoints (`weights.to_names`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from maskclip_jax.checkpoints import name_tables as tables
from maskclip_jax.checkpoints.name_tables import Row
from maskclip_jax.encoders.config import CLIPConfig, ResNetConfig, ViTConfig
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.ops.module import shapes_of

Naming = Literal["openai", "hf", "flax", "big_vision", "tips", "tips_torch", "vit", "dinov2", "dinov3"]
Tower = Literal["visual", "text"]


class Layout(NamedTuple):
    """How one of their arrays becomes ours (`read`: a list, one array per target) and back (`write`)."""

    read: Callable[[np.ndarray], list[np.ndarray]]
    write: Callable[[list[np.ndarray]], np.ndarray]


class Entry(NamedTuple):
    """One of their keys: our paths that it fills ("params/visual/…") and the layout between them."""

    key: str
    paths: tuple[str, ...]
    layout: Layout


def _fused(parts: int) -> tuple[Layout, Layout]:
    """Kernel and bias of `parts` linear layers below one another, as PyTorch fuses them."""
    return (
        Layout(lambda x: [part.T for part in np.split(x, parts)], lambda xs: np.concatenate([x.T for x in xs])),
        Layout(lambda x: np.split(x, parts), np.concatenate),
    )


SAME = Layout(lambda x: [x], lambda xs: xs[0])
SCALAR = Layout(lambda x: [x.reshape(())], lambda xs: xs[0])  # some trainers save the temperature as one-element vector
SCALAR_OF_ONE = Layout(SCALAR.read, lambda xs: xs[0].reshape(1))
TEMPERATURE = Layout(lambda x: [-np.log(x.reshape(()))], lambda xs: np.exp(-xs[0]))
TRANSPOSED = Layout(lambda x: [x.T], lambda xs: xs[0].T)
OIHW = Layout(lambda x: [x.transpose(2, 3, 1, 0)], lambda xs: xs[0].transpose(3, 2, 0, 1))
VECTOR = Layout(lambda x: [x.reshape(x.shape[2:])], lambda xs: xs[0][None, None])  # [1, 1, D]
BATCHED = Layout(lambda x: [x.reshape(x.shape[1:])], lambda xs: xs[0][None])  # [1, n, D]
CLASS_TOKENS = Layout(lambda x: [x[0, 0], x[0, 1:]], lambda xs: np.concatenate([xs[0][None], xs[1]])[None])
SQUARE = Layout(  # [1, g, g, D]
    lambda x: [x.reshape(-1, x.shape[3])], lambda xs: xs[0].reshape(1, *2 * (round(len(xs[0]) ** 0.5),), -1)
)

_QKV = ("q_proj", "k_proj", "v_proj")


def _several(suffixes: tuple[str, str], names: tuple[str, ...]) -> tuple:
    """Kernels and biases of the linear layers `names` that are fused in one."""
    leaves = (tuple(f"/{name}/{leaf}" for name in names) for leaf in ("kernel", "bias"))
    return tuple(zip(suffixes, leaves, _fused(len(names)), strict=True))


TORCH = {  # kind: (their array, our arrays, layout)
    "linear": ((".weight", ("/kernel",), TRANSPOSED), (".bias", ("/bias",), SAME)),
    "fused_qkv": _several(("_weight", "_bias"), _QKV),
    "fused_linear": _several((".weight", ".bias"), _QKV),
    "fused_swiglu": _several((".weight", ".bias"), ("c_fc", "c_up")),
    "layer_norm": ((".weight", ("/scale",), SAME), (".bias", ("/bias",), SAME)),
    "batch_norm": (
        (".weight", ("/scale",), SAME),
        (".bias", ("/bias",), SAME),
        (".running_mean", ("batch_stats:/mean",), SAME),
        (".running_var", ("batch_stats:/var",), SAME),
    ),
    "conv": ((".weight", ("/kernel",), OIHW),),
    "patch_conv": ((".weight", ("",), OIHW), (".bias", ("_bias",), SAME)),
    "embedding": ((".weight", ("",), SAME),),
    "projection": ((".weight", ("",), TRANSPOSED),),
    "array": (("", ("",), SAME),),
    "vector": (("", ("",), VECTOR),),
    "batched": (("", ("",), BATCHED),),
    "square": (("", ("",), SQUARE),),
    "class_tokens": (("", ("/class_embedding", "/registers"), CLASS_TOKENS),),
    "scalar": (("", ("",), SCALAR),),
    "scalar_of_one": (("", ("",), SCALAR_OF_ONE),),
    "temperature": (("", ("",), TEMPERATURE),),
}
FLAX = TORCH | {
    "linear": ((".kernel", ("/kernel",), SAME), (".bias", ("/bias",), SAME)),
    "layer_norm": ((".scale", ("/scale",), SAME), (".bias", ("/bias",), SAME)),
    "patch_conv": ((".kernel", ("",), SAME), (".bias", ("_bias",), SAME)),
    "embedding": ((".embedding", ("",), SAME),),
    "projection": ((".kernel", ("",), SAME),),
}


def google(heads: int) -> dict[str, tuple]:
    """Kinds of big_vision's and scenic's files: Flax's with slashes, and attention kernels with an axis of heads."""
    kinds = {kind: tuple((name.replace(".", "/"), *rest) for name, *rest in rows) for kind, rows in FLAX.items()}
    bias = Layout(lambda x: [x.reshape(-1)], lambda xs: xs[0].reshape(heads, -1))
    into = Layout(lambda x: [x.reshape(len(x), -1)], lambda xs: xs[0].reshape(len(xs[0]), heads, -1))
    out = Layout(lambda x: [x.reshape(-1, x.shape[2])], lambda xs: xs[0].reshape(heads, -1, xs[0].shape[1]))
    kinds["heads_in"] = (("/kernel", ("/kernel",), into), ("/bias", ("/bias",), bias))
    kinds["heads_out"] = (("/kernel", ("/kernel",), out), ("/bias", ("/bias",), SAME))
    return kinds


IGNORED = {  # regular expressions of whole keys: buffers that can be recomputed, and OpenAI's notes to itself
    "openai": (r".*\.num_batches_tracked", r"(.*\.)?attn_mask", "input_resolution", "context_length", "vocab_size"),
    "hf": (r".*\.position_ids",),
    "flax": (r".*\.position_ids",),
    "big_vision": (),
    "tips": (),
    "tips_torch": ("mask_token",),  # of training
    "vit": (r"pooler\.dense\..*", "embeddings.mask_token"),
    "dinov2": ("embeddings.mask_token",),
    "dinov3": ("embeddings.mask_token",),
}
# Other architectures, by a key that their weights have. The first that fits names them.
OTHERS = (
    (r"(.*\.)?text_decoder\..*", "CoCa"),
    (r"visual\.attn_pool\.probe", "PE-Core"),
    (r"visual\.attn_pool\..*", "CoCa"),
    (r"visual(\.trunk)?\.blocks\.\d+\.(attn\.(q_proj|rope|inner_attn_ln)|mlp\.(w1|fc1_g))\..*", "EVA"),
    (
        r"visual\.trunk\.attn_pool\..*",
        "SigLIP in timm's form (take transformers' or big_vision's)",
    ),
    (r"visual\.trunk\.stages\.\d+\.blocks\.\d+\.conv_dw\..*", "ConvNeXt"),
    (r"(image_encoder\.model|visual\.trunk\.stages.*token_mixer)\..*", "MobileCLIP"),
    (r"(visual\.)?trunk\..*", "an image tower of timm"),
    (r"(text\.)?transformer\.block\..*", "a CLIP whose text tower is mT5"),
    (r"(text\.)?transformer\.(embed_tokens|layers)\..*", "a CLIP whose text tower is NLLB"),
    (r"(text\.)?transformer\.(embeddings|encoder)\..*", "a CLIP whose text tower is XLM-RoBERTa or another BERT"),
    (r"txt/BertModel.*", "LiT with BERT"),
    (r"(params/)?llm/.*", "PaliGemma"),
)
HALVES = {  # a key of one tower -> what it is, where the other is missing
    "token_emb/emb_var": "the text half of a TIPS",
    "txt/Embed_0/embedding": "SigLIP's text tower",
    "Transformer/encoderblock_0/LayerNorm_0/bias": "a Vision Transformer of big_vision's",
    "text_model.embeddings.token_embedding.weight": "transformers' text tower",
    "token_embedding.weight": "a text tower",
    "patch_embed.proj.weight": "an image tower of timm's or DINO's form",
}
# What makes a set of keys recognisable.
SIGNATURE: dict[Naming, str] = {
    "openai": "visual.conv1.weight",
    "hf": "vision_model.embeddings.patch_embedding.weight",
    "flax": "vision_model.embeddings.patch_embedding.kernel",
    "big_vision": "img/embedding/kernel",
    "tips": "encoder/ToTokenSequence_0/embedding/kernel",
    "tips_torch": "register_tokens",
    "vit": "encoder.layer.0.layernorm_before.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
    "dinov3": "embeddings.patch_embeddings.weight",
}
_PLACES: dict[Naming, tuple[str, str]] = {  # of a block, in the image tower and in the text tower
    "openai": ("visual.transformer.resblocks.{i}.", "transformer.resblocks.{i}."),
    "hf": ("vision_model.encoder.layers.{i}.", "text_model.encoder.layers.{i}."),
    "flax": ("vision_model.encoder.layers.{i}.", "text_model.encoder.layers.{i}."),
    "big_vision": ("img/Transformer/encoderblock_{i}/", "txt/Encoder_0/encoderblock_{i}/"),
    "tips": ("encoder/transformer/encoderblock_{i}/", "transformer/encoderblock_{i}/"),
    "tips_torch": ("blocks.{i}.", "transformer.resblocks.{i}."),
    "vit": ("encoder.layer.{i}.", ""),
    "dinov2": ("encoder.layer.{i}.", ""),
    "dinov3": ("layer.{i}.", ""),
}
_TOWERS: dict[Naming, tuple[tuple[Row, ...], tuple[Row, ...]]] = {
    "openai": (tables.OPENAI_VIT, tables.OPENAI_TEXT),
    "hf": (tables.HF_VIT, tables.HF_TEXT),
    "flax": (tables.HF_VIT, tables.HF_TEXT),
    "big_vision": (tables.BIG_VISION_VIT, tables.BIG_VISION_TEXT),
    "tips": (tables.TIPS_VIT, tables.TIPS_TEXT),
    "tips_torch": (tables.TIPS_TORCH_VIT, tables.TIPS_TORCH_TEXT),
    "vit": (tables.DINOV2_VIT, ()),
    "dinov2": (tables.DINOV2_VIT, ()),
    "dinov3": (tables.DINOV3_VIT, ()),
}


def entries(config: CLIPConfig, naming: Naming, towers: tuple[Tower, ...] = ("visual", "text")) -> Iterator[Entry]:
    """Every key that a checkpoint of this architecture holds under this naming, in reading order."""
    ours = abstract_variables(config)
    for tower in towers:
        for row in _rows(config, naming, tower):
            for suffix, leaves, layout in _kinds(config, naming, tower)[row.kind]:
                paths = tuple(_path(row.ours, leaf) for leaf in leaves)
                if paths[0] in ours:
                    yield Entry(row.theirs + suffix, paths, layout)


def abstract_variables(config: CLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("params/visual/…") -> shape and dtype of everything the model holds; nothing is computed."""
    return dict(_abstract_variables(config))


@functools.lru_cache(8)
def _abstract_variables(config: CLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
    side = config.vision.grid * (config.vision.patch_size if isinstance(config.vision, ViTConfig) else 32)
    images, ids = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    # A transformer's blocks differ in their numbers alone: the first is traced, the others are its copies.
    depths = {"params/text/transformer/": config.text.layers}
    short = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=1))
    if isinstance(config.vision, ViTConfig):
        depths["params/visual/transformer/"] = config.vision.layers
        short = dataclasses.replace(short, vision=dataclasses.replace(config.vision, layers=1))
    out = {}
    for path, shape in flatten_dict(shapes_of(CLIP(short), images, ids), sep="/").items():
        before, first, behind = path.partition("resblocks_0/")
        out |= {f"{before}resblocks_{i}/{behind}": shape for i in range(depths[before])} if first else {path: shape}
    return out


def _path(module: str, leaf: str) -> str:
    collection, _, name = leaf.rpartition(":")
    return f"{collection or 'params'}/{module}{name}"


def _kinds(config: CLIPConfig, naming: Naming, tower: Tower) -> dict[str, tuple]:
    if naming in ("big_vision", "tips"):
        return google(config.text.heads if tower == "text" else config.vision.heads)
    return FLAX if naming == "flax" else TORCH


def _rows(config: CLIPConfig, naming: Naming, tower: Tower) -> Iterator[Row]:
    side = config.text if tower == "text" else config.vision
    if isinstance(side, ResNetConfig):
        yield from _resnet_rows(side)
        return
    yield from _TOWERS[naming][tower == "text"]
    swiglu = side.activation == "swiglu"
    blocks = {
        "openai": tables.OPENAI_BLOCK,
        "hf": tables.HF_BLOCK,
        "flax": tables.HF_BLOCK,
        "big_vision": tables.FLAX_BLOCK,
        "tips": tables.SWIGLU_BLOCK if swiglu else tables.FLAX_BLOCK,
        "tips_torch": tables.TIPS_TORCH_SWIGLU if swiglu else tables.TIPS_TORCH_BLOCK,
        "vit": tables.VIT_BLOCK,
        "dinov2": tables.DINOV2_SWIGLU if swiglu else tables.DINOV2_BLOCK,
        "dinov3": tables.DINOV3_SWIGLU if swiglu else tables.DINOV3_BLOCK,
    }
    block = tables.OPENAI_BLOCK if (naming, tower) == ("tips_torch", "text") else blocks[naming]
    for i in range(side.layers):
        for row in block:
            place = _PLACES[naming][tower == "text"].format(i=i)
            yield Row(place + row.theirs, f"{tower}/transformer/resblocks_{i}/{row.ours}", row.kind)


def _resnet_rows(vision: ResNetConfig) -> Iterator[Row]:
    yield from tables.OPENAI_RESNET
    for stage, blocks in enumerate(vision.layers, 1):
        for i in range(blocks):
            for row in tables.OPENAI_BOTTLENECK + (tables.OPENAI_DOWNSAMPLE if i == 0 else ()):
                yield Row(f"visual.layer{stage}.{i}.{row.theirs}", f"visual/layer{stage}_{i}/{row.ours}", row.kind)
