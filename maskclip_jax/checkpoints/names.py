"""Names in other people's checkpoints -> our parameters: one table per naming.

A row reads "their module, our module, what kind of module it is". The kind says which arrays such a module holds and
how each is laid out, once for PyTorch (`TORCH`) and once for Flax (`FLAX`), so the same HF table serves
`model.safetensors` and `flax_model.msgpack`. Every layout knows its inverse: the tables also write checkpoints
(`weights.to_names`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from maskclip_jax.encoders.config import CLIPConfig, ViTConfig

Naming = Literal["openai", "hf", "flax"]
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


class Row(NamedTuple):
    theirs: str
    ours: str
    kind: str


SAME = Layout(lambda x: [x], lambda xs: xs[0])
SCALAR = Layout(lambda x: [x.reshape(())], lambda xs: xs[0])  # some trainers save the temperature as one-element vector
TRANSPOSED = Layout(lambda x: [x.T], lambda xs: xs[0].T)
OIHW = Layout(lambda x: [x.transpose(2, 3, 1, 0)], lambda xs: xs[0].transpose(3, 2, 0, 1))
QKV_KERNEL = Layout(lambda x: [part.T for part in np.split(x, 3)], lambda xs: np.concatenate([x.T for x in xs]))
QKV_BIAS = Layout(lambda x: np.split(x, 3), np.concatenate)

_QKV = ("q_proj", "k_proj", "v_proj")
TORCH = {  # kind: (their array, our arrays, layout)
    "linear": ((".weight", ("/kernel",), TRANSPOSED), (".bias", ("/bias",), SAME)),
    "fused_qkv": (
        ("_weight", tuple(f"/{name}/kernel" for name in _QKV), QKV_KERNEL),
        ("_bias", tuple(f"/{name}/bias" for name in _QKV), QKV_BIAS),
    ),
    "layer_norm": ((".weight", ("/scale",), SAME), (".bias", ("/bias",), SAME)),
    "batch_norm": (
        (".weight", ("/scale",), SAME),
        (".bias", ("/bias",), SAME),
        (".running_mean", ("batch_stats:/mean",), SAME),
        (".running_var", ("batch_stats:/var",), SAME),
    ),
    "conv": ((".weight", ("/kernel",), OIHW),),
    "patch_conv": ((".weight", ("",), OIHW),),
    "embedding": ((".weight", ("",), SAME),),
    "projection": ((".weight", ("",), TRANSPOSED),),
    "array": (("", ("",), SAME),),
    "scalar": (("", ("",), SCALAR),),
}
FLAX = TORCH | {
    "linear": ((".kernel", ("/kernel",), SAME), (".bias", ("/bias",), SAME)),
    "layer_norm": ((".scale", ("/scale",), SAME), (".bias", ("/bias",), SAME)),
    "patch_conv": ((".kernel", ("",), SAME),),
    "embedding": ((".embedding", ("",), SAME),),
    "projection": ((".kernel", ("",), SAME),),
}

# OpenAI's names, which open_clip kept. open_clip's newer models put the text tower under `text.`; see `weights.py`.
OPENAI_BLOCK = (
    Row("ln_1", "ln_1", "layer_norm"),
    Row("attn.in_proj", "attn", "fused_qkv"),
    Row("attn.out_proj", "attn/out_proj", "linear"),
    Row("ln_2", "ln_2", "layer_norm"),
    Row("mlp.c_fc", "mlp/c_fc", "linear"),
    Row("mlp.c_proj", "mlp/c_proj", "linear"),
)
OPENAI_VIT = (
    Row("visual.conv1", "visual/conv1", "patch_conv"),
    Row("visual.class_embedding", "visual/class_embedding", "array"),
    Row("visual.positional_embedding", "visual/positional_embedding", "array"),
    Row("visual.ln_pre", "visual/ln_pre", "layer_norm"),
    Row("visual.ln_post", "visual/ln_post", "layer_norm"),
    Row("visual.proj", "visual/proj", "array"),
)
OPENAI_RESNET = (
    *(Row(f"visual.conv{n}", f"visual/stem/conv{n}", "conv") for n in (1, 2, 3)),
    *(Row(f"visual.bn{n}", f"visual/stem/bn{n}", "batch_norm") for n in (1, 2, 3)),
    Row("visual.attnpool.positional_embedding", "visual/attnpool/positional_embedding", "array"),
    *(Row(f"visual.attnpool.{p}_proj", f"visual/attnpool/{p}_proj", "linear") for p in "qkvc"),
)
OPENAI_BOTTLENECK = (
    *(Row(f"conv{n}", f"conv{n}", "conv") for n in (1, 2, 3)),
    *(Row(f"bn{n}", f"bn{n}", "batch_norm") for n in (1, 2, 3)),
)
OPENAI_DOWNSAMPLE = (  # the first block of every stage
    Row("downsample.0", "downsample_0", "conv"),
    Row("downsample.1", "downsample_1", "batch_norm"),
)
OPENAI_TEXT = (
    Row("token_embedding", "text/token_embedding", "embedding"),
    Row("positional_embedding", "text/positional_embedding", "array"),
    Row("ln_final", "text/ln_final", "layer_norm"),
    Row("text_projection", "text/text_projection", "array"),
    Row("logit_scale", "logit_scale", "scalar"),
)

HF_BLOCK = (
    Row("layer_norm1", "ln_1", "layer_norm"),
    *(Row(f"self_attn.{name}", f"attn/{name}", "linear") for name in (*_QKV, "out_proj")),
    Row("layer_norm2", "ln_2", "layer_norm"),
    Row("mlp.fc1", "mlp/c_fc", "linear"),
    Row("mlp.fc2", "mlp/c_proj", "linear"),
)
HF_VIT = (
    Row("vision_model.embeddings.patch_embedding", "visual/conv1", "patch_conv"),
    Row("vision_model.embeddings.class_embedding", "visual/class_embedding", "array"),
    Row("vision_model.embeddings.position_embedding", "visual/positional_embedding", "embedding"),
    Row("vision_model.pre_layrnorm", "visual/ln_pre", "layer_norm"),  # transformers' own spelling
    Row("vision_model.post_layernorm", "visual/ln_post", "layer_norm"),
    Row("visual_projection", "visual/proj", "projection"),
)
HF_TEXT = (
    Row("text_model.embeddings.token_embedding", "text/token_embedding", "embedding"),
    Row("text_model.embeddings.position_embedding", "text/positional_embedding", "embedding"),
    Row("text_model.final_layer_norm", "text/ln_final", "layer_norm"),
    Row("text_projection", "text/text_projection", "projection"),
    Row("logit_scale", "logit_scale", "scalar"),
)

IGNORED = {  # regular expressions of whole keys: buffers that can be recomputed, and OpenAI's notes to itself
    "openai": (r".*\.num_batches_tracked", r"(.*\.)?attn_mask", "input_resolution", "context_length", "vocab_size"),
    "hf": (r".*\.position_ids",),
    "flax": (r".*\.position_ids",),
}
# What makes a set of keys recognisable, and each naming's kinds of module.
SIGNATURE = {
    "openai": "visual.conv1.weight",
    "hf": "vision_model.embeddings.patch_embedding.weight",
    "flax": "vision_model.embeddings.patch_embedding.kernel",
}
_KINDS = {"openai": TORCH, "hf": TORCH, "flax": FLAX}


def entries(config: CLIPConfig, naming: Naming, towers: tuple[Tower, ...] = ("visual", "text")) -> Iterator[Entry]:
    """Every key that a checkpoint of this architecture holds under this naming, in reading order."""
    for tower in towers:
        rows = _openai_rows(config, tower) if naming == "openai" else _hf_rows(config, tower)
        for row in rows:
            for suffix, ours, layout in _KINDS[naming][row.kind]:
                yield Entry(row.theirs + suffix, tuple(_path(row.ours, leaf) for leaf in ours), layout)


def _path(module: str, leaf: str) -> str:
    collection, _, name = leaf.rpartition(":")
    return f"{collection or 'params'}/{module}{name}"


def _openai_rows(config: CLIPConfig, tower: Tower) -> Iterator[Row]:
    if tower == "text":
        yield from OPENAI_TEXT
        yield from _blocks(OPENAI_BLOCK, "transformer.resblocks.{i}", "text", config.text.layers)
    elif isinstance(config.vision, ViTConfig):
        yield from OPENAI_VIT
        yield from _blocks(OPENAI_BLOCK, "visual.transformer.resblocks.{i}", "visual", config.vision.layers)
    else:
        yield from OPENAI_RESNET
        for stage, blocks in enumerate(config.vision.layers, 1):
            for i in range(blocks):
                rows = OPENAI_BOTTLENECK + (OPENAI_DOWNSAMPLE if i == 0 else ())
                for row in rows:
                    yield Row(f"visual.layer{stage}.{i}.{row.theirs}", f"visual/layer{stage}_{i}/{row.ours}", row.kind)


def _hf_rows(config: CLIPConfig, tower: Tower) -> Iterator[Row]:
    yield from HF_TEXT if tower == "text" else HF_VIT
    side, layers = ("text", config.text.layers) if tower == "text" else ("vision", config.vision.layers)
    yield from _blocks(HF_BLOCK, f"{side}_model.encoder.layers.{{i}}", tower, layers)


def _blocks(rows: tuple[Row, ...], theirs: str, tower: str, layers: int) -> Iterator[Row]:
    for i in range(layers):
        for row in rows:
            ours = f"{tower}/transformer/resblocks_{i}/{row.ours}"
            yield Row(f"{theirs.format(i=i)}.{row.theirs}", ours, row.kind)
