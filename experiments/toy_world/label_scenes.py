"""Pseudo labels for the generated scenes: several readings of the teacher; of every class the surest pixels.

    python -m experiments.toy_world.label_scenes --scenes data/scenes/train --out data/labels-vit

Writes OUT/000000.png … for `labels_from` of a `distill` run, and OUT/labels.json. Goes on after Ctrl-C.

- Labels are the argmax of the mean logits of several readings (`VIEWS`). Of today's ViT with 8 steps of PAMR, balanced
  by half, on 200 validation scenes: 77.4 mIoU; of the surest half of the objects and 65% of stuff 92.2, of 80 and 90%
  87.7. All other figures here are of the first embedded CLIPs (until f31adef). Of that ViT on 200 held-out scenes: one
  reading 38.5 mIoU, with its mirror image 39.3, four moved by half a patch 43.7, all of them and denoising 46.2; on the
  training scenes 49.4.
- Of every class the most probable `keep` of its pixels stay, the rest becomes 255 (class-balanced self-training, Zou et
  al. 2018). One threshold for all classes keeps stuff and drops objects. Of the pixels that are objects in truth and
  keep a label, right / called stuff / called another object, in %, and mIoU of the labelled pixels:

                                        ResNet                  ViT
      all pixels                        44 / 32 / 24  30.1      61 / 21 / 19  49.4
      probability above 0.35            53 / 36 / 11  34.3
      half of objects, 80% of stuff     67 / 18 / 15  46.6      88 /  2 / 10  75.0
      60% of objects, 80% of stuff      67 / 16 / 18  44.6      86 /  2 / 12  71.4

- PAMR before the choice (`--pamr 10`): borders of objects become sure. On 600 training scenes, where the labels of an
  object pixel that stays are right / called stuff / called another object, in %, and mIoU of what stays:

      ResNet, half of objects, 70% of stuff              75 / 10 / 15  50.5
      the same with PAMR, 65% of stuff                   81 /  6 / 13  60.8
      by the student of those (`--model runs/large-0`)   81 /  2 / 17  63.1
      35% of objects, balanced (`--balance 0.7`)         82 /  9 /  9  69.8
      ViT (240 scenes), half of objects, 65% of stuff    86 /  2 / 12  77.2
      the same, not denoised, `--balance 0.5`            87 /  1 / 12  77.7
      35% of objects of these                            91 /  1 /  8  83.2

- Balanced, every object wins about as many pixels before the choice (`balancing_bias`): the ResNet calls most objects
  by a dozen names. Without it six classes (cat, bird, rabbit, bicycle, bottle, guitar) are right in less than a fifth
  of their pixels that are labelled; with it none is.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from experiments.harness.records import with_errors
from maskclip_jax import load_clip
from maskclip_jax.cli.common import progress
from maskclip_jax.data.images import write_label_png
from maskclip_jax.data.vocabulary import SCENE_CLASSES, SCENE_STUFF, class_palette
from maskclip_jax.data.whole_files import atomic_path, write_json
from maskclip_jax.distill.evaluation import student_reader
from maskclip_jax.distill.student_folder import load_student
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import teacher_reader
from maskclip_jax.evaluate.engine import Reader
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.pamr import pamr
from maskclip_jax.segment.refine import prompt_denoising

BATCH, PART = 20, 500
BALANCED_ON = 500  # scenes that the shares of the objects are counted on
DILATIONS, CANDIDATES = (1, 2, 4, 8), 16  # of PAMR


class View(NamedTuple):
    """A reading: the side in pixels that a scene is resized to, mirrored or not, moved down and right by pixels."""

    side: int
    mirrored: bool = False
    down: int = 0
    right: int = 0


# A ViT's cells are 8 pixels wide: moved by half of that, four readings interleave. A ResNet's overlap already.
VIEWS = {
    "embedded": (View(176), View(176, True, 4, 4), View(176, False, 0, 4), View(176, True, 4, 0)),
    "embedded-resnet": (View(128), View(144), View(144, True), View(192)),
}
STUDENT_VIEWS = (View(128), View(128, True, 4, 4), View(160, True))


class Labeller(NamedTuple):
    """A teacher, or a student that teaches the next one."""

    reader: Reader
    variables: Any
    scale: float  # probabilities are softmax(scale · scores)
    stride: int
    views: tuple[View, ...]


def labeller_of(model: str) -> Labeller:
    """An embedded CLIP by name, or the folder of a run. Raises UserError for a student of other classes."""
    if model in VIEWS:
        pretrained = load_clip(model)
        variables = {"clip": pretrained.variables, "text": jnp.asarray(text_classifier(pretrained, SCENE_CLASSES))}
        scale = float(jnp.exp(pretrained.variables["params"]["logit_scale"]))
        return Labeller(teacher_reader(pretrained), variables, scale, pretrained.config.stride, VIEWS[model])
    trained = load_student(model, "latest")
    if trained.config.label_names != SCENE_CLASSES:
        raise UserError(f"labels are those of the scenes' classes, but {model} learned others: choose another run")
    variables = {"student": trained.variables, "text": trained.text}
    return Labeller(student_reader(trained.config), variables, 1.0, trained.config.student.output_stride, STUDENT_VIEWS)


def read_view(labeller: Labeller, variables: Any, pixels: Float[Array, "B H W 3"], view: View) -> Array:
    """Scores of every pixel, [B, H, W, C]."""
    side, stride = view.side, labeller.stride
    x = jax.image.resize(pixels, (len(pixels), side, side, 3), "cubic")
    x = x[:, :, ::-1] if view.mirrored else x
    moved = bool(view.down or view.right)
    if moved:  # one more row and column of cells, the border repeated
        around = ((view.down, stride - view.down), (view.right, stride - view.right))
        x = jnp.pad(x, ((0, 0), *around, (0, 0)), mode="edge")
    scores = labeller.reader.scores(variables, x, None).values
    sizes = zip(scores.shape[1:3], x.shape[1:3], pixels.shape[1:3], strict=True)
    rows, columns = (
        _axis(*size, slice(start, start + side) if moved else slice(None), mirrored)
        for size, start, mirrored in zip(sizes, (view.down, view.right), (False, view.mirrored), strict=True)
    )
    return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, scores)


def _axis(cells: int, side: int, size: int, inside: slice, mirrored: bool) -> Float[Array, "H h"]:
    """What brings a row of cells to `side` pixels, cuts `inside` out, mirrors it and resizes that to `size`: one matrix
    for all, as the scores of every class at every pixel take far longer to resize than a view takes to read."""
    found = jax.image.resize(jnp.eye(cells), (side, cells), "linear")[inside]
    return jax.image.resize(found[::-1] if mirrored else found, (size, cells), "linear")


def read_scores(
    labeller: Labeller, variables: Any, images: UInt8[Array, "B H W 3"], threshold: float
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """Pixels as the teacher takes them, and logits by the mean of the views' scores: as they are, and denoised at
    `threshold`."""
    preprocess, scale = labeller.reader.preprocess, labeller.scale
    pixels = (images.astype(jnp.float32) / 255 - np.asarray(preprocess.mean)) / np.asarray(preprocess.std)
    scores: Any = sum(read_view(labeller, variables, pixels, view) for view in labeller.views) / len(labeller.views)
    flat = scores.reshape(len(scores), -1, scores.shape[-1])
    return (
        pixels,
        scale * scores,
        scale * prompt_denoising(flat, scale=scale, threshold=threshold).reshape(scores.shape),
    )


def read_views(
    labeller: Labeller,
    variables: Any,
    images: UInt8[Array, "B H W 3"],
    bias: Float[Array, " C"],
    threshold: float,
    steps: int = 0,
) -> tuple[Int[Array, "B H W"], Float[Array, "B H W"]]:
    """Class and probability of every pixel by `read_scores`, with `bias` added to the logits; `steps` of PAMR let the
    probabilities of an image's `CANDIDATES` likeliest classes follow its edges."""
    pixels, raw, denoised = read_scores(labeller, variables, images, threshold)
    if not steps:
        labels = (denoised + bias).argmax(-1)
        return labels, jnp.take_along_axis(jax.nn.softmax(raw + bias), labels[..., None], axis=-1)[..., 0]
    probabilities = jax.nn.softmax(denoised + bias)
    classes = jax.lax.top_k(probabilities.max((1, 2)), CANDIDATES)[1]  # PAMR mixes no classes: the others cannot win
    some = jnp.take_along_axis(probabilities, classes[:, None, None], axis=-1)
    # On a CPU an image at a time stays in its cache; a GPU would wait for a hundred small kernels of every image.
    together = 1 if jax.default_backend() == "cpu" else len(images)
    some = jax.lax.map(lambda one: pamr(*one, steps=steps, dilations=DILATIONS), (some, pixels), batch_size=together)
    best = jnp.take_along_axis(classes, some.argmax(-1).reshape(len(images), -1), axis=-1)
    return best.reshape(some.shape[:3]), some.max(-1)


