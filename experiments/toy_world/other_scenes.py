"""Scenes by another generator: its sizes, overlaps and backgrounds are not those that the embedded encoders learn from.

    python -m experiments.toy_world.other_scenes --count 500 --out data/scenes/other.npz
    python -m experiments.toy_world.score --model embedded --scenes data/scenes/other.npz

Never trained on. `scenes.py` scatters things and keeps them apart, draws their sides evenly in the logarithm, and has
level horizons, sky above. Here two to five things lie in a heap about one point, the larger sides as often as the
smaller ones, and the ground is one, two or three stuffs in bands of any direction, in any order, darker to one side.
The glyphs are the same artists' (`IN_STYLE`), and the painter is the same: what is tested is the composition.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from experiments.harness.records import with_errors
from experiments.toy_world.backgrounds import SIDE, draw_ground, sample_ground
from experiments.toy_world.glyphs import IN_STYLE, load_glyphs
from experiments.toy_world.scenes import Layout, Painter, Scene, Thing
from maskclip_jax.data.vocabulary import SCENE_OBJECTS, SCENE_STUFF
from maskclip_jax.data.whole_files import atomic_path

SEED = 6  # none of `scenes.SPLIT_SEEDS`


def bands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image, float32 [SIDE, SIDE, 3], and stuff, uint8 [SIDE, SIDE]: one to three stuffs in bands of one direction."""
    count = int(rng.integers(1, 4))
    stuffs = rng.permutation(len(SCENE_STUFF))[:count]
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    across = x * np.cos(angle) + y * np.sin(angle)
    edges = np.sort(rng.uniform(-0.35, 0.35, count - 1))
    band = np.searchsorted(edges, across.ravel()).reshape(across.shape)
    image = np.zeros((SIDE, SIDE, 3), np.float32)
    for place, stuff in enumerate(stuffs):
        ground = sample_ground(rng)._replace(stuffs=(int(stuff),))
        image = np.where((band == place)[..., None], draw_ground(ground)[0], image)
    shade = 1 + rng.uniform(-0.25, 0.25) * (x * np.sin(angle) - y * np.cos(angle))
    return image * shade[..., None].astype(np.float32), stuffs[band].astype(np.uint8)


def heap(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Two to five things about one point, in the order in which they are drawn."""
    count = int(rng.integers(2, 6))
    centre = rng.uniform(0.35, 0.65, 2)
    things = []
    for label in rng.permutation(len(SCENE_OBJECTS))[:count]:
        place = np.clip(centre + rng.normal(0, 0.22, 2), 0.08, 0.92)
        things.append(
            Thing(
                int(label),
                IN_STYLE[rng.integers(len(IN_STYLE))],
                "",
                float(rng.uniform(0.22, 0.6)),
                (float(place[0]), float(place[1])),
                float(rng.uniform(-40, 40)),
                bool(rng.random() < 0.5),
                tuple(float(g) for g in rng.uniform(0.8, 1.1) * rng.uniform(0.95, 1.05, 3)),
                float(rng.uniform(0.7, 1.2)),
            )
        )
    return tuple(things)


def draw(painter: Painter, index: int) -> Scene:
    """Scene `index`: a pure function of it."""
    rng = np.random.default_rng([SEED, index])
    finish = (rng.normal(0, 12), rng.uniform(0.75, 1.15), rng.uniform(0, 0.8), rng.uniform(0, 5))
    layout = Layout(sample_ground(rng), heap(rng), tuple(float(f) for f in finish), int(rng.integers(2**32)))
    return painter.draw_scene(layout, bands(rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("data/scenes/other.npz"))
    parser.add_argument("--npm", default="/tmp/npm", help="folder with the iconify-json-*.tgz tarballs")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count is a number of scenes from 1 on, got {args.count}")
    with_errors(lambda: write_scenes(args.count, args.out, args.npm))


def write_scenes(count: int, out: Path, npm: str) -> None:
    """An `.npz` file of `images` and `labels`. Raises UserError where glyphs are missing."""
    painter = Painter(load_glyphs(npm))
    scenes = [draw(painter, index) for index in range(count)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, images=np.stack([s.image for s in scenes]), labels=np.stack([s.labels for s in scenes])
        )
    print("wrote", out)


if __name__ == "__main__":
    main()
