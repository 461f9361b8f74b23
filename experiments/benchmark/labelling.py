"""Labelling a folder of JPEGs from end to end, against the model alone on the same batches."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from experiments.benchmark import flops
from experiments.benchmark.cases import Case, random_clip, unit_rows
from maskclip_jax.clip.folders import Reading
from maskclip_jax.clip.load import Pretrained
from maskclip_jax.data.images import read_image, write_label_png
from maskclip_jax.data.preprocess import Preprocess, prepare
from maskclip_jax.data.vocabulary import class_palette, parse_classes
from maskclip_jax.segment import whole
from maskclip_jax.segment.predict import iter_segmentations
from maskclip_jax.segment.settings import PredictionSettings, prediction_settings

SHAPES = ((375, 500), (375, 500), (375, 500), (500, 375))  # VOC's usual sizes, a quarter of them upright
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def label_corpus(paths: Sequence[Path], settings: PredictionSettings, out: Path) -> None:
    """A label PNG for every image: the whole way from file to file. The one place to change when another does it."""
    results = iter_segmentations((read_image(path) for path in paths), settings)
    palette = class_palette(settings.names)
    for path, result in zip(paths, results, strict=True):
        write_label_png(out / f"{path.stem}.png", result.labels, palette)


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs that cost what photographs cost to decode: soft shapes with grain, 40 to 80 kB."""
    rng, paths = np.random.default_rng(0), []
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), Image.BICUBIC)
        grain = rng.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(soft, np.float32) + grain, 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:05d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def random_settings(model: str, dtype: str, batch_size: int) -> PredictionSettings:
    """MaskCLIP without refinement, VOC's 20 classes, random weights of the real shapes."""
    clip, variables = random_clip(model, dtype)
    preprocess = Preprocess(MEAN, STD, multiple=clip.config.multiple)
    pretrained = Pretrained(clip, variables, clip.config, lambda prompts: None, preprocess, Reading())
    classes = parse_classes("voc20")
    classifier = unit_rows(len(classes), clip.config.embed_dim)
    return prediction_settings(classes, pretrained, classifier=classifier, batch_size=batch_size)


def label(
    part: str = "all", model: str = "ViT-B/16", images: int = 500, batch: int = 8, dtype: str = "float32"
) -> Case:
    """`part` "all": from file to file. "bare": only the model, on the batches that this comes to, already in memory."""
    settings = random_settings(model, dtype, batch)
    folder = tempfile.TemporaryDirectory(prefix="labelling-")
    paths = write_photos(Path(folder.name), images)
    sizes = [SHAPES[i % len(SHAPES)] for i in range(images)]
    shapes = whole.bucket_shapes(sizes, settings)
    count = sum(flops.dense(settings.config, *shape, len(settings.names)) for shape in shapes)
    if part == "all":

        def run() -> None:
            label_corpus(paths, settings, Path(folder.name) / "labels")

        return Case(run, count, images, {})

    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    batches = []
    for shape, members in groups.items():
        size = whole.batch_size_for(settings, shape, len(members))
        image = prepare(read_image(paths[members[0]]), settings.preprocess, settings.config.multiple).pixels
        filled = jax.device_put(whole.padded_batch([image] * size, size, shape, settings.config))
        batches += [filled] * -(-len(members) // size)

    def run_bare() -> None:
        for pixels, grid in batches:
            scores = whole._scores(
                settings.model, settings.variables, pixels, settings.classifier, grid, None, None, naive=False
            )
            jax.block_until_ready(scores)

    return Case(run_bare, count, images, {})
