"""The bars of the embedded CLIPs: mIoU on 500 held-out scenes, 66 names as prompts, in style and redrawn in Twemoji.

    python -m experiments.toy_world.score --model embedded-resnet --out experiments/toy_world/results/resnet.json

Needs only what is in the repository (`heldout.zip`), no fonts. Thresholds of prompt denoising are swept. With
`--scenes`, those of another data source (an `.npz` file of `make_scenes` or `other_scenes`) are scored instead.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.harness.records import with_errors
from maskclip_jax import load_clip
from maskclip_jax.cli.common import progress
from maskclip_jax.cli.demo import score as percentages
from maskclip_jax.data.sources import open_source
from maskclip_jax.data.vocabulary import SCENE_CLASSES
from maskclip_jax.data.whole_files import write_json
from maskclip_jax.errors import UserError
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.predict import segment_images

ARCHIVE = Path(__file__).with_name("heldout.zip")
READINGS = {
    "naive": {"method": "clip"},
    "MaskCLIP": {},
    **{f"PD {t}": {"prompt_denoising": t} for t in (0.2, 0.3, 0.4, 0.5, 0.7, 0.8)},
    "KS": {"key_smoothing": True},
    "PD 0.3 + KS": {"prompt_denoising": 0.3, "key_smoothing": True},
}


def load_split(split: str, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Images, label maps and class names of `heldout` or `heldout_twemoji`."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = json.loads(archive.read("classes.json"))
        read = lambda name: np.asarray(Image.open(io.BytesIO(archive.read(name))))  # noqa: E731
        images = [read(f"{split}/images/{i:04d}.jpg") for i in range(count)]
        labels = [read(f"{split}/labels/{i:04d}.png") for i in range(count)]
    return images, labels, names


def load_source(text: str, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """The same of another source (`open_source`). Raises UserError where it has no masks."""
    source = open_source(text)
    examples = [source[i] for i in range(min(count, len(source)))]
    if any(one.labels is None for one in examples):
        raise UserError(f"scores need masks, but {text} has none: add labels")
    return [one.image for one in examples], [one.labels for one in examples], list(SCENE_CLASSES)


def read_scenes(pretrained, scenes, classifier, title: str, **options) -> dict[str, float]:
    """mIoU (all, objects, stuff) and pixel accuracy in % of one reading of `load_split`'s scenes."""
    images, labels, names = scenes
    with progress(title, len(images)) as report:
        found = segment_images(
            images,
            names,
            pretrained,
            classifier=classifier,
            batch_size=25,
            progress=lambda done, total: report(done),
            **options,
        )
    found = percentages(labels, [one.labels for one in found], names)
    return {name: round(value, 2) for name, value in found.items()}


def score(pretrained, split: str, scenes, readings=READINGS) -> dict[str, dict[str, float]]:
    """`read_scenes`, and seconds, of every reading."""
    classifier = text_classifier(pretrained, scenes[2])
    out = {}
    for reading, options in readings.items():
        began = time.monotonic()
        out[reading] = read_scenes(pretrained, scenes, classifier, f"{split} {reading}", **options)
        out[reading]["seconds"] = round(time.monotonic() - began, 1)
        print(f"{split:<16} {reading:<12} " + "  ".join(f"{k} {v}" for k, v in out[reading].items()), flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--scenes", metavar="SOURCE", help="an .npz file or folder instead of the held-out scenes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with_errors(lambda: write_scores(args))


def write_scores(args: argparse.Namespace) -> None:
    """Prints all scores, and writes them to `--out`. Raises UserError for a model or source that is none."""
    other = load_source(args.scenes, args.count) if args.scenes else None
    pretrained = load_clip(args.model)
    result = {
        "model": args.model,
        "scenes": args.count,
        "protocol": f"short side {pretrained.preprocess.short_side}, stride {pretrained.config.stride}, 66 names, "
        f"templates {pretrained.reading.templates}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }
    if other is not None:
        result["scenes"] = args.scenes
        result["scores"] = score(pretrained, Path(args.scenes).stem, other)
    else:
        few = {name: READINGS[name] for name in ("naive", "MaskCLIP", "PD 0.3")}
        for split, readings in (("heldout", READINGS), ("heldout_twemoji", few)):
            result[split] = score(pretrained, split, load_split(split, args.count), readings)
    if args.out:
        write_json(args.out, result)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
