"""Google's own files: big_vision's `.npz` (SigLIP) and scenic's or PyTorch-named pairs of them (TIPS), read by shapes.

What a file does not say is said here: heads where PyTorch fuses them, statistics, resizing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskclip_jax.checkpoints.architecture import Shapes, count
from maskclip_jax.checkpoints.config_rules import checked
from maskclip_jax.checkpoints.files import Shards, read_arrays
from maskclip_jax.checkpoints.memory import ArrayFile, array_shapes
from maskclip_jax.checkpoints.names import SIGNATURE, Naming
from maskclip_jax.data.preprocess import Preprocess
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders import config as families
from maskclip_jax.encoders.config import CLIPConfig, TextConfig, ViTConfig
from maskclip_jax.errors import UserError

NAMINGS = ("big_vision", "tips", "tips_torch")
PREPROCESS = {
    "siglip": Preprocess((0.5,) * 3, (0.5,) * 3, "bilinear"),
    "tips": Preprocess((0.0,) * 3, (1.0,) * 3),
}
_HALF = re.compile(r"(|.*[_-])(vision|text)\.npz")
_CONTEXT = 64  # tokens of TIPS, whose positions are computed
_SO400M = (1152, 16)  # a width whose heads are not 64 wide, and how many it has
_SCANNED = re.compile(r"(.*/encoderblock)(/.*)")
_OPTIMIZER = ("opt/", "extra/")  # what a training checkpoint keeps beside `params/`


class Renamed(ArrayFile):
    """Arrays under other names: `names` says which key of the file, and which slice of its first axis, one is."""

    def __init__(self, arrays: Mapping[str, Any], names: Mapping[str, tuple[str, int | None]]):
        self._arrays, self._names, known = arrays, names, array_shapes(arrays)
        self._shapes = {key: known[theirs][0 if i is None else 1 :] for key, (theirs, i) in names.items()}

    def __getitem__(self, key: str) -> Any:
        theirs, index = self._names[key]
        return self._arrays[theirs] if index is None else self._arrays[theirs][index]


def read_npz(path: Path) -> Mapping[str, Any]:
    """The arrays of big_vision's file, or of both files of a pair, under plain names.

    Raises UserError where a half of a pair is missing, or the file is none.
    """
    half, files, own = _HALF.fullmatch(path.name), {}, plain(read_arrays(path))
    if half is None or any(SIGNATURE[whole] in own for whole in ("big_vision", "openai", "hf")):
        return own
    for name in (f"{half[1]}{side}.npz" for side in ("vision", "text")):
        if not (path.parent / name).is_file():
            raise UserError(
                f"{path} is half of a TIPS, but its other half, {name}, is missing: put it in the same folder"
            )
        file = read_arrays(path.parent / name)
        files |= dict.fromkeys(file, file)
    return plain(Shards(files))


def in_folder(folder: Path) -> Path | None:
    """The one `.npz` model (or the first file of the one pair) in `folder`; None when there is none.

    Raises UserError when there are several.
    """
    files = sorted(file for file in folder.glob("*.npz") if file.is_file())
    models = {_HALF.sub(r"\1", file.name): file for file in files}
    if len(models) > 1:
        raise UserError(
            f"{folder} holds several models ({cut(', '.join(sorted(models)), 120)}): give the path of one's file"
        )
    return next(iter(models.values()), None)


def plain(arrays: Mapping[str, Any]) -> Mapping[str, Any]:
    """`arrays` without a training checkpoint's prefix, and with scanned layers apart."""
    names = list(arrays)
    kept = {key: key for key in names}
    for prefix in ("params/", "opt/target/"):
        if any(key.startswith(prefix) for key in names):  # what else a training step keeps is no weight
            kept = {
                key.removeprefix(prefix): key
                for key in names
                if key.startswith(prefix) or not key.startswith(("params/", *_OPTIMIZER))
            }
            break
    if {"temperature", "temperature_contrastive"} <= set(kept):  # TIPS' PyTorch files have one or the other, or both
        kept.pop("temperature")
    if "temperature_contrastive" in kept and "token_embedding.weight" in kept:
        kept["temperature"] = kept.pop("temperature_contrastive")
    out, shapes = {}, array_shapes(arrays)
    for name, key in kept.items():
        scanned = _SCANNED.fullmatch(name)
        if scanned is None:
            out[name] = key, None
        else:
            layers = shapes[key][0] if shapes[key] else 0
            out |= {f"{scanned[1]}_{i}{scanned[2]}": (key, i) for i in range(min(layers, 1024))}
    return Renamed(arrays, out)


def preprocess(config: CLIPConfig) -> Preprocess:
    """What the images of a family were like in training, where a checkpoint does not say it."""
    return dataclasses.replace(PREPROCESS[config.family], image_size=config.vision.image_size)


def from_shapes(shapes: Shapes, naming: Naming) -> CLIPConfig:
    """The architecture, every size of it from the arrays' shapes. Raises UserError where they are not of this kind."""
    read, kind = {
        "big_vision": (_siglip, "a SigLIP of big_vision's"),
        "tips": (_tips, "a TIPS of scenic's"),
        "tips_torch": (_tips_torch, "a TIPS of PyTorch's"),
    }[naming]
    try:
        return checked(read(shapes), "the weights")
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        missing = f", which lack {cut(error.args[0], 80)}" if isinstance(error, KeyError) else ""
        raise UserError(f"the weights are not {kind}{missing}: take the original file") from error


