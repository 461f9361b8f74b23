"""Procedural backgrounds: six kinds of stuff from banks of noise, and a horizon between two of them."""

from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from maskclip_jax.data.vocabulary import SCENE_STUFF

SIDE = 128  # px
_BANK = 24  # noise tiles for each kind, 2·SIDE on a side; crops of them cost nothing beside fresh noise
# Vertical and horizontal smoothing in px: the shape of the grain is what tells the stuffs apart beside their colour.
_GRAINS = {
    "cloudy": (18, 28),
    "soft": (9, 9),
    "lumpy": (4, 4),
    "fine": (0.6, 0.6),
    "blades": (3.2, 0.7),
    "waves": (1.1, 6),
}
# Darkest and lightest mean colour of each stuff, RGB 0-255; a scene draws between them (several pairs: pick one).
_COLOURS = {
    "grass": [((40, 95, 25), (95, 160, 50)), ((90, 130, 40), (150, 185, 80)), ((25, 75, 40), (60, 125, 70))],
    "sky": [((70, 130, 215), (150, 200, 245)), ((150, 180, 210), (205, 220, 235)), ((215, 140, 110), (240, 190, 150))],
    "sand": [((190, 155, 95), (230, 200, 145)), ((205, 180, 135), (240, 222, 180)), ((175, 125, 75), (205, 155, 100))],
    "water": [((15, 70, 125), (40, 115, 170)), ((25, 110, 125), (70, 165, 170)), ((35, 60, 90), (70, 100, 130))],
    "snow": [((222, 228, 238), (248, 250, 253)), ((205, 215, 232), (232, 238, 248))],
    "road": [((62, 62, 66), (100, 100, 104)), ((95, 93, 92), (135, 132, 130))],
}


class Ground(NamedTuple):
    """What a background is, before it is drawn.

    Attributes:
        stuffs: one or two indices into SCENE_STUFF; the first lies above the horizon.
        horizon: its height, tilt, and the amplitude, frequency and phase of its wave, in scene sides and radians.
        seed: of the textures.
    """

    stuffs: tuple[int, ...]
    horizon: tuple[float, float, float, float, float]
    seed: int


def sample_ground(rng: np.random.Generator) -> Ground:
    """One stuff, or with probability 0.6 two of them with a horizon, sky above if there is any."""
    stuffs = rng.permutation(len(SCENE_STUFF))[: 2 if rng.random() < 0.6 else 1]
    sky = SCENE_STUFF.index("sky")
    if len(stuffs) == 2 and (sky in stuffs or rng.random() < 0.4):
        ground = stuffs[stuffs != sky][0]
        stuffs = np.array([sky, ground])
    horizon = (
        rng.uniform(0.25, 0.75),
        rng.normal(0, 0.08),
        rng.uniform(0, 0.03),
        rng.uniform(3, 14),
        rng.uniform(0, 6.28),
    )
    return Ground(tuple(int(s) for s in stuffs), horizon, int(rng.integers(2**32)))


@cache
def _bank(grain: str) -> np.ndarray:
    """Noise of one grain, mean 0 and deviation 1; float32 [_BANK, 2·SIDE, 2·SIDE]."""
    rng = np.random.default_rng([7, list(_GRAINS).index(grain)])
    noise = rng.standard_normal((_BANK, 2 * SIDE, 2 * SIDE), dtype=np.float32)
    noise = np.stack([ndimage.gaussian_filter(tile, _GRAINS[grain], mode="wrap") for tile in noise])
    return noise / noise.std(axis=(1, 2), keepdims=True)


