"""Shape buckets: many image sizes, few compiled programs.

A program is compiled for each input shape. Padding every image to one of a few shapes bounds the compiles, and costs
the arithmetic of the padding; the padding is masked, so results do not change. Which shape an image gets follows from
the sizes that are given and from how images are resized, never from what was asked before.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

Shape = tuple[int, int]

MOST_SHAPES = 8  # for images that are not resized at all
_FEW_CELLS = 4
_ASPECTS = (1, 50 / 33, 3 ** (2 / 3), 3)  # 3:2 with room for its rounding; beyond 3 in steps of 3^(1/3)
_LYING = (1, 4 / 3, *_ASPECTS[1:])


def bucket_shape(
    height: int, width: int, multiple: int, *, short_side: int | None = None, within: Shape | None = None
) -> Shape:
    """The smallest shape of a fixed ladder that holds an image: the same answer in every process, no memory needed.

    With `short_side` the long side is the short one times 1, 1.52, 2.08 or 3, of lying images also 4/3, which
    most photographs have: 8 shapes between aspect 1:3 and 3:1 (times 3^k where the short side has under four cells:
    such a program runs faster than it compiles). With `within`, each side is the frame's divided by 3^(k/4): 9 shapes.
    With neither, both sides climb in steps of 3^(1/3), from one cell.

    Args:
      height, width: of the image in pixels.
      multiple: sides of the result are multiples of this many pixels (patch or stride).
      short_side: the short side in pixels that most images have, or None.
      within: height and width in pixels of the frame that images fill in one direction, or None.
    """
    cells = [math.ceil(side / multiple) for side in (height, width)]
    if within is not None:
        frame = (math.ceil(side / multiple) for side in within)
        return tuple(multiple * _climb_down(*sides) for sides in zip(frame, cells, strict=True))
    short, long = sorted(cells)
    usual = 0 if short_side is None else math.ceil(short_side / multiple)
    short = usual if usual / 2 <= short <= usual else _climb(1, short)
    if 0 < usual < _FEW_CELLS:
        long = _climb(short, long, 3.0)
    else:
        rungs = [math.ceil(short * aspect - 1e-9) for aspect in (_LYING if height <= width else _ASPECTS)]
        long = next((rung for rung in rungs if rung >= long), None) or _climb(short, long)
    short, long = short * multiple, long * multiple
    return (short, long) if height <= width else (long, short)


def bucket_shapes(
    sizes: Sequence[Shape], multiple: int, *, short_side: int | None = None, within: Shape | None = None
) -> list[Shape]:
    """`bucket_shape` of every (height, width); where no side is known before, at most `MOST_SHAPES` for them all.

    Then each has its own shape, or if there are too many, they share those that pad them least (`merged_shapes`). One
    image alone tells nothing about the next and gets a shape with room around it, so that a stream of them has few as
    well: up to 512 pixels a square, else a power of two by itself or its half.
    """
    if short_side is not None or within is not None:
        return [bucket_shape(*size, multiple, short_side=short_side, within=within) for size in sizes]
    if len(sizes) == 1:
        sizes = [_roomy(*sizes[0])]
    cells = [tuple(math.ceil(side / multiple) for side in size) for size in sizes]
    if len(set(cells)) > MOST_SHAPES:
        rungs = [tuple(_climb(1, side, 3 ** (1 / 8)) for side in size) for size in cells]
        shapes = merged_shapes(Counter(rungs), MOST_SHAPES)
        cells = [min((s for s in shapes if s[0] >= h and s[1] >= w), key=lambda s: (s[0] * s[1], s)) for h, w in rungs]
    return [(multiple * h, multiple * w) for h, w in cells]


def merged_shapes(counts: Counter[Shape], limit: int) -> list[Shape]:
    """At most `limit` shapes that hold all given ones: merges the pair that adds least area until few enough are left.

    `counts`: how many images have each shape (some dozens of shapes: this is cubic in their number).
    """
    clusters = sorted(counts.items())
    while len(clusters) > limit:
        pairs = itertools.combinations(range(len(clusters)), 2)
        i, j = min(pairs, key=lambda pair: _added_area(clusters[pair[0]], clusters[pair[1]]))
        (a, n_a), (b, n_b) = clusters[i], clusters[j]
        merged = (max(a[0], b[0]), max(a[1], b[1])), n_a + n_b
        clusters = [cluster for k, cluster in enumerate(clusters) if k not in (i, j)] + [merged]
    return sorted(shape for shape, _ in clusters)


def _added_area(first: tuple[Shape, int], second: tuple[Shape, int]) -> int:
    (a, n_a), (b, n_b) = first, second
    merged = max(a[0], b[0]) * max(a[1], b[1])
    return n_a * (merged - a[0] * a[1]) + n_b * (merged - b[0] * b[1])


def _roomy(height: int, width: int) -> Shape:
    """Pixels: 2·4^k square up to 512, then a power of two for the long side, and that or its half for the short one."""
    exponent = (max(height, width) - 1).bit_length()
    if exponent <= 9:
        return (1 << (exponent | 1),) * 2
    return tuple(1 << exponent - (side <= 1 << exponent - 1) for side in (height, width))


def _climb(start: int, value: int, step: float = 3 ** (1 / 3)) -> int:
    """The first of ⌈start · step^k⌉, k = 0, 1, …, that reaches `value`."""
    return next(rung for k in itertools.count() if (rung := math.ceil(start * step**k - 1e-9)) >= value)


def _climb_down(start: int, value: int) -> int:
    """The last of ⌈start / 3^(k/4)⌉, k = 0, 1, …, that reaches `value`."""
    rungs = (math.ceil(start / 3 ** (k / 4) - 1e-9) for k in range(math.ceil(4 * math.log(start, 3)) + 1))
    return min((rung for rung in rungs if rung >= value), default=value)
