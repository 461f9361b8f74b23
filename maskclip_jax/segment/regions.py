"""The objects of a label map: connected regions, or all pixels of a class, with their boxes, areas and confidences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Integer
from scipy import ndimage

from maskclip_jax.errors import UserError

PER = ("region", "class")


class Region(NamedTuple):
    """Pixels of one class, in the box they just fit into."""

    index: int  # of the class
    y: int  # of the box's first row in the image
    x: int  # of its first column
    mask: Bool[np.ndarray, "h w"]
    area: int  # pixels
    confidence: float | None  # mean over its pixels; None where it is not known

    @property
    def box(self) -> tuple[slice, slice]:
        """The box's rows and columns in the image."""
        return slice(self.y, self.y + self.mask.shape[0]), slice(self.x, self.x + self.mask.shape[1])

    @property
    def xywh(self) -> list[int]:
        """The box as COCO writes it: left, top, width, height in pixels."""
        return [self.x, self.y, self.mask.shape[1], self.mask.shape[0]]


def first_object(classes: Sequence[str]) -> int:
    """The first class that is a thing to find: 1 where class 0 is the background, else 0."""
    return int(tuple(classes[:1]) == ("background",))


def find_regions(
    labels: Integer[np.ndarray, "H W"],
    classes: Sequence[str],
    confidence: Float32[np.ndarray, "H W"] | None = None,
    *,
    per: str = "region",
    min_area: int = 1,
    min_confidence: float = 0.0,
) -> list[Region]:
    """The regions of an image by class, and of a class by their first pixel, row after row.

    Args:
      labels: class indices; what is no class (255, 65535) and a background, class 0, belong to no region.
      classes: names; the first may be "background".
      confidence: probability of each pixel's class, NaN where it is not known.
      per: "region" (pixels that share an edge) or "class" (all pixels of one).
      min_area: in pixels; smaller ones are left out.
      min_confidence: a region's mean; less sure ones, and those without any, are left out.

    Raises:
      UserError: `per` is neither.
    """
    if per not in PER:
        raise UserError(f"objects are counted per {' or '.join(PER)}, got {per!r}: choose one")
    found = []
    boxes = ndimage.find_objects(labels.astype(np.int32) + 1, len(classes))
    for index in range(first_object(classes), len(classes)):
        if (box := boxes[index]) is None:
            continue
        parts, parts_boxes = labels[box] == index, [(slice(None), slice(None))]
        if per == "region":
            parts = np.empty(parts.shape, np.int32)
            ndimage.label(labels[box] == index, output=parts)
            parts_boxes = ndimage.find_objects(parts)
        for number, part in enumerate(parts_boxes, 1):
            mask = parts[part] == number
            if (area := int(np.count_nonzero(mask))) < min_area:
                continue
            y, x = (outer.start + (inner.start or 0) for outer, inner in zip(box, part, strict=True))
            region = Region(index, y, x, mask, area, None)
            if confidence is not None:
                mean = float(confidence[region.box][mask].mean(dtype=np.float64))
                region = region._replace(confidence=None if np.isnan(mean) else mean)
            if not min_confidence or (region.confidence is not None and region.confidence >= min_confidence):
                found.append(region)
    return found


def only_regions(
    labels: Integer[np.ndarray, "H W"], regions: Sequence[Region], classes: Sequence[str], left_out: int
) -> Integer[np.ndarray, "H W"]:
    """The label map of these regions: `left_out` where there was another, the background stays."""
    kept = np.full_like(labels, left_out)
    if first_object(classes):
        kept[labels == 0] = 0
    for region in regions:
        kept[region.box][region.mask] = region.index
    return kept


def as_detections(shape: tuple[int, int], regions: Sequence[Region], classes: Sequence[str]) -> dict[str, Any]:
    """Arguments of `supervision.Detections`; boxes end where the next pixel begins."""
    masks = np.zeros((len(regions), *shape), bool)
    for mask, region in zip(masks, regions, strict=True):
        mask[region.box] = region.mask
    sides = np.array([region.xywh for region in regions], np.float32).reshape(-1, 4)
    known = all(region.confidence is not None for region in regions)
    return {
        "xyxy": np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1),
        "mask": masks,
        "confidence": np.array([region.confidence for region in regions], np.float32) if known else None,
        "class_id": np.array([region.index for region in regions], int),
        "data": {"class_name": np.array([classes[region.index] for region in regions], str)},
    }