def _siglip(shapes: Shapes) -> CLIPConfig:
    if len(shapes["img/embedding/kernel"]) == 2 or any("patchln" in name for name in shapes):
        raise UserError(
            "the weights are SigLIP 2's NaFlex, which is another architecture (patches of any shape): take one of a "
            "fixed resolution, siglip2_b16_256.npz and the like"
        )
    if "txt/Encoder_0/encoder_norm/scale" not in shapes:
        raise UserError("a SigLIP has an image tower and a text tower, but the second is missing: take the whole file")
    if "img/MAPHead_0/probe" not in shapes:
        raise UserError(
            "the weights are a ViT of big_vision's without SigLIP's pooling head (MAPHead_0): that is another "
            "architecture, take a SigLIP"
        )
    patch, _, _, width = shapes["img/embedding/kernel"]
    vision = _flax_vit(shapes, "img/Transformer", shapes["img/pos_embedding"][1], patch, width, families.SIGLIP_VIT)
    _, context, text_width = shapes["txt/pos_embedding"]
    sizes = _flax_sizes(shapes, "txt/Encoder_0")
    text = TextConfig(shapes["txt/Embed_0/embedding"][0], context, text_width, *sizes, **families.SIGLIP_TEXT)
    return CLIPConfig(vision, text, shapes["txt/head/kernel"][1], logit_bias="b" in shapes)


def _tips(shapes: Shapes) -> CLIPConfig:
    place = "encoder/ToTokenSequence_0"
    _check_text(shapes, "token_emb/emb_var")
    patch, _, _, width = shapes[f"{place}/embedding/kernel"]
    _, rows, columns, _ = shapes[f"{place}/posembed_input"]
    fields = families.TIPS_VIT | {"class_tokens": shapes[f"{place}/cls"][1]}
    if rows != columns or fields["class_tokens"] < 2:
        raise ValueError
    vision = _flax_vit(shapes, "encoder/transformer", rows * columns, patch, width, fields)
    vocabulary, text_width = shapes["token_emb/emb_var"]
    sizes = _flax_sizes(shapes, "transformer")
    text = TextConfig(vocabulary, _CONTEXT, text_width, *sizes, **families.TIPS_TEXT)
    return CLIPConfig(vision, text, width)


def _check_text(shapes: Shapes, name: str) -> None:
    if name not in shapes:
        raise UserError(
            f"a TIPS is two files, got the image half alone (no {name}): put both into one folder, as "
            "NAME_vision.npz and NAME_text.npz"
        )


def _tips_torch(shapes: Shapes) -> CLIPConfig:
    _check_text(shapes, "token_embedding.weight")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    fields = families.TIPS_VIT | {"class_tokens": 1 + shapes["register_tokens"][1], "class_position": True}
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    mlp = shapes["blocks.0.mlp.w12.weight"][0] // 2 if swiglu else shapes["blocks.0.mlp.fc1.weight"][0]
    fields |= {"activation": "swiglu"} if swiglu else {}
    fields["layer_scale"] = "blocks.0.ls1.gamma" in shapes
    side = _side(shapes["pos_embed"][1] - 1)
    vision = ViTConfig(side * patch, patch, width, count(shapes, r"blocks\.(\d+)\."), _heads(width), mlp, **fields)
    vocabulary, text_width = shapes["token_embedding.weight"]
    layers = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    mlp = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    text = TextConfig(vocabulary, _CONTEXT, text_width, layers, _heads(text_width), mlp, **families.TIPS_TEXT)
    return CLIPConfig(vision, text, width)


def _flax_vit(shapes: Shapes, blocks: str, positions: int, patch: int, width: int, fields: dict[str, Any]) -> ViTConfig:
    if f"{blocks}/encoderblock_0/FFNSwiGluFused_0/Dense_0/kernel" in shapes:
        fields = fields | {"activation": "swiglu"}
    return ViTConfig(_side(positions) * patch, patch, width, *_flax_sizes(shapes, blocks), **fields)


def _flax_sizes(shapes: Shapes, blocks: str) -> tuple[int, int, int]:
    """Layers, heads, and the MLP's width."""
    first = f"{blocks}/encoderblock_0"
    mlp = f"{first}/FFNSwiGluFused_0" if f"{first}/FFNSwiGluFused_0/Dense_0/kernel" in shapes else f"{first}/MlpBlock_0"
    heads = shapes[f"{first}/MultiHeadDotProductAttention_0/query/kernel"][1]
    return count(shapes, rf"{blocks}/encoderblock_(\d+)/"), heads, shapes[f"{mlp}/Dense_0/kernel"][1]


def _side(positions: int) -> int:
    side = round(positions**0.5)
    if side < 1 or side**2 != positions:
        raise UserError(f"position embeddings are of a square grid, got {positions}: check the weights")
    return side


def _heads(width: int) -> int:
    return _SO400M[1] if width == _SO400M[0] else width // 64