def balancing_bias(
    logits: Float[np.ndarray, "P C"], balanced: Sequence[bool], rounds: int = 25, rate: float = 0.3
) -> Float[np.ndarray, " C"]:
    """What to add to the logits so that each of the `balanced` classes wins as many of the pixels P; 0 for the others.
    Distribution alignment (Berthelot et al. 2020) with equal shares, on the argmax as logit adjustment is."""
    bias, chosen = np.zeros(logits.shape[-1]), np.asarray(balanced)
    for _ in range(rounds):
        won = np.bincount((logits + bias).argmax(-1), minlength=len(bias)) + len(logits) * 2e-5  # no class has none
        bias += np.where(chosen, rate * np.log(won[chosen].mean() / won), 0)
    return bias


def read_scenes(
    labeller: Labeller,
    images: UInt8[np.ndarray, "N H W 3"],
    parts: Path,
    threshold: float,
    steps: int = 0,
    balance: float = 0,
) -> tuple[UInt8[np.ndarray, "N H W"], UInt8[np.ndarray, "N H W"]]:
    """Labels, and their probabilities in 255ths; kept in `parts` piece by piece, and found there by the next call.
    `balance` times the bias that balances the objects on the first `BALANCED_ON` images is added to the logits."""
    variables = jax.device_put(labeller.variables)
    parts.mkdir(parents=True, exist_ok=True)
    bias = np.zeros(len(SCENE_CLASSES))
    if balance:
        bias = balance * _kept_bias(parts / "bias.npy", labeller, variables, images[:BALANCED_ON], threshold)
    read = jax.jit(partial(read_views, labeller, bias=jnp.asarray(bias, jnp.float32), threshold=threshold, steps=steps))
    found = []
    with progress("labelling", len(images)) as report:
        for start in range(0, len(images), PART):
            path, piece = parts / f"{start:06d}.npz", images[start : start + PART]
            if not path.is_file():
                batches = (piece[i : i + BATCH] for i in range(0, len(piece), BATCH))
                read_piece = [read(variables, batch) for batch in batches]
                labels, sure = (np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*read_piece, strict=True))
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, labels=labels.astype(np.uint8), sure=(255 * sure).astype(np.uint8))
            with np.load(path) as file:
                found.append((file["labels"], file["sure"]))
            report(start + len(piece))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _kept_bias(path: Path, labeller: Labeller, variables: Any, images: np.ndarray, threshold: float) -> np.ndarray:
    """The bias that balances the objects on `images`, from `path` where an earlier call left it."""
    if not path.is_file():
        read = jax.jit(lambda variables, batch: read_scores(labeller, variables, batch, threshold)[2][:, ::4, ::4])
        logits = np.concatenate([read(variables, images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
        balanced = [name not in SCENE_STUFF for name in SCENE_CLASSES]
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, balancing_bias(logits.reshape(-1, logits.shape[-1]), balanced))
    return np.load(path)


def surest(
    labels: UInt8[np.ndarray, "N H W"], sure: UInt8[np.ndarray, "N H W"], keep: Sequence[float]
) -> UInt8[np.ndarray, "N H W"]:
    """Labels, 255 where a pixel is not among the surest `keep[class]` of its class (below its `1 - keep` quantile)."""
    counts = np.zeros((256, 256), np.int64)  # [class, probability]: one pass for all classes, and nothing is sorted
    for label, value in zip(labels, sure, strict=True):
        places = 256 * label.ravel().astype(np.int64) + value.ravel()
        counts += np.bincount(places, minlength=counts.size).reshape(counts.shape)
    least = np.zeros(256, np.uint8)
    for label in np.flatnonzero(counts.sum(axis=1)):
        upto = counts[label].cumsum()
        place = (1 - keep[label]) * (upto[-1] - 1)
        below, above = np.searchsorted(upto, [np.floor(place), np.ceil(place)], side="right")
        least[label] = below + (place % 1) * (above - below)
    return np.stack([np.where(s >= least[x], x, 255) for x, s in zip(labels, sure, strict=True)]).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, required=True, help="a folder that make_scenes wrote (images.npy)")
    parser.add_argument("--model", default="embedded", help=f"{', '.join(VIEWS)}, or the folder of a student's run")
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--prompt-denoising", type=float, default=0.5)
    parser.add_argument("--pamr", type=int, default=0, metavar="N", help="steps of PAMR")
    parser.add_argument("--balance", type=float, default=0, metavar="A", help="0 to 1: how far objects win alike")
    parser.add_argument("--keep", type=float, default=0.6, help="share of every object class's pixels")
    parser.add_argument("--keep-stuff", type=float, default=0.8, help="of every stuff class's")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with_errors(lambda: label_scenes(args))


def label_scenes(args: argparse.Namespace) -> None:
    """Writes the masks. Raises UserError for a model that is none, or no folder of scenes."""
    if not (args.scenes / "images.npy").is_file():
        raise UserError(f"--scenes is a folder that make_scenes wrote, but {args.scenes} has no images.npy: make it")
    images = np.load(args.scenes / "images.npy", mmap_mode="r")[: args.count]
    if args.balance and len(images) < BALANCED_ON:
        raise UserError(f"--balance counts on {BALANCED_ON} scenes, got {len(images)}: take more, or leave it out")
    keep = [args.keep_stuff if name in SCENE_STUFF else args.keep for name in SCENE_CLASSES]
    labeller = labeller_of(args.model)
    reading = f"{args.model}-{args.prompt_denoising:g}-{args.pamr}-{labeller.views}"
    reading += f"-{args.balance:g}" if args.balance else ""  # parts of another one do not fit
    parts = args.out / f"parts-{hashlib.sha256(reading.encode()).hexdigest()[:8]}"
    found = read_scenes(labeller, images, parts, args.prompt_denoising, args.pamr, args.balance)
    labels = surest(*found, keep)
    palette = class_palette(list(SCENE_CLASSES))

    def write(row: int) -> None:
        write_label_png(args.out / f"{row:06d}.png", labels[row], palette)

    with ThreadPoolExecutor() as pool:  # zlib works outside Python's lock
        list(pool.map(write, range(len(labels))))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {"views": labeller.views}
    write_json(args.out / "labels.json", settings)


if __name__ == "__main__":
    main()