def noise(grain: str, rng: np.random.Generator) -> np.ndarray:
    """A random crop of the bank; float32 [SIDE, SIDE]."""
    tile, top, left = rng.integers((_BANK, SIDE, SIDE))
    crop = _bank(grain)[tile, top : top + SIDE, left : left + SIDE]
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def _texture(stuff: str, top: float, rng: np.random.Generator) -> np.ndarray:
    """One stuff over the whole scene; float32 [SIDE, SIDE, 3] in 0-255. `top`: where it begins, in scene sides."""
    pairs = _COLOURS[stuff]
    dark, light = (np.asarray(c, np.float32) for c in pairs[rng.integers(len(pairs))])
    colour = dark + (light - dark) * rng.uniform(0, 1) + rng.normal(0, 5, 3).astype(np.float32)
    contrast = rng.uniform(0.6, 1.4)
    depth = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    near = np.clip((depth - top) / max(1 - top, 0.1), 0, 1)  # 0 at the horizon, 1 at the viewer
    if stuff == "sky":
        value = 5 * noise("cloudy", rng) + 0.8 * noise("fine", rng)
        haze = rng.uniform(0, 55) * depth
        return colour + contrast * value[..., None] + haze[..., None]
    if stuff == "grass":
        value = 8 * noise("soft", rng) + (5 + 9 * near) * noise("blades", rng) + 3 * noise("fine", rng)
        tint = np.array([0.9, 1.0, 0.55], np.float32)
    elif stuff == "water":
        value = 5 * noise("cloudy", rng) + (4 + 9 * near) * noise("waves", rng)
        value = value + 14 * np.maximum(noise("waves", rng) - 1.4, 0)  # glints
        tint = np.array([0.9, 1.0, 1.0], np.float32)
    elif stuff == "sand":
        value = 5 * noise("soft", rng) + 4 * noise("lumpy", rng) + 7 * noise("fine", rng)
        tint = np.array([1.0, 0.95, 0.8], np.float32)
    elif stuff == "snow":
        value = 5 * noise("soft", rng) + 2.5 * noise("lumpy", rng) + 1.5 * noise("fine", rng)
        tint = np.array([1.0, 0.95, 0.75], np.float32)
    else:
        value = 4 * noise("cloudy", rng) + 3 * noise("lumpy", rng) + 8 * noise("fine", rng)
        tint = np.ones(3, np.float32)
    image = colour + (contrast * value)[..., None] * tint
    if stuff == "road" and rng.random() < 0.75:
        image = _lane(image, near, top, rng)
    return image


def _lane(image: np.ndarray, near: np.ndarray, top: float, rng: np.random.Generator) -> np.ndarray:
    """Dashed lane marks that run to a vanishing point on the horizon (straight up where the road fills the scene)."""
    x = np.linspace(0, 1, SIDE, dtype=np.float32)[None, :]
    vanish, foot = rng.uniform(0.2, 0.8), rng.uniform(0, 1)
    perspective = near if top > 0 else np.linspace(0.4, 1, SIDE, dtype=np.float32)[:, None]
    width = 0.035 * perspective + 0.002
    on = np.zeros((SIDE, SIDE), bool)
    for offset in (-0.7, 0.0, 0.7):
        dashed = offset == 0 or rng.random() < 0.3
        line = np.abs(x - (vanish + (foot + offset - vanish) * near)) < width
        if dashed:
            line &= np.sin(rng.uniform(0, 6.28) + 14 / (perspective + 0.25)) > -0.2
        on |= line
    paint = np.array([(235, 235, 230), (235, 195, 70)][int(rng.random() < 0.25)], np.float32)
    return np.where(on[..., None], 0.25 * image + 0.75 * paint, image)


def draw_ground(ground: Ground) -> tuple[np.ndarray, np.ndarray]:
    """Draws a background.

    Returns:
        image, float32 [SIDE, SIDE, 3], not clipped; stuff, uint8 [SIDE, SIDE], indices into SCENE_STUFF.
    """
    rng = np.random.default_rng(ground.seed)
    names = [SCENE_STUFF[s] for s in ground.stuffs]
    if len(names) == 1:
        return _texture(names[0], 0.0, rng), np.full((SIDE, SIDE), ground.stuffs[0], np.uint8)
    height, tilt, amplitude, frequency, phase = ground.horizon
    x = np.linspace(0, 1, SIDE)
    line = height + tilt * (x - 0.5) + amplitude * np.sin(frequency * x + phase)
    above = np.linspace(0, 1, SIDE)[:, None] < line[None, :]
    image = np.where(above[..., None], _texture(names[0], 0.0, rng), _texture(names[1], height, rng))
    return image, np.where(above, *ground.stuffs).astype(np.uint8)
