"""Pseudo labels for the generated scenes: several readings of the teacher; of every class the surest pixels.

    python -m experiments.label_scenes --scenes data/scenes/train --out data/scene-labels

Writes OUT/000000.png … for `labels_from` of a `distill` run, and OUT/labels.json. Goes on after Ctrl-C.

- Labels are the argmax of the mean logits over three sizes and the mirror image: 30.1 mIoU on the first 6,000 training
  scenes (one reading on the held-out ones: 28.4).
- Of every class the most probable `keep` of its pixels stay, the rest becomes 255 (class-balanced self-training, Zou et
  al. 2018). One threshold for all classes keeps stuff and drops objects. Of the pixels that are objects in truth and
  keep a label, right / called stuff / called another object, in %:

      all pixels                          44 / 32 / 24     46 of 60 objects are called by their own name most often
      probability above 0.35              53 / 36 / 11     40
      surest half of every class          80 /  3 / 17     53
      half of objects, 80% of stuff       67 / 18 / 15     52     (--keep 0.5 --keep-stuff 0.8)

  The surest half of everything has the purest labels, and none near an object's border: a student of 200 steps then
  paints objects too large (pixel accuracy 75.7 against 81.1 with 80% of stuff, at the same mIoU).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from maskclip_jax import load_clip
from maskclip_jax.clip.load import Pretrained
from maskclip_jax.commands.common import progress
from maskclip_jax.data.images import atomic_path, write_json, write_label_png
from maskclip_jax.data.scene_classes import SCENE_CLASSES, SCENE_STUFF
from maskclip_jax.data.vocabulary import class_palette
from maskclip_jax.segment.classifier import text_classifier

VIEWS = ((128, False), (144, False), (144, True), (192, False))  # side in pixels, mirrored
BATCH, PART = 20, 500


def read_views(
    pretrained: Pretrained, images: UInt8[Array, "B H W 3"], classifier: Float[Array, "C E"]
) -> tuple[Int[Array, "B H W"], Float[Array, "B H W"]]:
    """Class and probability of every pixel, by the mean of the views' logits."""
    preprocess, shape = pretrained.preprocess, images.shape[1:3]
    mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    pixels, total = (images.astype(jnp.float32) / 255 - mean) / std, 0
    for side, mirrored in VIEWS:
        view = jax.image.resize(pixels, (len(pixels), side, side, 3), "cubic")
        view = view[:, :, ::-1] if mirrored else view
        features = pretrained.model.apply(pretrained.variables, view, method="encode_dense").features
        features = features[:, :, ::-1] if mirrored else features
        total += jax.image.resize(features @ classifier.T, (len(pixels), *shape, len(classifier)), "linear")
    probabilities = jax.nn.softmax(total / len(VIEWS) * jnp.exp(pretrained.variables["params"]["logit_scale"]))
    return probabilities.argmax(-1), probabilities.max(-1)


def read_scenes(
    pretrained: Pretrained, images: UInt8[np.ndarray, "N H W 3"], parts: Path
) -> tuple[UInt8[np.ndarray, "N H W"], UInt8[np.ndarray, "N H W"]]:
    """Labels, and their probabilities in 255ths; kept in `parts` piece by piece, and found there by the next call."""
    classifier = jnp.asarray(text_classifier(pretrained, list(SCENE_CLASSES)))
    read = jax.jit(partial(read_views, pretrained, classifier=classifier))
    parts.mkdir(parents=True, exist_ok=True)
    found = []
    with progress("labelling", len(images)) as report:
        for start in range(0, len(images), PART):
            path, piece = parts / f"{start:06d}.npz", images[start : start + PART]
            if not path.is_file():
                read_piece = [read(piece[i : i + BATCH]) for i in range(0, len(piece), BATCH)]
                labels, sure = (np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*read_piece, strict=True))
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, labels=labels.astype(np.uint8), sure=(255 * sure).astype(np.uint8))
            with np.load(path) as file:
                found.append((file["labels"], file["sure"]))
            report(start + len(piece))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def surest(
    labels: UInt8[np.ndarray, "N H W"], sure: UInt8[np.ndarray, "N H W"], keep: Sequence[float]
) -> UInt8[np.ndarray, "N H W"]:
    """Labels, 255 where a pixel is not among the surest `keep[class]` of its class."""
    least = np.zeros(256, np.uint8)
    for label in np.unique(labels):
        least[label] = np.quantile(sure[labels == label], 1 - keep[label])
    return np.where(sure >= least[labels], labels, 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, help="a folder that make_scenes wrote (images.npy)")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--keep", type=float, default=0.5, help="share of every object class's pixels")
    parser.add_argument("--keep-stuff", type=float, default=0.8, help="of every stuff class's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    images = np.load(args.scenes / "images.npy", mmap_mode="r")[: args.count]
    keep = [args.keep_stuff if name in SCENE_STUFF else args.keep for name in SCENE_CLASSES]
    labels = surest(*read_scenes(load_clip(args.model), images, args.out / "parts"), keep)
    palette = class_palette(list(SCENE_CLASSES))
    for row, label in enumerate(labels):
        write_label_png(args.out / f"{row:06d}.png", label, palette)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {"views": VIEWS}
    write_json(args.out / "labels.json", settings)


if __name__ == "__main__":
    main()
