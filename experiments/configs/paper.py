"""The full-size runs of the paper (Tables 2 to 4): MaskCLIP+ on VOC, Pascal Context and COCO-Stuff.

    python run.py distill experiments/configs/paper.py:context59/annotation_free/vit_b16 --out runs/context59
    python run.py distill experiments/configs/paper.py:voc20/zero_shot/r50 --set train_data=… --out runs/voc20

Names are DATASET/PROTOCOL/TEACHER: voc20, context59, cocostuff171; a protocol of `PROTOCOLS`; r50, r50x16, vit_b16.
They follow the released configs, habits included: `teacher.fidelity` "released", the loss averaged over all pixels,
images resized as OpenCV does, self-training from iteration T/10 on; VOC20 and Context59 without annotation still see
the annotated foreground (`foreground="annotation"`). The released ViT configs, as shipped, leave the student at
ResNet-50, though their names and the README say R-101: …/vit_b16/resnet50 names that reading.

Data are folders of `images/` and `labels/` (label values as in `DistillConfig.label_names`, 255 = ignore) under
data/, with context60 beside context59 where the background is a class: zero-shot Context and what it is compared with
(`prepare pascal_context … --config context60`). VOC has 20 classes in all of them. Another place is
`--set train_data=… --set eval_data=…`, also tfds:… . None of these was run here: they need the data sets, the
checkpoints and eight GPUs. What they must reach is in `TARGETS` (mIoU, %, released README).
"""

import dataclasses

from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.data.vocabulary import unseen_classes
from maskclip_jax.distill.config import DistillConfig, TeacherConfig
from maskclip_jax.errors import UserError
from maskclip_jax.students import StudentConfig

TEACHERS = {  # checkpoint, width of its embedding
    "r50": ("timm/resnet50_clip.openai", 1024),
    "r50x16": ("timm/resnet50x16_clip.openai", 768),
    "vit_b16": ("openai/clip-vit-base-patch16", 512),
}
DATASETS = {  # class set, crop, steps (annotation-free, zero-shot)
    "voc20": ("voc20", 512, (2_000, 20_000)),
    "context59": ("context59", 480, (4_000, 40_000)),
    "cocostuff171": ("coco-stuff171", 512, (8_000, 80_000)),
}
TARGETS = {
    "voc20/annotation_free/r50": 58.0,
    "voc20/annotation_free/r50x16": 67.5,
    "voc20/zero_shot/r50": 87.8,
    "context59/annotation_free/r50": 23.9,
    "context59/annotation_free/r50x16": 25.2,
    "context59/annotation_free/vit_b16": 31.1,
    "context59/zero_shot/r50": 48.4,
    "cocostuff171/annotation_free/r50": 13.8,
    "cocostuff171/annotation_free/r50x16": 17.3,
    "cocostuff171/annotation_free/vit_b16": 18.0,
    "cocostuff171/zero_shot/r50": 39.7,
}
# mmsegmentation's photometric distortion counts hue in OpenCV's units of two degrees: 18 are 36 degrees.
AUGMENTATION = AugmentConfig(
    short_side=512,
    long_side=2048,
    interpolation="opencv",
    scale=(0.5, 2.0),
    flip=0.5,
    category_max_ratio=0.75,
    least_classes=2,
    crop_retries=10,
    count_unlabelled=True,
    hue=36.0,
)
CONTEXT_AUGMENTATION = dataclasses.replace(AUGMENTATION, short_side=None, long_side=None, within=(520, 520))


