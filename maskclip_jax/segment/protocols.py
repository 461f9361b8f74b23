"""How each paper reads an image and scores it, as `Options`.

    segment_images(images, classes, clip, protocol_options("sclip"))

Numbers are those of the methods' public code (ViT-B/16). What depends on the data set is VOC's, or said in `note`.
"""

from __future__ import annotations

import dataclasses

from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options


@dataclasses.dataclass(frozen=True)
class Protocol(Options):
    """A paper's options; `note` says what a data set changes, and what is left out here."""

    note: str = ""


# Sliding windows over images of short side 336, a row for every synonym: what SCLIP began, and others follow.
_SLIDING = {"templates": "imagenet", "synonyms": "max", "window": 224, "stride": 112}
# LPOSS: LAION's ViT-B/16 beside DINO's B/16, whose last values make S (here: its tokens).
_LPOSS = _SLIDING | {
    "short_side": 448,
    "method": "lposs",
    "affinity": "facebook/dino-vitb16",
    "probability_scale": 100.0,
}
PROTOCOLS: dict[str, Protocol] = {
    "maskclip": Protocol("maskclip", 512, note="VOC and COCO-Stuff, long side at most 2048"),
    "maskclip-context": Protocol("maskclip", within=(520, 520), note="Pascal Context"),
    "sclip": Protocol(
        **_SLIDING,
        short_side=336,
        method="sclip",
        probability_scale=40.0,
        background_threshold=0.1,
        note="COCO-Stuff: short side 448, Cityscapes 560; VOC21: scale 65, small areas dropped (not done here)",
    ),
    "clearclip": Protocol(
        **_SLIDING | {"window": 448, "stride": 224},
        short_side=448,
        method="clearclip",
        probability_scale=50.0,
        background_threshold=0.5,
        note="Context60: threshold 0.15",
    ),
    "naclip": Protocol(
        **_SLIDING, short_side=336, method="naclip", probability_scale=40.0, background_threshold=0.1, pamr=10
    ),
    "sc_clip": Protocol(
        **_SLIDING,
        short_side=336,
        method="sc_clip",
        probability_scale=40.0,
        background_threshold=0.15,
        note="Cityscapes 560; VOC21: scale 50, small areas dropped (not done here)",
    ),
    "clip_surgery": Protocol(
        "maskclip",
        512,
        method="clip_surgery",
        note="the mean over classes that it subtracts changes neither the largest class nor a softmax",
    ),
    "tipsv2": Protocol(
        "tcl",
        448,
        window=448,
        stride=336,
        window_mean="probabilities",
        note="ADE20K (150 names): TIPSv2 B 17.4, L 24.7, So400m 23.3, g 17.8 mIoU as published",
    ),
    "proxyclip": Protocol(
        **_SLIDING | {"window": 336},
        short_side=336,
        method="proxyclip",
        affinity="facebook/dino-vitb8",
        probability_scale=40.0,
        background_threshold=0.2,
        note="Context60: threshold 0.15; ADE20K: short side 448; the authors read values on DINO's finer grid",
    ),
    "clip_dinoiser": Protocol(
        "imagenet",
        448,
        window=448,
        stride=224,
        synonyms="max",
        method="clip_dinoiser",
        affinity="facebook/dino-vitb16",
        probability_scale=100.0,
        note="LAION's ViT-B/16; S from DINO's tokens, where the authors' learned layers stand for its last values",
    ),
    "lposs": Protocol(**_LPOSS, note="propagates within a window, the authors over all of them"),
    "lposs+": Protocol(**_LPOSS, spread=10, note="as lposs; over the original image's pixels, the authors over 448's"),
    "gem": Protocol("single", 448, method="gem", probability_scale=100.0, background_threshold=0.85),
}


def protocol_options(name: str, *, background: bool = False) -> Protocol:
    """The options of a protocol.

    Args:
      name: one of `PROTOCOLS`.
      background: whether the classes include a background, to which the protocol's threshold applies.

    Raises:
      UserError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"a protocol is one of {', '.join(PROTOCOLS)}, not {name!r}: choose one of them")
    found = PROTOCOLS[name]
    return found if background else dataclasses.replace(found, background_threshold=None)
