"""MaskCLIP+ on the embedded scenes: a small student learns from the embedded CLIP's masks.

    python run.py distill experiments/distill_scenes.py --out runs/scenes
    python run.py distill experiments/distill_scenes.py:demo --out runs/demo
    python run.py distill experiments/distill_scenes.py:large --set train_data=/work/scenes/train --out runs/large

Variants (`FILE.py:NAME`):

    annotation_free   436 images of the shipped archive, without their masks; scored on the 64 scenes of the demo,
                      which are the archive's first: no image is both trained on and scored
    from_clip         the same, with a student whose backbone starts from CLIP's image tower, as the paper's starts from
                      ImageNet: it needs far fewer steps
    demo              from_clip, as much as two cores do in three minutes
    large             generated training scenes (`python -m experiments.embedded.make_scenes --train 40000`), scored on
                      all 500 held-out scenes; the three below too
    zero_shot         six classes without annotation: teacher's labels, then the student's own
    supervised        all annotations, the upper bound of zero_shot
    feature           L1 to the teacher's features, the ablation that loses
    large_vit, large_raw, large_psp, large_v3plus
                      large with the ViT as teacher, without denoising, with other students
    zero_shot_guided  zero_shot without its second phase: the teacher labels to the end
    finetuned_identity, finetuned_linear, finetuned_mlp
                      the paper's section 3.2, which fails on unseen classes: CLIP's own tower trained on seen ones
"""

import dataclasses
from pathlib import Path

from maskclip_jax.clip.load import EMBEDDED
from maskclip_jax.distill.config import AugmentConfig, DistillConfig
from maskclip_jax.distill.students import StudentConfig
from maskclip_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ARCHIVE = ROOT / "experiments" / "embedded" / "heldout.zip"
UNSEEN = ("cow", "bus", "banana", "guitar", "castle", "snowman")

# Dilations for an image of 12-16 positions a side: the published ones, 6 to 24, would see padding only.
STUDENT = StudentConfig(width=128, backbone="small", rates=(1, 2, 4, 6))
# The same head on a backbone of the teacher's own shape, so that the teacher's weights fit.
FROM_CLIP = {
    "student": StudentConfig(
        width=128, layers=(1, 1, 2, 1), base_width=16, expansion=4, stem="clip", rates=STUDENT.rates
    ),
    "backbone_weights": str(ROOT / "maskclip_jax" / "assets" / EMBEDDED["embedded"] / "open_clip_model.safetensors"),
    "image_mean": (0.48145466, 0.4578275, 0.40821073),  # what those weights were trained with
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def config(name: str = "annotation_free") -> DistillConfig:
    """A variant by name."""
    shipped = {"train_data": f"{ARCHIVE}!heldout[64:]", "eval_data": "scenes"}
    generated = {"train_data": str(ROOT / "data" / "scenes" / "train"), "eval_data": f"{ARCHIVE}!heldout"}
    long = generated | {"steps": 6000, "evaluate_every": 500, "checkpoint_every": 250}
    splits = {"unseen": UNSEEN}
    variants = {
        "annotation_free": shipped | {"steps": 1500, "evaluate_every": 250, "checkpoint_every": 250},
        "from_clip": shipped | FROM_CLIP | {"steps": 1000, "evaluate_every": 250, "checkpoint_every": 250},
        "demo": shipped | FROM_CLIP | {"steps": 150, "evaluate_every": 150, "checkpoint_every": 150, "batch_size": 8},
        "large": long,
        "zero_shot": long | splits | {"mode": "zero-shot", "self_training": True, "guided_steps": 600},
        "supervised": long | splits | {"mode": "supervised"},
        "feature": long | {"mode": "feature"},
        "large_vit": long | {"teacher": "embedded-vit", "prompt_denoising": 0.2},
        "large_raw": long | {"prompt_denoising": None},
        "large_psp": long | {"student": dataclasses.replace(STUDENT, head="pspnet", rates=None)},
        "large_v3plus": long | {"student": dataclasses.replace(STUDENT, head="deeplabv3plus", rates=(1, 2, 4, 6))},
        "zero_shot_guided": long | splits | {"mode": "zero-shot"},
    }
    for mapper in ("identity", "linear", "mlp"):
        tower = FROM_CLIP | {"backbone_weights": None, "mode": "finetuned-clip", "mapper": mapper}
        variants[f"finetuned_{mapper}"] = long | splits | tower
    if name not in variants:
        raise UserError(f"distill_scenes has the variants {', '.join(variants)}, but not {name!r}: choose one")
    return DistillConfig(**(COMMON | variants[name]))


COMMON = {
    "classes": "scenes66",
    "student": STUDENT,
    "teacher": "embedded",
    "dense_stride": 8,
    "prompt_denoising": 0.3,  # what the shipped CLIP recommends
    "batch_size": 16,
    "crop_size": 96,
    "learning_rate": 0.05,
    "min_learning_rate": 5e-4,
    "augmentation": AugmentConfig(scale=(0.6, 1.5), hue=10.0),  # colours are what tells some glyphs apart
}
