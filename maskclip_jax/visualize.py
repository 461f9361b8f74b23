"""Masks for people: overlays with a legend, comparison sheets, heat maps. uint8 RGB in, uint8 RGB out, on the host."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw

from maskclip_jax.data import vocabulary
from maskclip_jax.data.fonts import Font, default_font, lettering
from maskclip_jax.data.images import IGNORE, IGNORE_16
from maskclip_jax.errors import UserError

_INK, _FAINT, _PAPER = (24, 24, 28), (104, 104, 112), (255, 255, 255)
_ROWS = 128
_GAP = 8  # pixels between things on a sheet
_HEAT = np.array(  # dark violet to yellow: its lightness rises steadily, so it also reads in grey
    [[13, 8, 60], [84, 2, 163], [156, 23, 158], [205, 72, 120], [237, 121, 83], [253, 180, 47], [240, 249, 33]], float
)


class LegendEntry(NamedTuple):
    """One line of a legend."""

    name: str
    color: tuple[int, int, int]
    note: str = ""  # shown faintly after the name, e.g. "12.3%"


def overlay(
    rgb: UInt8[np.ndarray, "H W 3"],
    labels: Integer[np.ndarray, "H W"],
    palette: UInt8[np.ndarray, "C 3"],
    *,
    opacity: int | float = 0.6,
    border: int = 1,
    outline: Integer[np.ndarray, "H W"] | None = None,
    ignore: int = IGNORE,
) -> UInt8[np.ndarray, "H W 3"]:
    """The image tinted with each class's colour, with borders of `border` pixels in the full colour, edged in white.

    `outline` is a label map whose borders are drawn, in white alone, in place of the mask's own: the truth's, say.
    Pixels labelled `ignore` or 65535 (when no class) stay as they are. Raises UserError for a label without a colour.
    """
    known = (labels >= 0) & (labels < len(palette))
    wrong = ~known & (labels != ignore) & (labels != IGNORE_16)
    if wrong.any():
        raise UserError(
            f"every label needs a colour, got {labels[wrong][0]} with {len(palette)} colours: pass a longer one"
        )
    inner = outer = np.zeros_like(known)
    if outline is not None:
        outer = _near_edge(outline, border)
    elif border > 0 and (edge := _near_edge(labels, border)).mean() < 0.5:  # confetti would be all border
        inner, outer = _near_edge(labels, 2 * border), edge
    picture = np.empty_like(rgb)
    for top in range(0, len(rgb), _ROWS):  # a few rows at a time: a photo's numbers in float64 fill memory
        rows = np.s_[top : top + _ROWS]
        colour = palette[np.where(known[rows], labels[rows], 0)].astype(np.float32)
        # Half the photo's own colour goes, else a pink mask on a green field is neither, and the legend names neither.
        grey = (rgb[rows] @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        tinted = (1 - opacity) * (0.5 * rgb[rows] + 0.5 * grey) + opacity * colour
        # A class's own colour just inside its edge, and white where two classes meet, show on any photo.
        tinted = np.where(inner[rows][..., None], colour, tinted)
        tinted = np.where(outer[rows][..., None], np.float32(255), tinted)
        picture[rows] = np.where(known[rows][..., None], np.rint(tinted), rgb[rows]).astype(np.uint8)
    return picture


def overlay_with_legend(
    rgb: UInt8[np.ndarray, "H W 3"],
    labels: Integer[np.ndarray, "H W"],
    names: Sequence[str | vocabulary.ClassName],
    palette: UInt8[np.ndarray, "C 3"] | None = None,
    *,
    opacity: int | float = 0.6,
    smallest: int = 512,
    most: int = 24,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """An overlay above its legend: colour, name and share of the area of every class present, largest first.

    Args:
      rgb, labels: image and class indices; 255 (unless a class) is left untinted.
      names: display name of each class.
      palette: one colour per class; `vocabulary.class_palette` when None.
      opacity: of the tint, 0..1.
      smallest: images with a shorter long side are enlarged by a whole factor, so that borders and text stay readable.
      most: legend lines; the remaining classes are summed in a last one.
    """
    if palette is None:
        palette = vocabulary.class_palette(names)
    if len(palette) != len(names):
        raise UserError(f"each class has one colour, got {len(names)} names and {len(palette)} colours: match them")
    entries = area_legend(labels, names, palette, most=most)
    rgb, labels = enlarge(rgb, labels, _factor(labels.shape, smallest))
    border = max(1, round(max(labels.shape) / 700))
    picture = overlay(rgb, labels, palette, opacity=opacity, border=border)
    size = int(np.clip(max(picture.shape[:2]) / 36, 14, 40))
    width = max(picture.shape[1], 20 * size)
    below = draw_legend(entries, width, size=size)
    return np.concatenate([_widen(picture, width), below])


def enlarge(
    rgb: UInt8[np.ndarray, "h w 3"], labels: Integer[np.ndarray, "h w"], factor: int
) -> tuple[UInt8[np.ndarray, "H W 3"], Integer[np.ndarray, "H W"]]:
    """Both `factor` times as large: the image by cubic interpolation, and each pixel's label is the class whose mask,
    interpolated too, is the largest there, so that borders are curves and no stairs."""
    if factor == 1:
        return rgb, labels
    size = (labels.shape[1] * factor, labels.shape[0] * factor)
    image = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    large, most = np.zeros(size[::-1], labels.dtype), np.full(size[::-1], -1, np.float32)
    for label in np.unique(labels):
        mask = np.asarray(Image.fromarray((labels == label).astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        large[mask > most] = label
        most = np.maximum(most, mask)
    return image, large


def area_legend(
    labels: Integer[np.ndarray, "H W"],
    names: Sequence[str | vocabulary.ClassName],
    palette: UInt8[np.ndarray, "C 3"],
    *,
    most: int = 24,
) -> list[LegendEntry]:
    """Legend entries of the classes present, with their share of all pixels, largest first; at most `most` lines."""
    counts = np.bincount(labels[(labels >= 0) & (labels < len(names))].ravel(), minlength=len(names))
    order = [index for index in np.argsort(-counts, kind="stable") if counts[index]]
    shown = order if len(order) <= most else order[: most - 1]
    entries = [
        LegendEntry(str(names[i]), tuple(int(c) for c in palette[i]), _percent(counts[i] / labels.size)) for i in shown
    ]
    if len(shown) < len(order):
        rest = sum(counts[i] for i in order[len(shown) :])
        entries.append(
            LegendEntry(f"and {len(order) - len(shown)} more", (255, 255, 255), _percent(rest / labels.size))
        )
    return entries


def draw_legend(entries: Sequence[LegendEntry], width: int, *, size: int = 16) -> UInt8[np.ndarray, "H W 3"]:
    """Colour swatches with names, in as many columns as fit `width`, read along the rows; `size` in px."""
    if not entries:
        return np.full((_GAP, width, 3), 255, np.uint8)
    notes, row, pad = default_font(size), round(size * 1.6), round(size * 0.6)
    swatch = round(size * 1.1)
    space = notes.getlength(" ")
    written = [lettering(entry.name, size) for entry in entries]
    after = [(2 * space + notes.getlength(entry.note)) * bool(entry.note) for entry in entries]
    needed = [2 * pad + swatch + font.getlength(text) + note for (text, font), note in zip(written, after, strict=True)]
    columns = int(np.clip(width // max(needed), 1, len(entries)))
    cell = width // columns
    rows = -(-len(entries) // columns)
    image = Image.new("RGB", (width, rows * row + _GAP), _PAPER)
    draw = ImageDraw.Draw(image)
    for index, (entry, (text, font)) in enumerate(zip(entries, written, strict=True)):
        x, y = index % columns * cell + pad, index // columns * row + _GAP // 2
        middle = y + row / 2
        draw.rectangle((x, middle - swatch / 2, x + swatch, middle + swatch / 2), fill=entry.color, outline=_FAINT)
        left = x + swatch + pad
        name = _shorten(text, font, index % columns * cell + cell - left - after[index])
        draw.text((left, middle), name, font=font, fill=_INK, anchor="lm")
        if entry.note:
            beside = left + font.getlength(name) + 2 * space
            draw.text((beside, middle), entry.note, font=notes, fill=_FAINT, anchor="lm")
    return np.asarray(image)


def comparison_sheet(
    columns: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "H W 3"]]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    notes: Sequence[str] = (),
    legend: Sequence[LegendEntry] = (),
    heading: str = "",
    panel: int = 224,
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """A table of pictures: column titles above, one row per scene, a legend below.

    Args:
      columns: title of each column.
      rows: the pictures, as many in each row as there are columns; any sizes, fitted into squares of `panel` px.
      notes: a text under each title, broken into as many lines as it needs.
      captions: a line under each picture ("" for none), e.g. its score.
      legend: entries drawn under the table, e.g. of all classes that appear.
      heading: a line above all.
      panel: side of a cell in pixels.
    """
    if any(len(row) != len(columns) for row in rows) or not columns or not rows:
        raise UserError(f"every row needs one picture per column ({len(columns)}), got {[len(r) for r in rows]}")
    if captions is not None and [len(c) for c in captions] != [len(row) for row in rows]:
        raise UserError(f"captions match the pictures, got {[len(c) for c in captions]} for {len(rows)} rows")
    size = max(11, round(panel / 14))
    line = round(size * 1.7)
    width = len(columns) * (panel + _GAP) + _GAP
    tall = [max(_fit(picture.shape[:2], panel)[0] for picture in row) for row in rows]
    under = 0 if captions is None else line
    first = _GAP + (round(line * 1.3) if heading else 0) + line
    wrapped = [_wrap(note, size, panel) for note in notes]
    top = first + round(1.3 * size) * max(map(len, wrapped), default=0) + bool(notes) * _GAP
    sheet = Image.new("RGB", (width, top + sum(t + under + _GAP for t in tall)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        text, font = lettering(heading, round(size * 1.4))
        draw.text((_GAP, _GAP), _shorten(text, font, width - 2 * _GAP), font=font, fill=_INK, anchor="lt")
    for j, title in enumerate(columns):
        x = _GAP + j * (panel + _GAP) + panel / 2
        text, font = lettering(title, round(size * 1.15))
        draw.text((x, first - line / 2), _shorten(text, font, panel), font=font, fill=_INK, anchor="mm")
        for i, words in enumerate(wrapped[j] if notes else ()):
            text, font = lettering(words, size)
            draw.text((x, first + round(1.3 * size) * (i + 0.5)), text, font=font, fill=_FAINT, anchor="mm")
    y = top
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            height, across = _fit(picture.shape[:2], panel)
            x = _GAP + j * (panel + _GAP) + (panel - across) // 2
            # enlarging: nearest keeps small masks crisp; shrinking: antialiased
            method = Image.Resampling.NEAREST if height > picture.shape[0] else Image.Resampling.LANCZOS
            sheet.paste(Image.fromarray(picture).resize((across, height), method), (x, y))
            if captions is not None:
                centre = (_GAP + j * (panel + _GAP) + panel / 2, y + tall[i] + line / 2)
                text, font = lettering(captions[i][j], size)
                draw.text(centre, _shorten(text, font, panel), font=font, fill=_FAINT, anchor="mm")
        y += tall[i] + under + _GAP
    below = [draw_legend(legend, width, size=size)] if legend else []
    return np.concatenate([np.asarray(sheet), *below])


def heat_map(
    rgb: UInt8[np.ndarray, "H W 3"],
    scores: Float[np.ndarray, "H W"],
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    opacity: int | float = 0.65,
    smallest: int = 512,
    name: str = "",
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Where one class scores high: violet (low) to yellow (high) over the greyed image, a scale with its ends below.

    Args:
      rgb, scores: image, and one score per pixel (cosine, logit or probability).
      low, high: ends of the scale; the smallest and largest finite score when None.
      opacity: of the colours, 0..1.
      smallest: shorter long sides are enlarged, as in `overlay_with_legend`.
      name: of the class, written on the scale.
    """
    finite = scores[np.isfinite(scores)]
    if not len(finite):
        raise UserError("a heat map needs at least one finite score, got none: check the scores")
    low = float(finite.min()) if low is None else low
    high = float(finite.max()) if high is None else high
    position = np.nan_to_num((scores - low) / (high - low) if high > low else scores * 0, nan=0.0, posinf=1, neginf=0)
    grey = rgb @ np.array([0.299, 0.587, 0.114])
    mixed = opacity * _heat_colours(position) + (1 - opacity) * grey[..., None]
    picture, _ = enlarge(
        np.rint(mixed).astype(np.uint8), np.zeros(rgb.shape[:2], np.uint8), _factor(rgb.shape, smallest)
    )
    size = int(np.clip(max(picture.shape[:2]) / 36, 14, 40))
    width = max(picture.shape[1], 20 * size)
    bar = np.tile(_heat_colours(np.linspace(0, 1, width - 2 * _GAP))[None], (size, 1, 1))
    image = Image.new("RGB", (width, round(size * 2.6) + 2 * _GAP), _PAPER)
    image.paste(Image.fromarray(np.rint(bar).astype(np.uint8)), (_GAP, _GAP))
    draw, numbers, y = ImageDraw.Draw(image), default_font(size), size + 2 * _GAP
    text, font = lettering(name, size)
    draw.text((_GAP, y), f"{low:.3g}", font=numbers, fill=_INK, anchor="lt")
    draw.text((width / 2, y), _shorten(text, font, width / 2), font=font, fill=_INK, anchor="mt")
    draw.text((width - _GAP, y), f"{high:.3g}", font=numbers, fill=_INK, anchor="rt")
    return np.concatenate([_widen(picture, width), np.asarray(image)])


