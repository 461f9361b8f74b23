"""What may stand in the files that `Preprocess` is read from: transformers', open_clip's, a converted checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskclip_jax.data import schema

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
