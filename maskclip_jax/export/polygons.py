"""A region as one polygon, holes joined to the outline by slits of no width: YOLO's rows have no other way.

The outline follows the pixels' edges, drawn in by `INSET`: whoever fills the points' pixels (`cv2.fillPoly` of
truncated coordinates, as Ultralytics does) and whoever fills what lies within (by pixel centres) both get the region.
"""

from __future__ import annotations

import collections

import numpy as np
from jaxtyping import Bool, Float, Int

from maskclip_jax.segment.regions import Region

INSET = 0.02  # pixels: more than seven decimals of an image of 65,535 lose
_SLIT = 0.3  # of a pixel, from its upper edge


def polygon(region: Region) -> Float[np.ndarray, "n 2"]:
    """(x, y) of a connected region's corners in pixels of the image, 0..W and 0..H.

    Corners where pixels touch by a point alone belong to one pixel each, as they do in a region joined by edges.
    """
    x, y, right, down, inwards = corners = _corners(region.mask)
    points = np.stack([x + INSET * inwards * right, y + INSET * inwards * down], 1).tolist()
    # Along a row, corners end an edge to their left or begin one to their right: neighbours in turn. In a column too.
    order = np.lexsort((down, y, x))
    level, upright = _pairs(np.lexsort((right, x, y))), _pairs(order)
    outline, *holes = _rings(level, upright)
    uppers = order[::2]  # the upper ends of upright edges
    places = x[uppers] * (len(region.mask) + 1) + y[uppers]
    joined = collections.defaultdict(list)  # by an edge's upper end: (height, way to a hole, round it and back)
    x, y = x.tolist(), y.tolist()

    def walk(ring: list[int]) -> list[list[float]]:
        path = []
        for first, second, third in zip(ring[::2], ring[1::2], [*ring[2::2], ring[0]], strict=True):
            path += [points[first], points[second]]
            up = y[third] < y[second]
            for _, way in sorted(joined.get(third if up else second, ()), reverse=up):
                path += way
        return path

    starts = [min(range(0, len(ring), 2), key=lambda k: (x[ring[k]], y[ring[k]], 1)) for ring in holes]
    for hole, start in sorted(zip(holes, starts, strict=True), key=lambda pair: -x[pair[0][pair[1]]]):
        ring = hole[start:] + hole[:start]  # ends with its leftmost upright edge: nothing is joined to that
        left, row = x[ring[0]], min(y[ring[0]], y[ring[-1]])
        outside = np.flatnonzero(~region.mask[row, :left])
        edge, height = int(outside[-1]) + 1 if len(outside) else 0, row + _SLIT
        near, far = [edge + INSET, height], [left - INSET, height]
        at = np.searchsorted(places, edge * (len(region.mask) + 1) + row, "right") - 1
        joined[int(uppers[at])].append((height, [near, far, *walk(ring), far, near]))
    return np.array(walk(outline)) + [region.x, region.y]


def _rings(level: list[int], upright: list[int]) -> list[list[int]]:
    """Closed ways along level and upright edges in turn, the outline first: the first corner, in the first row, is its."""
    rings, waiting = [], [True] * len(level)
    for start in range(len(level)):
        ring, place = [], start
        while waiting[place]:
            ring += [place, level[place]]
            waiting[place] = waiting[level[place]] = False
            place = upright[level[place]]
        if ring:
            rings.append(ring)
    return rings


def _corners(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "5 n"]:
    """Where the boundary turns, row after row: x, y, the sides its edges lie on (±1), and whether that pixel is in."""
    padded, found = np.pad(mask, 1), []
    for down in (-1, 1):
        for right in (-1, 1):  # the pixel on this side of every point where four meet
            here, beside = _side(padded, down, right), _side(padded, down, -right)
            above, across = _side(padded, -down, right), _side(padded, -down, -right)
            for turns, inwards in ((here & ~beside & ~above, 1), (~here & beside & above & across, -1)):
                y, x = np.nonzero(turns)
                found.append(np.stack([x, y, *(np.full(len(x), side) for side in (right, down, inwards))]))
    corners = np.concatenate(found, 1)
    return corners[:, np.lexsort(corners[:2])]


def _side(padded: Bool[np.ndarray, "h2 w2"], down: int, right: int) -> Bool[np.ndarray, "h1 w1"]:
    (height, width), y, x = padded.shape, (down + 1) // 2, (right + 1) // 2
    return padded[y : y + height - 1, x : x + width - 1]


def _pairs(order: Int[np.ndarray, " n"]) -> list[int]:
    """Who each is a pair with, where the first and second, third and fourth … of an order are pairs."""
    partner = np.empty(len(order), int)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner.tolist()
