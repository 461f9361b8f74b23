"""Data sets by name, and the two scores that most cells are: a CLIP read densely, a trained student."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.records import ROOT, Cell, Missing, Settings, percent
from maskclip_jax import load_clip
from maskclip_jax.checkpoints.load import EMBEDDED, embedded_folder
from maskclip_jax.checkpoints.pretrained import Pretrained
from maskclip_jax.cli.common import progress
from maskclip_jax.cli.demo import SHOWN, sheet_row
from maskclip_jax.data.sources import DataSource, open_source
from maskclip_jax.data.vocabulary import class_palette, class_set, unseen_classes
from maskclip_jax.distill import is_run
from maskclip_jax.distill.checkpoint import FOLDER
from maskclip_jax.distill.evaluation import evaluate_student
from maskclip_jax.distill.experiment import load_experiment
from maskclip_jax.distill.run_log import read_metrics
from maskclip_jax.distill.student_folder import load_student
from maskclip_jax.distill.train import train_and_evaluate
from maskclip_jax.errors import UserError
from maskclip_jax.evaluate.encoder import evaluate_teacher, teacher_reader
from maskclip_jax.evaluate.engine import Counter
from maskclip_jax.evaluate.segmented import evaluate_protocol
from maskclip_jax.segment.classifier import text_classifier
from maskclip_jax.segment.options import Options
from maskclip_jax.segment.predict import segment_images
from maskclip_jax.segment.settings import with_backbone
from maskclip_jax.visualize import area_legend, comparison_sheet

ARCHIVE = ROOT / "experiments" / "toy_world" / "heldout.zip"
EXPERIMENT_FILES = {"embedded": "experiments/configs/scenes.py", "full": "experiments/configs/paper.py"}


class DataSet(NamedTuple):
    """Where a data set is, what its labels mean, and how its images are sized (None: as the checkpoint says)."""

    source: str
    classes: str
    size: dict[str, Any] | None = None


_CAPPED = {"short_side": 512, "long_side": 2048, "within": None}
_WITHIN = {"short_side": None, "long_side": None, "within": (520, 520)}
DATASETS = {
    "scenes": DataSet(f"{ARCHIVE}!heldout", "scenes66"),
    "twemoji": DataSet(f"{ARCHIVE}!heldout_twemoji", "scenes66"),
    "validation": DataSet("data/scenes/validation.npz", "scenes66"),  # by `make_scenes --validation 300`
    "voc20": DataSet("data/voc20/val", "voc20", _CAPPED),
    "context59": DataSet("data/context59/val", "context59", _WITHIN),
    "context60": DataSet("data/context60/val", "context59", _WITHIN),  # the background is class 0: zero-shot
    "cocostuff171": DataSet("data/cocostuff171/val", "coco-stuff171", _CAPPED),
    "ade150": DataSet("data/ade150/val", "ade20k150"),
}
CHECKPOINTS = {
    "r50": "timm/resnet50_clip.openai",
    "r50x16": "timm/resnet50x16_clip.openai",
    "vit_b16": "openai/clip-vit-base-patch16",
}


def open_data(name: str, count: int | None = None) -> DataSource:
    """The first `count` images of a data set by name. Raises Missing where its folder is not here."""
    source = DATASETS[name].source
    if source.startswith("data/") and not (ROOT / source).exists():
        raise Missing(f"{name} is not here: put it at {source} as images/ and labels/ (see the README)")
    source = str(ROOT / source) if source.startswith("data/") else source
    return open_source(source if count is None else f"{source}[0:{count}]")


def unseen_of(data: str) -> tuple[str, ...]:
    """The classes without annotation of the zero-shot protocol."""
    if data in ("scenes", "twemoji"):
        from experiments.configs.scenes import UNSEEN

        return UNSEEN
    return unseen_classes(DATASETS[data].classes)


@functools.lru_cache(maxsize=4)
def pretrained(model: str, fidelity: str = "clip", dense_stride: int | None = None) -> Pretrained:
    """A CLIP, loaded once. Raises Missing where it is neither here nor to be had."""
    try:
        return load_clip(model, fidelity=fidelity, dense_stride=dense_stride)
    except UserError as error:
        raise Missing(f"{model} cannot be loaded: {error}") from error


@functools.cache
def fingerprint(model: str) -> str | None:
    """A shipped checkpoint's weights in twelve digits, so that results of other weights are known to be old."""
    if model not in EMBEDDED:
        return None
    digest = hashlib.sha256()
    for file in sorted(embedded_folder(model).glob("*")):
        if file.suffix == ".safetensors" or file.name == "maskclip.json":
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def recommended_denoising(model: str) -> float:
    """The threshold that a shipped checkpoint recommends, else the paper's; read without loading the checkpoint."""
    if model in EMBEDDED:
        file = embedded_folder(model) / "maskclip.json"
        return json.loads(file.read_text(encoding="utf-8"))["prompt_denoising"] or 0.5
    return 0.5


