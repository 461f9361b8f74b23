"""A region as run lengths: COCO's compressed string, and Label Studio's brush. Both by their decoders' definition."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt8

from maskclip_jax.segment.regions import Region

_SIZES = np.array([3, 4, 8, 16])  # bits of a length in a brush: the header says so
_LONGEST = 2**16


def coco_counts(region: Region, height: int, width: int) -> str:
    """`counts` of a COCO mask, as `pycocotools.mask.encode` writes it (maskApi.c, rleToString).

    Lengths of runs down the columns, the first of zeros, from the fourth on as the difference to the one before the
    last; five bits a character, the sixth says that more follow.
    """
    runs = _runs(region, height, width, columns=True)
    counts = np.diff(runs.ravel(), prepend=0, append=height * width)
    counts = counts[:-1] if counts[-1] == 0 else counts
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    characters, more = [], np.ones(len(rest), bool)
    while more.any():
        low, rest = rest & 31, rest >> 5
        going = more & np.where(low & 16, rest != -1, rest != 0)
        characters.append(np.where(more, low + 48 + 32 * going, 0))
        more = going
    flat = np.stack(characters, 1).ravel()
    return flat[flat > 0].astype(np.uint8).tobytes().decode("ascii")


def brush(region: Region, height: int, width: int) -> list[int]:
    """`rle` of a Label Studio brush: bytes of @thi.ng/rle-pack over RGBA pixels, of which a region's are 255.

    The header has the number of values (32 bits), bits of a value less 1 (5), and of the four kinds of length (4 each);
    a run has a 1, the kind of its length (2), its length less 1, and its value (8).
    """
    ends = np.append(4 * _runs(region, height, width, columns=False).ravel(), 4 * height * width)
    lengths = np.diff(ends, prepend=0)
    pieces = -(-lengths // _LONGEST)  # none of a run without length
    values = np.repeat(np.arange(len(lengths)) % 2 * 255, pieces)
    last = np.cumsum(pieces)[pieces > 0] - 1
    cut = np.full(pieces.sum(), _LONGEST)
    cut[last] = (lengths - (pieces - 1) * _LONGEST)[pieces > 0]
    kind = np.searchsorted([8, 16, 256], cut)
    used = 3 + _SIZES[kind] + 8
    tokens = ((4 + kind) << (_SIZES[kind] + 8)) + ((cut - 1) << 8) + values
    bits = _bits((tokens << (32 - used)).astype(">u4")).reshape(-1, 32)
    head = np.array([4 * height * width, (7 << 27) + (2 << 23) + (3 << 19) + (7 << 15) + (15 << 11)], ">u4")
    return np.packbits(np.concatenate([_bits(head)[:53], bits[np.arange(32) < used[:, None]]])).tolist()


def _bits(words: np.ndarray) -> UInt8[np.ndarray, " n"]:
    return np.unpackbits(words.view(np.uint8))


def _runs(region: Region, height: int, width: int, *, columns: bool) -> Int64[np.ndarray, "n 2"]:
    """[start, end) of the region's runs in the flat image, column after column or row after row."""
    mask, line, first, before = region.mask, width, region.y, region.x
    if columns:
        mask, line, first, before = region.mask.T, height, region.x, region.y
    lines, places = np.nonzero(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)))
    bounds = ((lines + first) * line + places + before).reshape(-1, 2)
    apart = bounds[1:, 0] != bounds[:-1, 1]  # a run that ends with its line may go on in the next
    return np.stack([bounds[np.append(True, apart), 0], bounds[np.append(apart, True), 1]], 1)
