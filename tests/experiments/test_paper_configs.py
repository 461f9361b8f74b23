"""All full-size configs beside a table of the released ones (chongzhou96/MaskCLIP): facts, no code; `-s` prints it."""

from pathlib import Path

import pytest

from experiments.configs import paper as paper_configs
from experiments.harness.records import Settings
from experiments.harness.scoring import DATASETS
from experiments.tables import ablations, zero_shot
from maskclip_jax.distill.config import DistillConfig
from maskclip_jax.distill.evaluation import student_reader

ROOT = Path(__file__).resolve().parents[2]

# What differs from data set to data set: label values without background, size, crop, iterations, unseen label values.
WITHOUT = {
    "voc20": (20, (2048, 512), 512, 2_000),
    "context59": (59, (520, 520), 480, 4_000),
    "cocostuff171": (171, (2048, 512), 512, 8_000),
}
WITH = {  # the zero-shot protocol: label values, iterations, last guided iteration, learning rate, decay, head, unseen
    "voc20": (20, 20_000, 1_999, 0.01, 5e-4, "deeplabv2", [15, 16, 17, 18, 19]),
    "context59": (60, 40_000, 3_999, 0.004, 1e-4, "deeplabv3plus", [1, 7, 8, 15, 20, 25, 32, 34, 49, 55]),
    "cocostuff171": (
        *(171, 80_000, 7_999, 0.01, 5e-4, "deeplabv2"),
        [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160],
    ),
}
WIDTHS = {"r50": 1024, "r50x16": 768, "vit_b16": 512}
FREE = ("annotation_free", "annotation_free_refined", "feature")
COLUMNS = (
    *("labels", "background", "unseen", "size", "crop", "steps", "guided", "self-training", "rate", "decay", "head"),
    *("backbone", "width", "dropout", "denoising", "smoothing", "foreground", "evaluated every"),
)
# The same in all of them: SGD 0.9, poly 0.9 down to 1e-4, batch 16, scale 0.5 to 2, crops, flip, distortion, loss.
COMMON = {
    **{"loss_mean": "all", "optimizer": "sgd", "momentum": 0.9, "power": 0.9},
    **{"min_learning_rate": 1e-4, "batch_size": 16, "accumulate": 1, "conf_thresh": None, "backbone_rate": 1.0},
}
AUGMENTATION = {
    **{"scale": (0.5, 2.0), "flip": 0.5, "category_max_ratio": 0.75, "least_classes": 2, "crop_retries": 10},
    **{"count_unlabelled": True, "photometric": True, "brightness": 32.0, "hue": 36.0, "interpolation": "opencv"},
    **{"contrast": (0.5, 1.5), "saturation": (0.5, 1.5)},
}


def released(name: str) -> dict[str, object]:
    """The row of the released configs; where there is none (supervised, fine-tuned), that of its zero-shot run."""
    data, protocol, teacher = name.split("/")
    labels, size, crop, steps = WITHOUT[data]
    row = dict.fromkeys(COLUMNS)
    row |= {"labels": labels, "background": False, "unseen": [], "size": size, "crop": crop, "steps": steps}
    row |= {"guided": 0, "self-training": False, "rate": 0.01, "decay": 5e-4, "head": "deeplabv2", "foreground": "none"}
    row |= {"backbone": "resnet101", "width": WIDTHS[teacher], "dropout": 0.0, "evaluated every": steps // 2}
    if protocol in FREE:
        refined = {"denoising": 0.5, "smoothing": 1.0} if protocol == "annotation_free_refined" else {}
        return row | refined | {"foreground": "none" if data == "cocostuff171" else "annotation"}
    labels, steps, guided, rate, decay, head, unseen = WITH[data]
    row |= {"labels": labels, "background": labels == 60, "unseen": unseen, "steps": steps, "rate": rate}
    row |= {"decay": decay, "head": head, "evaluated every": steps // 10}
    if protocol == "zero_shot":
        row |= {"guided": guided, "self-training": True}
    if protocol.startswith("finetuned"):
        row |= {"head": "deeplabv2", "backbone": "resnet50"}
    return row


def ours(config: DistillConfig) -> dict[str, object]:
    size = config.augmentation
    scale = size.within or (size.long_side, size.short_side)
    student = config.student
    values = (
        *(config.num_classes, config.background, list(config.unseen_labels), scale, config.crop_size, config.steps),
        *(config.guided_steps, config.self_training, config.learning_rate, config.weight_decay, student.head),
        *(student.backbone, student.width, student.dropout, config.teacher.prompt_denoising),
        *(config.teacher.key_smoothing, config.foreground, config.evaluate_every),
    )
    return dict(zip(COLUMNS, values, strict=True))


def test_every_full_size_config_is_the_released_one():
    names = paper_configs.names()
    assert len(names) == len(set(names)) == 63
    print("", *COLUMNS, sep=" | ")
    for name in names:
        config = paper_configs.config(name)
        found = ours(config)
        print(name, *found.values(), sep=" | ")
        assert found == released(name), name
        assert {field: getattr(config, field) for field in COMMON} == COMMON, name
        assert config.teacher.fidelity == "released", name
        assert {field: getattr(config.augmentation, field) for field in AUGMENTATION} == AUGMENTATION, name
        mean = (0.48145466, 0.4578275, 0.40821073) if "finetuned" in name else (0.485, 0.456, 0.406)
        assert config.image_mean == mean
        folder = "context60" if config.background else name.split("/")[0]
        assert (config.train_data, config.eval_data) == (f"data/{folder}/train", f"data/{folder}/val")
        reader = student_reader(config)  # scored at the size of training, nothing padded
        assert reader.preprocess.within == config.augmentation.within
        assert (reader.preprocess.long_side, reader.preprocess.short_side) == (
            (None, None) if config.augmentation.within else (2048, 512)
        )
        assert (reader.preprocess.multiple, reader.preprocess.interpolation) == (1, "opencv")


def test_vit_teachers_with_the_student_that_was_shipped():
    names = paper_configs.variants()
    assert len(names) == 63 + 18
    for name in names[63:]:
        shipped, named = (paper_configs.config(n) for n in (name, name.removesuffix("/resnet50")))
        assert name.endswith("vit_b16/resnet50")
        assert (shipped.student.backbone, named.student.backbone) == ("resnet50", "resnet101")
        assert ours(shipped) == ours(named) | {"backbone": "resnet50"}


@pytest.mark.parametrize("experiment", [zero_shot, ablations])
def test_students_are_scored_on_the_labels_that_they_learned(experiment):
    scored = 0
    for cell in experiment.cells(Settings(scale="full")):
        if "variant" in cell.config:
            config = paper_configs.config(cell.config["variant"])
            assert DATASETS[cell.config["data"]].source == config.eval_data, cell.key
            scored += 1
    assert scored
