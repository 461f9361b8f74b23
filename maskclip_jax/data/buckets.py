"""Shape buckets: many image sizes, few compiled programs.

A program is compiled for each input shape. Padding every image to one of a few shapes bounds the compiles, and costs
the arithmetic of the padding; the padding is masked, so results do not change.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

Shape = tuple[int, int]

_STEP = 3 ** (1 / 3)  # three steps triple a side: aspect ratios 1:3 to 3:1 need 4 lengths, so 7 shapes
_MOST_CANDIDATES = 64  # the merging below is cubic in the number of distinct shapes


def bucket_shape(height: int, width: int, multiple: int, *, short_side: int | None = None) -> Shape:
    """The smallest shape of a fixed ladder that holds an image: the same answer in every process, no memory needed.

    The long side is the short one times 3^(k/3). The short side is `short_side` where the image has it (512 px data
    sets: 7 shapes between aspect 1:3 and 3:1), else it climbs the same ladder, from one cell.

    Args:
      height, width: of the image in pixels.
      multiple: sides of the result are multiples of this many pixels (patch or stride).
      short_side: the short side in pixels that most images have, or None.
    """
    short, long = (math.ceil(side / multiple) for side in sorted((height, width)))
    usual = math.ceil(short_side / multiple) if short_side is not None else 0
    short = usual if usual / 2 < short <= usual else _climb(1, short)
    long = _climb(short, long)
    short, long = short * multiple, long * multiple
    return (short, long) if height <= width else (long, short)


class ShapeBuckets:
    """At most `limit` shapes for whatever comes: looks at the sizes of each request, remembers the shapes it gave.

    A request is rounded to shapes that exist when that costs little, and else to new ones chosen to waste the least
    area. The last two are kept for later requests and are then large squares, so that a stream of single images of
    any size stays within the limit, unless a side more than doubles past all that came before, again and again.
    """

    def __init__(self, multiple: int, *, short_side: int | None = None, limit: int = 8, tolerance: float = 0.3):
        """`multiple` and `short_side` as in `bucket_shape`, whose ladder single images climb when `short_side` is set;
        `tolerance`: extra area, as a fraction, at which an existing shape is good enough."""
        if limit < 4:
            raise ValueError(f"a bucket limit is at least 4 (two are kept in reserve), got {limit}")
        self.multiple, self.short_side, self.limit, self.tolerance = multiple, short_side, limit, tolerance
        self.shapes: list[Shape] = []

    def assign(self, sizes: Sequence[Shape]) -> list[Shape]:
        """Bucket shape (multiples of `multiple`, in pixels) for every (height, width) in `sizes`."""
        counts = Counter((self._round(height), self._round(width)) for height, width in sizes)
        waiting = Counter({shape: n for shape, n in counts.items() if not self._fits(shape, 1 + self.tolerance)})
        free = self.limit - len(self.shapes) - 2
        if len(counts) == len(waiting) == 1 and free > -1 and self.short_side is not None:
            # A stream of single images tells nothing about the next: leave room around this one. The ladder has seven
            # shapes between aspect 1:3 and 3:1, so it may use one of the two in reserve.
            rung = bucket_shape(*next(iter(waiting)), self.multiple, short_side=self.short_side)
            if rung not in self.shapes:  # it may be there and waste more than `tolerance`: the ladder has no closer one
                self.shapes.append(rung)
        elif waiting and free > 0:
            self.shapes += plan_buckets(waiting, free, self.multiple)
        elif any(not self._fits(shape) for shape in waiting):
            side = max(max(shape) for shape in waiting if not self._fits(shape))
            side = self._round(2 ** math.ceil(math.log2(side)))
            self.shapes.append((side, side))
        return [self._fits((self._round(height), self._round(width))) for height, width in sizes]

    def _fits(self, shape: Shape, most: float = math.inf) -> Shape | None:
        """The smallest existing shape that holds `shape` within `most` times its area."""
        area = shape[0] * shape[1]
        holding = [s for s in self.shapes if s[0] >= shape[0] and s[1] >= shape[1] and s[0] * s[1] <= most * area]
        return min(holding, key=lambda s: (s[0] * s[1], s), default=None)

    def _round(self, side: int) -> int:
        return math.ceil(side / self.multiple) * self.multiple


def plan_buckets(counts: Mapping[Shape, int], limit: int, multiple: int) -> list[Shape]:
    """At most `limit` shapes that hold all given shapes, chosen greedily to pad the least area.

    Starts with a bucket per shape and merges the pair that adds the least padding until few enough are left.

    Args:
      counts: how many images have each shape (multiples of `multiple`, in pixels).
      limit: at least 1.
    """
    coarse = multiple
    while len(counts) > _MOST_CANDIDATES:  # thousands of sizes: look at them through a coarser grid first
        coarse *= 2
        rounded: Counter[Shape] = Counter()
        for (height, width), n in counts.items():
            rounded[math.ceil(height / coarse) * coarse, math.ceil(width / coarse) * coarse] += n
        counts = rounded
    clusters = sorted(counts.items())
    while len(clusters) > limit:
        _, i, j = min(
            (_added_area(clusters[i], clusters[j]), i, j)
            for i in range(len(clusters))
            for j in range(i + 1, len(clusters))
        )
        (a, n_a), (b, n_b) = clusters[i], clusters[j]
        merged = (max(a[0], b[0]), max(a[1], b[1])), n_a + n_b
        clusters = [cluster for k, cluster in enumerate(clusters) if k not in (i, j)] + [merged]
    return sorted(shape for shape, _ in clusters)


def _added_area(first: tuple[Shape, int], second: tuple[Shape, int]) -> int:
    (a, n_a), (b, n_b) = first, second
    merged = max(a[0], b[0]) * max(a[1], b[1])
    return n_a * (merged - a[0] * a[1]) + n_b * (merged - b[0] * b[1])


def _climb(start: int, value: int) -> int:
    """The first of ⌈start · 3^(k/3)⌉, k = 0, 1, …, that reaches `value`."""
    steps = 0
    while (rung := math.ceil(start * _STEP**steps - 1e-9)) < value:
        steps += 1
    return rung
