"""Emoji scenes as pure functions of (split, index): layout, drawing, and captions that name what is visible.

`sample_layout` decides everything, `draw_scene` draws it; the same layout drawn in another style is the same scene in
another artist's hand, which is the test of distribution shift.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from experiments.toy_world.backgrounds import SIDE, Ground, draw_ground, noise, sample_ground
from experiments.toy_world.glyphs import IN_STYLE, TRAIN_STYLES
from maskclip_jax.data.vocabulary import SCENE_CLASSES, SCENE_OBJECTS, SCENE_STUFF

# Close-ups: one large object, the first lessons of training. Validation: as held out, to choose settings on.
SPLIT_SEEDS = {"train": 0, "heldout": 1, "closeup": 2, "wide": 3, "wide_closeup": 4, "validation": 5}
VISIBLE_PX = 60  # a class is named when more of it than this can be seen
TINTS = ("red", "green", "blue", "yellow", "white", "black")
TINTABLE = frozenset(
    "horse bird fish car bus truck train bicycle motorcycle airplane boat tractor house flower mushroom apple bottle "
    "chair sofa bed television laptop clock umbrella ball guitar book robot ghost star key hat cat dog rabbit".split()
)
# Shadow, body and highlight of each tint, RGB 0-255; luminance runs along them.
_RAMPS = {
    "red": ((70, 0, 5), (215, 30, 35), (255, 175, 165)),
    "green": ((0, 50, 15), (40, 160, 60), (185, 240, 180)),
    "blue": ((5, 15, 80), (40, 90, 215), (175, 205, 255)),
    "yellow": ((110, 75, 0), (245, 205, 30), (255, 245, 175)),
    "white": ((125, 125, 130), (225, 225, 228), (255, 255, 255)),
    "black": ((5, 5, 8), (38, 38, 42), (105, 105, 112)),
}

Glyphs = dict[str, dict[str, np.ndarray]]


class Thing(NamedTuple):
    """One glyph in a scene: class index, style, tint or "", side and centre in scene sides, degrees, colour gains."""

    label: int
    style: str
    tint: str
    side: float
    centre: tuple[float, float]
    angle: float
    flip: bool
    gains: tuple[float, float, float]
    saturation: float


class Layout(NamedTuple):
    """All of a scene but its pixels. Things are pasted in order; `finish` is brightness, contrast, blur px, noise."""

    ground: Ground
    things: tuple[Thing, ...]
    finish: tuple[float, float, float, float]
    seed: int


class Scene(NamedTuple):
    """image uint8 [SIDE, SIDE, 3]; labels uint8 [SIDE, SIDE] into SCENE_CLASSES; the visible phrases and classes."""

    image: np.ndarray
    labels: np.ndarray
    phrases: tuple[str, ...]
    classes: tuple[int, ...]


def sample_layout(split: str, index: int) -> Layout:
    """Scene `index` of a split (of `SPLIT_SEEDS`): a pure function of the two."""
    if split.startswith("wide"):
        return _wide_layout(split, index)
    rng = np.random.default_rng([SPLIT_SEEDS[split], index])
    ground = sample_ground(rng)
    count = 1 + int(rng.choice(4, p=(0.25, 0.3, 0.25, 0.2))) if split != "closeup" else 1
    smallest, largest = (0.16, (0.75, 0.65, 0.55, 0.5)[count - 1]) if split != "closeup" else (0.45, 0.95)
    things = []
    for label in rng.permutation(len(SCENE_OBJECTS))[:count]:
        side = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        tint = TINTS[rng.integers(len(TINTS))] if rng.random() < 0.25 and SCENE_OBJECTS[label] in TINTABLE else ""
        margin = 0.42 * side
        # Of a few places keep the one furthest from what is there already: overlaps happen, burials seldom.
        places = rng.uniform(margin, 1 - margin, (4, 2))
        room = [min((np.hypot(*(p - t.centre)) - (side + t.side) / 2 for t in things), default=0.0) for p in places]
        best = int(np.argmax(room)) if rng.random() < 0.8 else 0
        things.append(
            Thing(
                int(label),
                IN_STYLE[rng.integers(len(IN_STYLE))],
                tint,
                side,
                (float(places[best, 0]), float(places[best, 1])),
                float(rng.uniform(-25, 25)),
                bool(rng.random() < 0.5),
                tuple(float(g) for g in rng.uniform(0.85, 1.12) * rng.uniform(0.94, 1.06, 3)),
                float(rng.uniform(0.75, 1.2)),
            )
        )
    if rng.random() < 0.7:  # mostly the small lie upon the large
        things.sort(key=lambda thing: -thing.side)
    blur = rng.uniform(0.3, 0.8) if rng.random() < 0.35 else 0.0
    finish = (rng.normal(0, 8), rng.uniform(0.85, 1.12), blur, rng.uniform(0, 6))
    return Layout(ground, tuple(things), tuple(float(f) for f in finish), int(rng.integers(2**32)))


def _wide_layout(split: str, index: int) -> Layout:
    """What the embedded encoders learn from: more objects, sizes, overlaps and artists than in the held-out scenes."""
    rng = np.random.default_rng([SPLIT_SEEDS[split], index])
    ground = sample_ground(rng)
    count = 1 if split == "wide_closeup" else 1 + int(rng.choice(6, p=(0.2, 0.24, 0.22, 0.16, 0.1, 0.08)))
    smallest, largest = (0.4, 1.05) if split == "wide_closeup" else (0.13, (1.0, 0.8, 0.7, 0.6, 0.5, 0.45)[count - 1])
    scattered = rng.random() < 0.6  # else places are drawn blindly, and things overlap as they come
    things = []
    for label in rng.permutation(len(SCENE_OBJECTS))[:count]:
        side = float(np.exp(rng.uniform(np.log(smallest), np.log(largest))))
        tint = TINTS[rng.integers(len(TINTS))] if rng.random() < 0.2 and SCENE_OBJECTS[label] in TINTABLE else ""
        margin = min(rng.uniform(0.25, 0.45) * side, 0.45)
        places = rng.uniform(margin, 1 - margin, (4, 2))
        room = [min((np.hypot(*(p - t.centre)) - (side + t.side) / 2 for t in things), default=0.0) for p in places]
        place = places[int(np.argmax(room)) if scattered else 0]
        things.append(
            Thing(
                int(label),
                TRAIN_STYLES[rng.integers(len(TRAIN_STYLES))],
                tint,
                side,
                (float(place[0]), float(place[1])),
                float(rng.normal(0, 18)),
                bool(rng.random() < 0.5),
                tuple(float(g) for g in rng.uniform(0.8, 1.15) * rng.uniform(0.88, 1.12, 3)),
                float(rng.uniform(0.6, 1.35)),
            )
        )
    if rng.random() < 0.5:
        things.sort(key=lambda thing: -thing.side)
    blur = rng.uniform(0.3, 1.0) if rng.random() < 0.35 else 0.0
    finish = (rng.normal(0, 10), rng.uniform(0.8, 1.15), blur, rng.uniform(0, 7))
    return Layout(ground, tuple(things), tuple(float(f) for f in finish), int(rng.integers(2**32)))


def restyled(layout: Layout, style: str) -> Layout:
    """The same layout with every glyph in one style."""
    return layout._replace(things=tuple(thing._replace(style=style) for thing in layout.things))


def tint_glyph(rgba: np.ndarray, tint: str) -> np.ndarray:
    """Recolours a glyph (uint8 [h, w, 4]) along the tint's ramp: shading is kept, luminance is not.

    What is darker than another tinted pixel stays so (or becomes as dark), while the glyph's own range, from its 2nd to
    its 98th percentile, is stretched over the ramp's shadow, body and highlight. Alpha is kept. Only
    coloured pixels take part, so that tyres and windows stay as they are; a glyph that is mostly grey is tinted
    wherever it is not dark.
    """
    rgb = rgba[..., :3].astype(np.float32)
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = (high - low) / np.maximum(high, 1)
    luminance = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    opaque = rgba[..., 3] > 127
    weight = np.clip((saturation - 0.2) / 0.2, 0, 1) * (high > 40)
    if weight[opaque].mean() < 0.4:
        weight = np.clip((luminance - 45) / 40, 0, 1)
    taking = opaque & (weight > 0.5)
    # Stretch the glyph's own range over the ramp: a dark glyph must be able to become a white one.
    dark, middle, bright = np.percentile(luminance[taking], (2, 50, 98)) if taking.any() else (0.0, 128.0, 255.0)
    stops = (dark - 1, middle, bright + 1)
    ramp = np.stack([np.interp(luminance, stops, channel) for channel in np.array(_RAMPS[tint]).T], -1)
    mixed = rgb + weight[..., None] * (ramp - rgb)
    return np.concatenate([mixed.clip(0, 255).astype(np.uint8), rgba[..., 3:]], -1)


class Painter:
    """Draws layouts with one set of glyphs; tinted glyphs are kept, for there are few."""

    def __init__(self, glyphs: Glyphs):
        self._glyphs = glyphs
        self._glyph = lru_cache(maxsize=None)(self._make_glyph)

    def _make_glyph(self, style: str, name: str, tint: str) -> Image.Image:
        # An artist who has not drawn a thing leaves it to Noto.
        rgba = self._glyphs[style].get(name, self._glyphs["noto"][name])
        return Image.fromarray(tint_glyph(rgba, tint) if tint else rgba)

    def _patch(self, thing: Thing) -> Image.Image:
        """The glyph scaled, turned and recoloured, RGBA, on a canvas that just holds it."""
        glyph = self._glyph(thing.style, SCENE_OBJECTS[thing.label], thing.tint)
        scale = thing.side * SIDE / max(glyph.size)
        glyph = glyph.resize([max(2, round(s * scale)) for s in glyph.size], Image.Resampling.BICUBIC)
        if thing.flip:
            glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rgba = np.asarray(glyph.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True))
        rgb = rgba[..., :3].astype(np.float32)
        # A name of a colour must stay true, so tinted glyphs keep their hue.
        grey = rgb.mean(-1, keepdims=True)
        gains = np.full(3, np.mean(thing.gains)) if thing.tint else np.asarray(thing.gains)
        rgb = (grey + (1.0 if thing.tint else thing.saturation) * (rgb - grey)) * gains.astype(np.float32)
        return Image.fromarray(np.concatenate([rgb.clip(0, 255).astype(np.uint8), rgba[..., 3:]], -1))

    def draw_scene(self, layout: Layout, ground: tuple[np.ndarray, np.ndarray] | None = None) -> Scene:
        """Pixels, labels and names of a layout. A pixel belongs to a glyph where its alpha is above one half.

        `ground`: image and stuff in the place of the layout's, as `draw_ground` returns them.
        """
        background, stuff = draw_ground(layout.ground) if ground is None else ground
        image = Image.fromarray(background.clip(0, 255).astype(np.uint8))
        labels = stuff + np.uint8(len(SCENE_OBJECTS))
        for thing in layout.things:
            patch = self._patch(thing)
            left, top = (round(c * SIDE - s / 2) for c, s in zip(thing.centre, patch.size, strict=True))
            image.paste(patch, (left, top), patch)
            alpha = np.asarray(patch.getchannel("A"))
            rows, columns = slice(max(top, 0), top + alpha.shape[0]), slice(max(left, 0), left + alpha.shape[1])
            alpha = alpha[max(-top, 0) :, max(-left, 0) :][: SIDE - rows.start, : SIDE - columns.start]
            labels[rows, columns][alpha > 127] = thing.label
        brightness, contrast, blur, grain = layout.finish
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        pixels = (np.asarray(image, np.float32) - 128) * contrast + 128 + brightness
        pixels = pixels + grain * noise("fine", np.random.default_rng(layout.seed))[..., None]
        seen = np.bincount(labels.ravel(), minlength=len(SCENE_CLASSES)) > VISIBLE_PX
        things = [(f"{t.tint} {SCENE_OBJECTS[t.label]}".strip(), t.label) for t in layout.things if seen[t.label]]
        stuffs = [(name, c) for c, name in enumerate(SCENE_CLASSES) if name in SCENE_STUFF and seen[c]]
        phrases, classes = zip(*things, *stuffs, strict=True)
        return Scene(pixels.clip(0, 255).astype(np.uint8), labels, phrases, classes)


# {o}: objects with articles, {s}: stuff, {b}: both. Words of CLIP's 80 templates and of MaskCLIP's five are among them.
_PATTERNS_BOTH = (
    "{p} {o} on {s}.",
    "{p} {o} on {s}",
    "{p} {o} and {s}.",
    "{p} {o} with {s}.",
    "{p} {b}.",
    "{o} on {s}",
    "{o}, {s}",
    "there is {o} in the scene, with {s}.",
    "there is {b} in the scene.",
    "this is {o} in the scene of {s}.",
    "{s} with {o}.",
    "a scene of {s} with {o}",
)
_PATTERNS_ONE = ("{p} {b}.", "{p} {b}.", "{p} {b}", "{b}", "there is {b} in the scene.", "this is {b} in the scene.")
_PREFIXES = (
    *("a photo of",) * 6,
    "a bad photo of",
    "a good photo of",
    "a low resolution photo of",
    "a bright photo of",
    "a dark photo of",
    "a cropped photo of",
    "a close-up photo of",
    "a blurry photo of",
    "a jpeg corrupted photo of",
    "a pixelated photo of",
    "a rendering of",
    "a drawing of",
    "a cartoon of",
    "an illustration of",
    "art of",
    "a picture of",
    "itap of",
    "a black and white photo of",
    "a sketch of",
    "graffiti of",
)


def _joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _with_article(phrase: str, article: str) -> str:
    if article == "a":
        return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"
    return f"{article} {phrase}".strip()


def caption(phrases: tuple[str, ...], rng: np.random.Generator, subset: bool = False) -> str:
    """A sentence that names what is visible, in random order and varied wording.

    Args:
        phrases: of a `Scene`: objects such as "red car", and stuff.
        rng: the only source of chance.
        subset: name only a random non-empty part of the phrases.
    """
    order = [phrases[i] for i in rng.permutation(len(phrases))]
    if subset:
        order = order[: rng.integers(1, len(order) + 1)]
    article = ("a", "a", "a", "the", "")[rng.integers(5)]
    stuff = [_with_article(p, "the" if article == "the" else "") for p in order if p in SCENE_STUFF]
    things = [_with_article(p, article) for p in order if p not in SCENE_STUFF]
    # The prompts say "a photo of a grass": a stuff named alone is met with its article, as the templates will have it.
    if not things and len(stuff) == 1:
        stuff = [_with_article(order[0], article)]
    patterns = _PATTERNS_BOTH if things and stuff else _PATTERNS_ONE
    both = [_with_article(p, article if p not in SCENE_STUFF or article == "the" else "") for p in order]
    return patterns[rng.integers(len(patterns))].format(
        p=_PREFIXES[rng.integers(len(_PREFIXES))],
        o=_joined(things) if things else "",
        s=_joined(stuff) if stuff else "",
        b=_joined(both if things else stuff),
    )
