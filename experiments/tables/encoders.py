"""Every encoder by every reading: CLIP, SigLIP 2 and TIPSv2 × MaskCLIP and its training-free successors.

    python -m experiments.tables.encoders                                     no download; the records hold the seconds
    python -m experiments.tables.encoders --scale full --only ade150/tips_v2_b14/

Published (mIoU, ADE20K, MaskCLIP's reading by TIPSv2's protocol): TIPSv2 B 17.4, L 24.7, So400m 23.3, g 17.8; of CLIP
ViT-B/16, see successors.py. The rest of the full table is nobody's yet. Nothing of it was run here: checkpoints (hub
ids, and folders in checkpoints/ with TIPS' two files and tokenizer) and data sets are the user's to download. TIPS is
read by TIPSv2's protocol, CLIP and SigLIP by that of each method's paper; a score without its protocol means nothing.
Here the embedded CLIPs read scenes in a style that they have not seen: experiments/README.md.
"""

from __future__ import annotations

import sys
from typing import Any

from experiments.harness import records
from experiments.harness.figures import Figure
from experiments.harness.records import Cell, Found, Settings, beside, score, table
from experiments.harness.scoring import protocol_cell
from experiments.tables import successors
from maskclip_jax.encoders.dense import ALONE, METHODS
from maskclip_jax.segment.protocols import PROTOCOLS, protocol_options

NAME = "encoders"
TITLE = "Every encoder by every reading"
SCENES = 100
DATA = (*successors.FULL, "ade150")
ENCODERS = {
    "clip_b16": "openai/clip-vit-base-patch16",
    "clip_l14": "openai/clip-vit-large-patch14",
    "clip_rn50": "timm/resnet50_clip.openai",
    "siglip_b16": "google/siglip-base-patch16-512",
    "siglip2_b16": "google/siglip2-base-patch16-512",
    "siglip2_l16": "google/siglip2-large-patch16-512",
    "siglip2_so400m16": "google/siglip2-so400m-patch16-512",
    "siglip2_g16": "google/siglip2-giant-opt-patch16-384",
    "tips_v2_b14": "checkpoints/tips_v2_b14",
    "tips_v2_l14": "checkpoints/tips_v2_l14",
    "tips_v2_so400m14": "checkpoints/tips_v2_so400m14",
    "tips_v2_g14": "checkpoints/tips_v2_g14",
}
PUBLISHED: dict[str, float | str | None] = {
    "ade150/tips_v2_b14/maskclip": 17.4,
    "ade150/tips_v2_l14/maskclip": 24.7,
    "ade150/tips_v2_so400m14/maskclip": 23.3,
    "ade150/tips_v2_g14/maskclip": 17.8,
    "ade150/clip_b16/maskclip": "9.8 to 11.9",  # in several papers
    "cocostuff171/clip_l14/sc_clip": 26.9,
}
PAIRED = {"proxyclip": (80.3, 39.1, 26.5), "clip_dinoiser": (80.9, 35.9, 24.6), "lposs": (78.8, 37.8, 25.9)}
PUBLISHED |= {
    f"{data}/clip_b16/{method}": values[i]
    for method, values in (successors.PUBLISHED | PAIRED).items()
    for i, data in enumerate(successors.FULL)
}


def methods_of(encoder: str) -> list[str]:
    """Those that read it; a second backbone is asked at full size alone."""
    methods = successors.methods_of("resnet" if encoder in ("resnet", "clip_rn50") else "vit")
    return methods if encoder in successors.MODELS else [m for m in METHODS if m in methods or METHODS[m].affinity]


def full_options(encoder: str, method: str) -> dict[str, Any]:
    """TIPSv2's protocol for TIPS, for others that of the method."""
    if encoder.startswith("tips"):
        asked = {"affinity": PROTOCOLS[method].affinity} if method in successors.ASKING else {}
        return protocol_options("tipsv2").changed() | {"method": method} | asked
    return successors.full_options(method)


def cells(settings: Settings) -> list[Cell]:
    if settings.scale == "full":
        methods = {encoder: [*methods_of(encoder), *successors.ASKING] for encoder in ENCODERS}
        keys = [(data, encoder, method) for data in DATA for encoder in ENCODERS for method in methods[encoder]]
        return [
            protocol_cell("/".join(key), ENCODERS[key[1]], key[0], None, full_options(*key[1:]))._replace(
                published=PUBLISHED.get("/".join(key))
            )
            for key in keys
        ]
    count = settings.scenes(SCENES)
    return [
        protocol_cell(f"{short}/{method}", model, "twemoji", count, {"method": method})
        for short, model in successors.MODELS.items()
        for method in methods_of(short)
    ]


def blocks(settings: Settings, found: dict[str, Found]) -> list[str | Figure]:
    """A row for each encoder, a column for each method; at full size a table for each data set."""
    if settings.scale == "full":
        out: list[str | Figure] = ["Published / ours, mIoU in %; a row's empty cells are filled by its command.\n"]
        for data in DATA:
            rows = [_row(found, data, encoder) for encoder in ENCODERS]
            out += [f"{data}:\n", table([("", *METHODS, "to fill it"), *rows])]
        return out
    count = max(f.cell.config["count"] for f in found.values())
    rows = [
        (short, *(score(found, f"{short}/{m}") if m in methods_of(short) else "" for m in ALONE))
        for short in successors.MODELS
    ]
    note = (
        f"mIoU in % on {count} scenes in Twemoji's style, which neither model has seen, 66 names as prompts, images "
        "whole. SigLIP and TIPS have no embedded model: see `--scale full`.\n"
    )
    return [note, table([("", *ALONE), *rows])]


def _row(found: dict[str, Found], data: str, encoder: str) -> tuple[Any, ...]:
    keys = [f"{data}/{encoder}/{method}" for method in METHODS]
    empty = any(key in found and found[key].record is None for key in keys)
    command = f"`python -m experiments.tables.{NAME} --scale full --only {data}/{encoder}/`" * empty
    return (encoder, *(beside(found, key) for key in keys), command)


if __name__ == "__main__":
    records.main(sys.modules[__name__])