def inputs_of(model: str) -> dict[str, str] | None:
    """`config["inputs"]` of a cell that reads this checkpoint."""
    found = fingerprint(model)
    return None if found is None else {"checkpoint": found}


def teacher_cell(
    key: str,
    model: str,
    data: str,
    count: int | None,
    *,
    source: Callable[[DataSource], DataSource] | None = None,
    published: float | str | None = None,
    fidelity: str = "clip",
    templates: str | None = None,
    dense_stride: int | None = None,
    unseen: bool = False,
    more: dict[str, Any] | None = None,
    **reading: Any,
) -> Cell:
    """mIoU of a CLIP read densely.

    Args:
      source: what is done to the images first; `more` describes it in the record.
      unseen: score the zero-shot split too.
      reading: `naive`, `prompt_denoising`, `key_smoothing`.
    """
    config = {"model": model, "data": data, "count": count, "fidelity": fidelity, "templates": templates}
    config |= {"dense_stride": dense_stride, "reading": reading, "inputs": inputs_of(model)} | (more or {})

    def compute() -> dict[str, Any]:
        images = open_data(data, count)
        clip, counter = _reader(model, data, fidelity, dense_stride, tuple(sorted(reading.items())))
        names = class_set(DATASETS[data].classes)
        found_later = [i for i, name in enumerate(names) if unseen and str(name) in unseen_of(data)]
        classifier = text_classifier(clip, names, templates)
        images = images if source is None else source(images)
        with progress(key, len(images)) as report:
            found = evaluate_teacher(
                clip, classifier, [str(n) for n in names], images, batch_size=20,
                progress=lambda done, total: report(done), counter=counter, unseen=found_later,
                options=options_of(reading),
            )  # fmt: skip
        return percent(found)

    return Cell(key, config, compute, published)


def protocol_cell(
    key: str,
    model: str,
    data: str,
    count: int | None,
    options: dict[str, Any],
    load: Callable[[str], tuple[Pretrained, np.ndarray | None]] = lambda model: (pretrained(model), None),
) -> Cell:
    """mIoU of the masks that `segment_images` makes with these options, windows, PAMR and all.

    Args:
      load: the model's name -> the model, and the classifier's rows (None: made from the words).
    """
    config = {"model": model, "data": data, "count": count, "options": options, "inputs": inputs_of(model)}

    def compute() -> dict[str, Any]:
        source, classes = open_data(data, count), class_set(DATASETS[data].classes)
        clip, rows = load(model)
        with progress(key, len(source)) as report:
            return percent(
                evaluate_protocol(
                    clip, source, classes=classes, classifier=rows, batch_size=20, **options,
                    progress=lambda done, total: report(done),
                )
            )  # fmt: skip

    return Cell(key, config, compute)


@functools.lru_cache(maxsize=2)  # cells that differ in their images share their programs
def _reader(
    model: str, data: str, fidelity: str, dense_stride: int | None, reading: tuple[tuple[str, Any], ...]
) -> tuple[Pretrained, Counter]:
    clip, size = pretrained(model, fidelity, dense_stride), DATASETS[data].size
    if size is not None:
        clip = dataclasses.replace(clip, preprocess=dataclasses.replace(clip.preprocess, **size))
    options = options_of(dict(reading))
    clip = with_backbone(clip, options)
    return clip, Counter(teacher_reader(clip, options), len(class_set(DATASETS[data].classes)))


