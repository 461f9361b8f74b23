"""`load_clip`: a hub id, folder, file or mapping of arrays -> everything a CLIP needs to see and to read."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from maskclip_jax.data.whole_files import cut, shipped
from maskclip_jax.encoders import model as clip_model
from maskclip_jax.encoders.config import CLIPConfig, Fidelity, ViTConfig, with_activation, with_fidelity
from maskclip_jax.encoders.layers import Dtype
from maskclip_jax.encoders.model import CLIP
from maskclip_jax.errors import UserError

EMBEDDED = {"embedded": "clip_vit", "embedded-resnet": "clip_resnet"}  # the checkpoints in maskclip_jax/assets
OPENAI_LOGIT_SCALE = float(np.log(100.0))  # where OpenAI's models end up: their training clips it there


def load_clip(
    source: str | Path | Mapping[str, Any],
    *,
    fidelity: str | Fidelity = "clip",
    dense_stride: int | None = None,
    dtype: Dtype = jnp.float32,
    fold: bool = True,
    tokenizer: str | Path | Callable | None = None,
    activation: str | None = None,
) -> Pretrained:
    """Loads a CLIP from wherever it is.

    Args:
      source: one of
        "embedded" (a ViT) or "embedded-resnet", the small CLIPs that ship with the project;
        a hub id ("openai/clip-vit-base-patch16", "google/siglip2-base-patch16-256", "timm/resnet50_clip.openai");
        a folder: Hugging Face's, open_clip's, one with a TIPS' two files, or one that `orbax_io.save_converted` wrote;
        a file: `.safetensors`, `.msgpack`, `.bin`, `.pth`, OpenAI's `.pt`, big_vision's or (either of two) TIPS' `.npz`
        (configs and tokenizer may lie beside it);
        a mapping of OpenAI-named arrays; of the image tower alone (`visual.…`) it makes a model that needs
        `classifier=` wherever names are given, since `encode_text` refuses.
      fidelity: "clip", "released" or a `Fidelity`; its image statistics go into `preprocess`. The released code reads
        CLIP alone: what it does to the image tower is refused for others (`encoders.config.with_fidelity`).
      dense_stride: pixels between dense features of a ResNet, 8, 16 or 32; None takes the checkpoint's `maskclip.json`,
        else 32. A ViT has its patch size.
      dtype: what the towers compute in.
      fold: multiply the value path's two projections into one (`maskclip_jax.encoders.model.fold`).
      tokenizer: a folder or hub id to take tokenizer files from ("openai/clip-vit-base-patch32" is OpenAI's), or a
        function prompts -> ids [N, T], or a SentencePiece file (`tokenizer.model`); None takes the checkpoint's own,
        else OpenAI's where the vocabulary is its.
      activation: "quick_gelu" or "gelu", of the transformers; None takes what the checkpoint's config says. Bare
        weights have none: QuickGELU is assumed, as in OpenAI's models, and the logger "maskclip_jax" says so.

    Raises:
      UserError: one line on what is missing, broken, unknown or does not fit.
    """
    fidelity = Fidelity.named(fidelity)
    parts, variables = _read(source)
    if activation is not None:
        parts = parts._replace(config=with_activation(parts.config, activation))
    words = parts.tokenizer() if tokenizer is None else _other_tokenizer(tokenizer, parts.config)
    if variables is None:
        variables = _variables(parts.arrays, parts.config)
    if parts.note is not None and activation is None:
        logging.getLogger("maskclip_jax").warning(parts.note)
    config = with_fidelity(parts.config, fidelity)
    config = with_stride(config, parts.reading.dense_stride if dense_stride is None else dense_stride)
    if fold:
        variables = folded(config, variables)
    return Pretrained(
        CLIP(config, dtype),
        variables,
        config,
        words,
        _preprocess(parts, config),
        dataclasses.replace(parts.reading, dense_stride=config.stride),
    )


def load_backbone(source: str | Path, *, dtype: Dtype = jnp.float32) -> Pretrained:
    """A Vision Transformer whose patches say what is alike (`CLIP.encode_tokens`); its text tower is not needed.

    Args:
      source: a hub id or a folder of DINO ("facebook/dino-vitb16"), DINOv2 ("facebook/dinov2-base",
        "facebook/dinov2-with-registers-base") or DINOv3 ("facebook/dinov3-vitb16-pretrain-lvd1689m"); or whatever
        `load_clip` takes, read through its image tower.
      dtype: what the tower computes in.

    Returns:
      a `Pretrained` without a tokenizer: what lies beside the weights is not read.

    Raises:
      UserError: one line on what is missing, broken, unknown or no ViT.
    """
    from maskclip_jax.checkpoints.tokenizer import MissingTokenizer

    parts, variables = _read(source, backbone=True)
    if not isinstance(parts.config.vision, ViTConfig):
        raise UserError(f"an affinity is a Vision Transformer's, got {cut(str(source), 120)}, a ResNet: give another")
    variables = _variables(parts.arrays, parts.config) if variables is None else variables
    model, words = CLIP(parts.config, dtype), MissingTokenizer(str(source), parts.config.text)
    return Pretrained(model, variables, parts.config, words, _preprocess(parts, parts.config), parts.reading)


def _read(source: str | Path | Mapping[str, Any], *, backbone: bool = False) -> tuple[Any, dict[str, Any] | None]:
    """What a checkpoint holds (`folders.Parts`), and its variables where it was converted."""
    from maskclip_jax.checkpoints import folders, orbax_io  # here, as below: each reads a dozen formats

    if isinstance(source, Mapping):
        return folders.from_mapping(source), None
    path = _located(source, backbone)
    if orbax_io.is_converted(path):
        return orbax_io.load_converted(path)
    read = folders.from_folder if path.is_dir() else folders.from_file
    return read(path, backbone=backbone), None


def load_visual(
    arrays: Mapping[str, Any], *, fidelity: str | Fidelity = "clip", dense_stride: int | None = None, fold: bool = True
) -> tuple[CLIP, dict[str, Any]]:
    """A model and its variables from an image tower alone (OpenAI-named `visual.…` arrays).

    `encode_image` and `encode_dense` work, `encode_text` does not. `logit_scale` is OpenAI's, log 100.
    """
    found = load_clip(arrays, fidelity=fidelity, dense_stride=dense_stride, fold=fold)
    return found.model, found.variables


def _variables(arrays: Mapping[str, Any], config: CLIPConfig) -> dict[str, Any]:
    from maskclip_jax.checkpoints.weights import check_scale, plain_names, to_variables

    if config.has_text:
        return to_variables(arrays, config)
    # An image tower alone was normally cut out of a CLIP without its temperature.
    scale = next((arrays[key] for name, key in plain_names(arrays).items() if name == "logit_scale"), None)
    tower = {name: arrays[key] for name, key in plain_names(arrays).items() if name != "logit_scale"}
    variables = to_variables(tower, config, towers=("visual",))
    scale = OPENAI_LOGIT_SCALE if scale is None else np.asarray(scale, np.float32).reshape(())
    check_scale(scale)
    variables["params"]["logit_scale"] = jnp.asarray(scale, jnp.float32)
    return variables


def with_stride(config: CLIPConfig, dense_stride: int | None) -> CLIPConfig:
    """`config` read out at `dense_stride` pixels; None leaves it. Raises UserError where the tower cannot."""
    if dense_stride is None or dense_stride == config.stride:
        return config
    if isinstance(config.vision, ViTConfig):
        raise UserError(
            f"a ViT reads out at its patch size, {config.stride}, not at {dense_stride}: leave the stride out"
        )
    if dense_stride not in (8, 16, 32):
        raise UserError(f"a ResNet reads out at stride 8, 16 or 32, not {dense_stride}: choose one of them")
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, dense_stride=dense_stride))


def folded(config: CLIPConfig, variables: dict[str, Any]) -> dict[str, Any]:
    """`encoders.model.fold` in full precision, which TPUs and GPUs would otherwise cut: it happens once."""
    with jax.default_matmul_precision("highest"):
        return clip_model.fold(config, variables)


def _preprocess(parts: Any, config: CLIPConfig) -> Preprocess:
    changes: dict[str, Any] = {"multiple": config.multiple, "short_side": parts.reading.short_side}
    if config.fidelity.image_statistics == "imagenet":
        changes |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if config.fidelity.image_resize == "opencv":
        changes["interpolation"] = "opencv"
    return dataclasses.replace(parts.preprocess, **changes)


def embedded_folder(name: str) -> Path:
    """Where one of the `EMBEDDED` checkpoints lies. Raises UserError where the installed package lacks it."""
    return shipped("assets", EMBEDDED[name])


def _located(source: str | Path, backbone: bool) -> Path:
    if source in EMBEDDED:
        return embedded_folder(str(source))
    path = _existing(source)
    if path is not None:
        return path
    if _hub_id(str(source)):
        from maskclip_jax.checkpoints.hub import download

        return download(str(source), backbone=backbone)
    raise UserError(
        f"a model is {', '.join(EMBEDDED)}, a hub id (owner/name), or a folder or file that exists, "
        f"got {cut(repr(str(source)), 120)}: check the spelling"
    )


def _existing(source: str | Path) -> Path | None:
    """`source` as a path when there is such a file or folder."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a null character
        path = Path(os.path.expanduser(source))
        if str(source) and path.exists():
            return path
    return None


def _hub_id(name: str) -> bool:
    from maskclip_jax.checkpoints.files import SUFFIXES

    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) and not name.lower().endswith(SUFFIXES)


def _other_tokenizer(tokenizer: str | Path | Callable, config: CLIPConfig) -> Callable:
    from maskclip_jax.checkpoints import tokenizer as tokenizers

    if callable(tokenizer):
        return tokenizers.OwnTokenizer(tokenizer, config.text)
    folder = _existing(tokenizer)
    if folder is not None and folder.suffix == ".model" and folder.is_file():
        return tokenizers.load_sentencepiece(folder, config.text)
    if folder is not None and folder.name in tokenizers.TOKENIZER_FILES:
        folder = folder.parent
    if folder is None or not folder.is_dir():
        if not _hub_id(str(tokenizer)):
            came = cut(repr(str(tokenizer)), 120)
            raise UserError(f"a tokenizer is a folder, a hub id or a function, but {came} is none of these")
        from maskclip_jax.checkpoints.folders import SMALL_FILES
        from maskclip_jax.checkpoints.hub import snapshot

        folder = snapshot(str(tokenizer), SMALL_FILES)
    found = tokenizers.load_tokenizer(folder, config.text)
    if isinstance(found, tokenizers.MissingTokenizer):
        raise UserError(f"{folder} has no {tokenizers.wanted_files(config.text)}: give another tokenizer")
    return found
