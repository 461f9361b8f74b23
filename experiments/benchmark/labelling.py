"""Labelling a folder of JPEGs from end to end, against the model alone on the same batches."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from experiments.benchmark import flops
from experiments.benchmark.work import Case, random_pretrained, unit_rows
from maskclip_jax.data.images import read_image
from maskclip_jax.data.preprocess import prepare
from maskclip_jax.data.vocabulary import parse_classes
from maskclip_jax.label.corpus import FileCorpus
from maskclip_jax.label.labellers import Devices
from maskclip_jax.label.run import BATCHES_OF_A_BLOCK, LabelOptions, label_shard
from maskclip_jax.segment.grid import padded_batch, score_batch
from maskclip_jax.segment.settings import PredictionSettings, prediction_settings

SHAPES = ((375, 500), (375, 500), (375, 500), (500, 375))  # VOC's usual sizes, a quarter of them upright


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs that cost what photographs cost to decode: soft shapes with grain, 40 to 80 kB."""
    rng, paths = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(soft, np.float32) + grain, 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:05d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def random_settings(model: str, dtype: str, batch_size: int) -> PredictionSettings:
    """MaskCLIP without refinement, VOC's 20 classes, random weights of the real shapes."""
    pretrained = random_pretrained(model, dtype)
    classes = parse_classes("voc20")
    classifier = unit_rows(len(classes), pretrained.config.embed_dim)
    return prediction_settings(classes, pretrained, classifier=classifier, batch_size=batch_size)


def label(
    part: str = "all", model: str = "ViT-B/16", images: int = 500, batch: int = 8, dtype: str = "float32"
) -> Case:
    """`part` "all": as `run.py label` does it, from file to file. "bare": only the model, on the batches that this
    comes to, already in memory."""
    settings = random_settings(model, dtype, batch)
    folder = Path(tempfile.mkdtemp(prefix="labelling-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    photos, out = folder / "photos", folder / "out"
    paths = write_photos(photos, images)
    options = LabelOptions(shard_size=images)
    p, block = settings.preprocess, BATCHES_OF_A_BLOCK * batch
    sizes = [SHAPES[i % len(SHAPES)] for i in range(images)]
    blocks = [range(start, min(start + block, images)) for start in range(0, images, block)]
    devices = Devices(settings)
    planned = [(b[0], found) for b in blocks for found in devices.batches([sizes[i] for i in b])]
    words = len(settings.names)
    count = sum(len(found.rows) * flops.dense(settings.config, *found.shape, words) for _, found in planned)
    if part == "all":

        def run() -> None:
            shutil.rmtree(out, ignore_errors=True)  # else everything is there already
            label_shard(FileCorpus(photos), settings, options, out, 0)

        return Case(run, count, images, {})

    filled: dict[tuple, tuple] = {}
    for first, (shape, size, rows) in planned:
        if (shape, size) not in filled:
            image = prepare(read_image(paths[first + rows[0]]), p, settings.config.multiple).pixels
            filled[shape, size] = devices.split(*padded_batch([image] * size, size, shape))

    def run_bare() -> None:
        for _, (shape, size, _) in planned:
            jax.block_until_ready(score_batch(devices.settings, *filled[shape, size]))

    return Case(run_bare, count, images, {})
