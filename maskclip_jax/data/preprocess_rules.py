"""What may stand in the files that `Preprocess` is read from: transformers', open_clip's, a converted checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskclip_jax.data import schema
from maskclip_jax.errors import UserError

_FILTERS = ("bilinear", "bicubic")
_HF_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # the integers of preprocessor_config.json are Pillow's


def _size(size: Any) -> Any:
    """224, {"shortest_edge": 224}, {"height": 224, "width": 224} or [224, 224] -> 224; None when it has two sides."""
    sides = size
    if isinstance(size, Mapping):
        sides = [size[key] for key in ("shortest_edge", "height", "width") if key in size] or list(size.values())
        if size and set(size) <= {"longest_edge", "max_height", "max_width"}:  # a cap: the side follows from the image
            return schema.UNFIT if any(_SIDE.read(side) is schema.UNFIT for side in sides) else None
    sides = list(sides) if isinstance(sides, list | tuple) else [sides]
    fits = 1 <= len(sides) <= 2 and all(_SIDE.read(side) == sides[0] for side in sides)
    return sides[0] if fits else schema.UNFIT


_SIDE = schema.whole(1, 16384)
_STATISTICS = schema.several(schema.number(-1e6, 1e6), 3, 3)
_SIZE = schema.optional(schema.Rule(f"{_SIDE.words}, or a square", _size))
HF_RULES = {
    "image_mean": _STATISTICS,
    "image_std": _STATISTICS,
    "resample": schema.Rule(
        "2 or 3 (bilinear, bicubic)", lambda x: _HF_RESAMPLE.get(x, schema.UNFIT) if type(x) is int else schema.UNFIT
    ),
    "size": _SIZE,
    "do_normalize": schema.optional(schema.FLAG),
    "do_rescale": schema.optional(schema.FLAG),
    "rescale_factor": schema.optional(schema.number(-1e6, 1e6)),
}
OPEN_CLIP_RULES = {
    "size": _SIZE,
    "mode": schema.one_of("RGB"),
    "mean": _STATISTICS,
    "std": _STATISTICS,
    "interpolation": schema.one_of(*_FILTERS),
    "resize_mode": schema.text(),
    "fill_color": schema.Rule("a colour", lambda x: x),
}
OWN_RULES = {
    "mean": _STATISTICS,
    "std": _STATISTICS,
    "interpolation": schema.one_of(*_FILTERS),
    "short_side": schema.optional(_SIDE),
    "long_side": schema.optional(_SIDE),
    "within": schema.optional(schema.several(_SIDE, 2, 2)),
    "multiple": _SIDE,
    "image_size": schema.optional(_SIDE),
}


def hf_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Preprocess` from a `preprocessor_config.json`; see `Preprocess.from_hf`."""
    needed = ("image_mean", "image_std", "resample")
    given = schema.fields(config, HF_RULES, "preprocessor_config.json", needed)
    for key, rule in (("do_normalize", "normalise"), ("do_rescale", "rescale by 1/255")):
        if given.get(key) is False:
            raise UserError(f"preprocessor_config.json must {rule}, but {key} is false: set it to true")
    factor = given.get("rescale_factor")
    if factor is not None and abs(factor * 255 - 1) > 1e-5:
        raise UserError(f"rescale_factor must be 1/255, got {factor}: correct the config")
    fields = {"mean": given["image_mean"], "std": given["image_std"], "interpolation": given["resample"]}
    return fields | {"image_size": given.get("size")}


def open_clip_fields(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Preprocess` from the `preprocess_cfg` of an `open_clip_config.json`."""
    given = schema.fields(preprocess_cfg, OPEN_CLIP_RULES, "preprocess_cfg", ("mean", "std"), only=True)
    # The files that OpenAI's weights come with leave these two out; open_clip then resizes bicubically.
    fields = {"interpolation": given.get("interpolation", "bicubic"), "image_size": given.get("size")}
    return fields | {"mean": given["mean"], "std": given["std"]}


def own_fields(content: Any, where: str) -> dict[str, Any]:
    """Fields of a `Preprocess` from what `dataclasses.asdict` made of one."""
    return schema.fields(content, OWN_RULES, where, needed=("mean", "std"), only=True)
