"""Writes emoji scenes to disk: the training arrays, and the held-out scenes that ship.

    python -m experiments.toy_world.make_scenes --train 40000 --out /work/scenes
    python -m experiments.toy_world.make_scenes --heldout 500 --out /work/scenes

The first writes `<out>/train/{images.npy,labels.npy,scenes.json}`; labels are for analysis and for supervised upper
bounds, never for training the CLIP. The second writes `<out>/heldout.npz`, `<out>/heldout_twemoji.npz`, and with
`--ship` also `experiments/toy_world/heldout.zip` and the first 64 scenes in `maskclip_jax/assets/scenes/`.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.toy_world.backgrounds import SIDE
from experiments.toy_world.glyphs import load_glyphs
from experiments.toy_world.scenes import Painter, Scene, restyled, sample_layout
from maskclip_jax.data.vocabulary import SCENE_CLASSES

ROOT = Path(__file__).resolve().parents[2]
ZIP = ROOT / "experiments" / "toy_world" / "heldout.zip"
ASSETS = ROOT / "maskclip_jax" / "assets" / "scenes"
ASSET_COUNT = 64
JPEG_QUALITY = 92
# One style for a whole split, where the split is another's layouts redrawn.
REDRAWN = {"heldout_twemoji": ("heldout", "twemoji"), "validation_twemoji": ("validation", "twemoji")}
_painter: Painter | None = None


def _start(npm: str) -> None:
    global _painter
    _painter = Painter(load_glyphs(npm))


def draw(painter: Painter, split: str, index: int) -> Scene:
    """Scene `index` of "train", "heldout" or "heldout_twemoji"."""
    source, style = REDRAWN.get(split, (split, None))
    layout = sample_layout(source, index)
    return painter.draw_scene(restyled(layout, style) if style else layout)


def _record(split: str, index: int, scene: Scene) -> dict:
    source, style = REDRAWN.get(split, (split, None))
    styles = {t.label: style or t.style for t in sample_layout(source, index).things}
    return {
        "phrases": list(scene.phrases),
        "classes": list(scene.classes),
        "styles": [styles.get(c, "procedural") for c in scene.classes],
    }


def _worker(split: str, index: int) -> tuple[np.ndarray, np.ndarray, dict]:
    scene = draw(_painter, split, index)
    return scene.image, scene.labels, _record(split, index, scene)


def make(split: str, count: int, images: np.ndarray, labels: np.ndarray, npm: str, workers: int) -> list[dict]:
    """Fills images [count, SIDE, SIDE, 3] and labels [count, SIDE, SIDE]; returns one record for each scene."""
    load_glyphs(npm)  # once, so that the workers find the cache
    records = []
    with multiprocessing.get_context("spawn").Pool(workers, _start, (npm,)) as pool:
        for i, (image, label, record) in enumerate(pool.imap(partial(_worker, split), range(count), chunksize=64)):
            images[i], labels[i] = image, label
            records.append(record)
    return records


def write_train(out: Path, count: int, npm: str, workers: int, split: str = "train") -> Path:
    """Writes `<out>/<split>`; the folder takes its name only when it is whole."""
    folder, temporary = out / split, out / f"{split}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    shapes = {"images": (count, SIDE, SIDE, 3), "labels": (count, SIDE, SIDE)}
    arrays = {
        name: np.lib.format.open_memmap(temporary / f"{name}.npy", mode="w+", dtype=np.uint8, shape=shape)
        for name, shape in shapes.items()
    }
    records = make(split, count, arrays["images"], arrays["labels"], npm, workers)
    for array in arrays.values():
        array.flush()
    (temporary / "scenes.json").write_text(json.dumps({"classes": SCENE_CLASSES, "scenes": records}))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder


def write_heldout(
    out: Path, count: int, npm: str, workers: int, splits: tuple[str, ...] = ("heldout", "heldout_twemoji")
) -> dict[str, tuple[np.ndarray, np.ndarray, list[dict]]]:
    """Writes `<out>/<split>.npz` of every split and returns what is in them and the records."""
    out.mkdir(parents=True, exist_ok=True)
    made = {}
    for split in splits:
        images, labels = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty((count, SIDE, SIDE), np.uint8)
        records = make(split, count, images, labels, npm, workers)
        temporary = out / f"{split}.{os.getpid()}.tmp.npz"
        np.savez_compressed(temporary, images=images, labels=labels)
        temporary.rename(out / f"{split}.npz")
        made[split] = (images, labels, records)
    return made


def palette() -> bytes:
    """The VOC palette (bits of the index spread over the channels), 256 RGB triples."""
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((np.arange(256) >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] to JPEG, quality 92, chroma not subsampled: at 128 px it would blur small things."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def encode_png(labels: np.ndarray) -> bytes:
    """uint8 [h, w] to a palette PNG whose pixel values are the classes."""
    image = Image.fromarray(labels).convert("P")
    image.putdata(labels.ravel().tolist())
    image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def ship(
    made: dict[str, tuple[np.ndarray, np.ndarray, list[dict]]], archive: Path = ZIP, assets: Path = ASSETS
) -> None:
    """Packs the held-out scenes: `<split>/{images/0000.jpg,labels/0000.png}`, `classes.json`, `scenes.json`."""
    classes = json.dumps(SCENE_CLASSES, indent=0)
    records = {split: scenes for split, (_, _, scenes) in made.items()}
    temporary = archive.with_suffix(f".{os.getpid()}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as pack:

        def add(name: str, content: str | bytes, compression: int = zipfile.ZIP_STORED) -> None:
            # A fixed date: the same scenes are the same bytes.
            pack.writestr(zipfile.ZipInfo(name, (2022, 10, 23, 0, 0, 0)), content, compression)

        add("classes.json", classes)
        add("scenes.json", json.dumps(records), zipfile.ZIP_DEFLATED)
        for split, (images, labels, _) in made.items():
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                add(f"{split}/images/{i:04d}.jpg", encode_jpeg(image))
                add(f"{split}/labels/{i:04d}.png", encode_png(label))
    temporary.rename(archive)
    for part in ("images", "labels"):
        (assets / part).mkdir(parents=True, exist_ok=True)
    images, labels, _ = made["heldout"]
    for i in range(min(ASSET_COUNT, len(images))):
        (assets / "images" / f"{i:04d}.jpg").write_bytes(encode_jpeg(images[i]))
        (assets / "labels" / f"{i:04d}.png").write_bytes(encode_png(labels[i]))
    (assets / "classes.json").write_text(classes + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--train", type=int, default=0, metavar="N", help="write N training scenes")
    parser.add_argument("--closeup", type=int, default=0, metavar="N", help="write N close-ups: one large object each")
    parser.add_argument("--wide", type=int, default=0, metavar="N", help="write N scenes of wider variety")
    parser.add_argument("--wide-closeup", type=int, default=0, metavar="N", help="write N close-ups of wider variety")
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="write N scenes to choose settings on")
    parser.add_argument(
        "--heldout", type=int, default=0, metavar="N", help="write N held-out scenes, in style and Twemoji"
    )
    parser.add_argument("--ship", action="store_true", help="with --heldout: also write heldout.zip and the assets")
    parser.add_argument("--out", type=Path, default=Path("scenes"))
    parser.add_argument("--npm", default="/tmp/npm", help="folder with the iconify-json-*.tgz tarballs")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    trained = {split: getattr(args, split) for split in ("train", "closeup", "wide", "wide_closeup")}
    if not any((args.heldout, args.validation, *trained.values())):
        parser.error("nothing to make: give --train N, --heldout N or another split")
    if args.heldout:
        made = write_heldout(args.out, args.heldout, args.npm, args.workers)
        print("wrote", *(args.out / f"{split}.npz" for split in made))
        if args.ship:
            ship(made)
            print(f"wrote {ZIP} and {ASSETS}")
    if args.validation:
        splits = ("validation", "validation_twemoji")
        made = write_heldout(args.out, args.validation, args.npm, args.workers, splits)
        print("wrote", *(args.out / f"{split}.npz" for split in made))
    for split, count in trained.items():
        if count:
            print("wrote", write_train(args.out, count, args.npm, args.workers, split))


if __name__ == "__main__":
    main()