# Fine-tuned CLIP starts from the teacher's own tower, so its images are those that CLIP was trained with.
CLIP_TOWER = {
    "backbone_weights": None,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
PROTOCOLS = {
    "annotation_free": "Table 2",
    "annotation_free_refined": "its labels denoised and smoothed",
    "feature": "feature distillation instead of labels",
    "zero_shot": "Table 3: guided, then self-training",
    "zero_shot_guided": "the teacher labels to the end",
    "supervised": "all classes annotated: the upper bound of zero_shot",
    "finetuned_identity": "section 3.2: CLIP's ResNet trained on seen classes; its three mappers",
    "finetuned_linear": "",
    "finetuned_mlp": "",
}


def names() -> list[str]:
    """All runs: only a ResNet can be fine-tuned as a DeepLab's backbone, and one of four stages of plain width."""
    parts = ((d, p, t) for d in DATASETS for p in PROTOCOLS for t in TEACHERS)
    return ["/".join(n) for n in parts if not n[1].startswith("finetuned") or n[2] == "r50"]


def variants() -> list[str]:
    """`names`, and the ViT teacher's runs with the student that the released configs leave it with."""
    return names() + [f"{name}/resnet50" for name in names() if name.endswith("vit_b16")]


def config(name: str = "voc20/annotation_free/vit_b16") -> DistillConfig:
    """One run of the paper."""
    parts = name.split("/")
    if name not in variants():
        raise UserError(
            f"a paper config is one of {', '.join(DATASETS)} / {', '.join(PROTOCOLS)} / {', '.join(TEACHERS)} "
            f"(finetuned: r50; vit_b16 also as vit_b16/resnet50), but {name!r} came: for example voc20/zero_shot/r50"
        )
    dataset, protocol, teacher, *_ = parts
    backbone = parts[3] if len(parts) > 3 else "resnet101"
    classes, crop, (free_steps, zero_shot_steps) = DATASETS[dataset]
    checkpoint, width = TEACHERS[teacher]
    fields = {
        "classes": classes,
        "student": StudentConfig(width=width, head="deeplabv2", backbone=backbone, dropout=0.0),
        "teacher": TeacherConfig(model=checkpoint, fidelity="released"),
        "backbone_weights": "timm/resnet101c.gluon_in1k",
        "train_data": f"data/{dataset}/train",
        "eval_data": f"data/{dataset}/val",
        "steps": free_steps,
        "crop_size": crop,
        "batch_size": 16,
        "loss_mean": "all",
        "augmentation": CONTEXT_AUGMENTATION if dataset == "context59" else AUGMENTATION,
        "evaluate_every": free_steps // 2,
        "checkpoint_every": 500,
        "log_every": 50,
    }
    if protocol in ("annotation_free", "annotation_free_refined", "feature"):
        # COCO-Stuff has a class everywhere: there is no background to keep out.
        fields["foreground"] = "none" if dataset == "cocostuff171" else "annotation"
        if protocol == "annotation_free_refined":
            fields["teacher"] = dataclasses.replace(fields["teacher"], prompt_denoising=0.5, key_smoothing=1.0)
        if protocol == "feature":
            fields["mode"] = "feature"
        return DistillConfig(**fields)
    fields |= {
        "unseen": unseen_classes(classes),
        "steps": zero_shot_steps,
        "evaluate_every": zero_shot_steps // 10,
    }
    if dataset == "context59":  # 60 classes: label 0 is the background, a learnable embedding, so its masks are others
        fields |= {"background": True, "train_data": "data/context60/train", "eval_data": "data/context60/val"}
        fields |= {"learning_rate": 0.004, "weight_decay": 1e-4}
        fields["student"] = dataclasses.replace(fields["student"], head="deeplabv3plus")
    if protocol == "zero_shot":
        # Iterations, counted from 1: guided up to T/10 − 1, self-training from T/10 on.
        fields |= {"mode": "zero-shot", "guided_steps": zero_shot_steps // 10 - 1, "self_training": True}
    elif protocol == "zero_shot_guided":
        fields["mode"] = "zero-shot"
    elif protocol == "supervised":
        fields["mode"] = "supervised"
    else:
        fields |= CLIP_TOWER | {"mode": "finetuned-clip", "mapper": protocol.removeprefix("finetuned_")}
        fields["student"] = StudentConfig(width=width, head="deeplabv2", backbone="resnet50", stem="clip", dropout=0.0)
    return DistillConfig(**fields)