def options_of(reading: Mapping[str, Any]) -> Options:
    """A reading as the records name it, where CLIP's own last attention is `naive`."""
    given = dict(reading)
    return Options(**({"method": "clip"} if given.pop("naive", False) else {}), **given)


def scenes_sheet(readings: Mapping[str, dict[str, Any]], model: str) -> np.ndarray:
    """Some of the scenes, read with the options of `segment_images` that each column is given, beside the truth."""
    source, clip = open_data("scenes", max(SHOWN) + 1), pretrained(model)
    shown, names = [source[i] for i in SHOWN], [str(n) for n in class_set("scenes66")]
    classifier, palette = text_classifier(clip, names), class_palette(names)
    images = [e.image for e in shown]
    columns = [
        segment_images(images, names, clip, options_of(reading), classifier=classifier) for reading in readings.values()
    ]
    truths = [e.labels for e in shown if e.labels is not None]
    rows = [
        sheet_row(image, truth, [one.labels for one in found], palette)
        for image, truth, *found in zip(images, truths, *columns, strict=True)
    ]
    present = np.concatenate([truth.ravel() for truth in truths])[None]
    legend = area_legend(present, names, palette)
    return comparison_sheet(["image", *readings, "truth"], rows, legend=legend, panel=160)


def run_folder(settings: Settings, variant: str, seed: int) -> Path:
    """Where the run of a variant is, or would be: DIR/VARIANT-SEED."""
    return settings.runs / f"{variant.replace('/', '_')}-{seed}"


def distill_command(settings: Settings, variant: str, seed: int = 0) -> str:
    """What trains a variant."""
    folder = run_folder(settings, variant, seed)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    change = f" --set seed={seed}" if seed else ""
    return f"python run.py distill {EXPERIMENT_FILES[settings.scale]}:{variant}{change} --out {shown}"


def student_cell(
    settings: Settings,
    key: str,
    variant: str,
    *,
    data: str = "scenes",
    count: int | None = None,
    seed: int = 0,
    published: float | str | None = None,
) -> Cell:
    """Scores of a trained student; empty, with the command that trains it, where there is no run."""
    folder = run_folder(settings, variant, seed)
    command = distill_command(settings, variant, seed)
    inputs = _run_inputs(folder) if settings.look else None
    config = {"variant": variant, "seed": seed, "data": data, "count": count, "inputs": inputs}

    def compute() -> dict[str, Any]:
        if not is_run(folder) or (settings.train and not _finished(folder)):
            if not settings.train:
                raise Missing(f"no run at {folder}: {command}")
            experiment = load_experiment(f"{ROOT / EXPERIMENT_FILES[settings.scale]}:{variant}", [f"seed={seed}"])
            train_and_evaluate(experiment, folder)
            config["inputs"] = _run_inputs(folder)
        trained = load_student(folder, "latest")  # the best one was chosen on the scored scenes
        images = open_data(data, count)
        with progress(key, len(images)) as report:
            found = evaluate_student(
                trained.config, trained.variables, trained.text, images, batch_size=20,
                progress=lambda done, total: report(done),
            )  # fmt: skip
        about = {"step": trained.step, "steps": trained.config.steps, "teacher": trained.config.teacher.model}
        curve = [[line["step"], round(line["eval/mIoU"], 2)] for line in read_metrics(folder) if "eval/mIoU" in line]
        return percent(found) | about | {"curve": curve}

    return Cell(key, config, compute, published, command)


def _run_inputs(folder: Path) -> dict[str, Any] | None:
    """The run's config in twelve digits and its checkpoints' steps."""
    if not is_run(folder) or not (folder / FOLDER).is_dir():
        return None
    config = json.loads((folder / "config.json").read_text())
    for name in ("train_data", "eval_data", "backbone_weights", "init_from"):  # where things lie on this machine
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    return {
        "config": digest,
        "checkpoints": sorted(int(p.name) for p in (folder / FOLDER).iterdir() if p.name.isdigit()),
    }


def _finished(folder: Path) -> bool:
    steps = json.loads((folder / "config.json").read_text())["steps"]
    return steps in (_run_inputs(folder) or {"checkpoints": []})["checkpoints"]
