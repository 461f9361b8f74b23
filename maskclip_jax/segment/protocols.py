"""How each paper reads an image and scores it, as options of `prediction_settings`.

    segment_images(images, classes, clip, **protocol_options("sclip"))

Numbers are those of the methods' public code (ViT-B/16). What depends on the data set is VOC's, or said in `note`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from maskclip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Options of `prediction_settings` by their names there; `background_threshold` counts where there is a background.

    `note` says what a data set changes, and what is left out here.
    """

    method: str
    short_side: int | None
    window: int | None = None
    stride: int | None = None
    templates: str = "imagenet"
    synonyms: str = "max"
    probability_scale: float | None = None
    background_threshold: float | None = None
    pamr: int = 0
    within: tuple[int, int] | None = None
    note: str = ""


PROTOCOLS = {
    "maskclip": Protocol(
        "maskclip", 512, templates="maskclip", synonyms="mean", note="VOC and COCO-Stuff, long side at most 2048"
    ),
    "maskclip-context": Protocol(
        "maskclip", None, templates="maskclip", synonyms="mean", within=(520, 520), note="Pascal Context"
    ),
    "sclip": Protocol(
        "sclip",
        336,
        224,
        112,
        probability_scale=40.0,
        background_threshold=0.1,
        note="COCO-Stuff: short side 448, Cityscapes 560; VOC21: scale 65, small areas dropped (not done here)",
    ),
    "clearclip": Protocol(
        "clearclip",
        448,
        448,
        224,
        probability_scale=50.0,
        background_threshold=0.5,
        note="Context60: threshold 0.15",
    ),
    "naclip": Protocol("naclip", 336, 224, 112, probability_scale=40.0, background_threshold=0.1, pamr=10),
    "clip_surgery": Protocol(
        "clip_surgery",
        512,
        templates="maskclip",
        synonyms="mean",
        note="the mean over classes that it subtracts changes neither the largest class nor a softmax",
    ),
    "gem": Protocol(
        "gem", 448, templates="single", synonyms="mean", probability_scale=100.0, background_threshold=0.85
    ),
}


def protocol_options(name: str, *, background: bool = False) -> dict[str, Any]:
    """Keyword arguments for `prediction_settings` and `segment_images`; None where they have their defaults.

    Args:
      name: one of `PROTOCOLS`.
      background: whether the classes include a background, to which the protocol's threshold applies.

    Raises:
      UserError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"a protocol is one of {', '.join(PROTOCOLS)}, not {name!r}: choose one of them")
    options = dataclasses.asdict(PROTOCOLS[name])
    del options["note"]
    if not background:
        options["background_threshold"] = None
    return options