def _factor(shape: tuple[int, ...], smallest: int) -> int:
    """How often an image is to be enlarged so that its long side is almost `smallest`."""
    return max(1, smallest // max(shape))


def _near_edge(labels: Integer[np.ndarray, "H W"], reach: int) -> Bool[np.ndarray, "H W"]:
    """Pixels at most `reach` pixels from another label. The image's own border is no edge."""
    edge = np.zeros(labels.shape, bool)
    for step in range(1, reach + 1):
        for axis in (0, 1):
            if labels.shape[axis] > step:
                first, last = [slice(None)] * 2, [slice(None)] * 2
                first[axis], last[axis] = slice(None, -step), slice(step, None)
                differs = labels[tuple(first)] != labels[tuple(last)]
                edge[tuple(first)] |= differs
                edge[tuple(last)] |= differs
    return edge


def _heat_colours(position: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    stops = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(position, stops, _HEAT[:, channel]) for channel in range(3)], -1)


def _fit(shape: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _widen(picture: UInt8[np.ndarray, "H w 3"], width: int) -> UInt8[np.ndarray, "H W 3"]:
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{100 * share:.1f}%"


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Its lines, of at most `width` pixels, broken between words."""
    lines = []
    for part in text.split("\n"):
        lines.append("")
        for word in part.split():
            longer = f"{lines[-1]} {word}".strip()
            written, font = lettering(longer, size)
            lines[-1:] = [longer] if not lines[-1] or font.getlength(written) <= width else [lines[-1], word]
    return lines


def _shorten(text: str, font: Font, width: int | float) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(f"{text[:count]}…"))
    return f"{text[: max(fitting - 1, 0)]}…"
