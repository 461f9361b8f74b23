"""The full-size runs of the paper (Tables 2 to 4): MaskCLIP+ on VOC, Pascal Context and COCO-Stuff.

    python run.py distill experiments/paper_configs.py:context59/annotation_free/vit_b16 --out runs/context59
    python run.py distill experiments/paper_configs.py:voc20/zero_shot/r50 --set train_data=… --out runs/voc20

Names are DATASET/PROTOCOL/TEACHER: voc20, context59, cocostuff171; annotation_free, zero_shot; r50, r50x16, vit_b16.
They follow the released configs, habits included (`teacher_fidelity="released"`, the loss averaged over all pixels;
VOC20 and Context59 without annotation still see the annotated foreground: `foreground="annotation"`).

Data are folders of `images/` and `labels/` (label values as in `DistillConfig.label_names`, 255 = ignore) under
data/; another place is `--set train_data=… --set eval_data=…`, also tfds:… . None of these was run here: they need
the data sets, the checkpoints and eight GPUs. What they must reach is in `TARGETS` (mIoU, %, released README).
"""

from maskclip_jax.data.vocabulary import unseen_classes
from maskclip_jax.distill.config import AugmentConfig, DistillConfig
from maskclip_jax.distill.students import StudentConfig
from maskclip_jax.errors import UserError

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
AUGMENTATION = AugmentConfig(short_side=512, long_side=2048, scale=(0.5, 2.0), category_max_ratio=0.75, hue=36.0)


def config(name: str = "voc20/annotation_free/vit_b16") -> DistillConfig:
    """One run of the paper."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in DATASETS or parts[2] not in TEACHERS:
        raise UserError(
            f"a paper config is one of {', '.join(DATASETS)} / annotation_free or zero_shot / {', '.join(TEACHERS)}, "
            f"but {name!r} came: for example voc20/annotation_free/vit_b16"
        )
    dataset, protocol, teacher = parts
    classes, crop, (free_steps, zero_shot_steps) = DATASETS[dataset]
    checkpoint, width = TEACHERS[teacher]
    fields = {
        "classes": classes,
        "student": StudentConfig(width=width, head="deeplabv2", backbone="resnet101"),
        "teacher": checkpoint,
        "teacher_fidelity": "released",
        "backbone_weights": "timm/resnet101c.gluon_in1k",
        "train_data": f"data/{dataset}/train",
        "eval_data": f"data/{dataset}/val",
        "steps": free_steps,
        "crop_size": crop,
        "batch_size": 16,
        "loss_mean": "all",
        "augmentation": AUGMENTATION,
        "evaluate_every": free_steps // 2,
        "checkpoint_every": 500,
        "log_every": 50,
    }
    if protocol == "annotation_free":
        # COCO-Stuff has a class everywhere: there is no background to keep out.
        fields["foreground"] = "none" if dataset == "cocostuff171" else "annotation"
    elif protocol == "zero_shot":
        fields |= {
            "mode": "zero-shot",
            "unseen": unseen_classes(classes),
            "steps": zero_shot_steps,
            "guided_steps": zero_shot_steps // 10,
            "self_training": True,
            "background": dataset == "voc20",
            "evaluate_every": zero_shot_steps // 10,
        }
        if dataset == "context59":
            fields |= {"learning_rate": 0.004, "weight_decay": 1e-4}
            fields["student"] = StudentConfig(width=width, head="deeplabv3plus", backbone="resnet101")
    else:
        raise UserError(f"a paper config's protocol is annotation_free or zero_shot, but {protocol!r} came: choose one")
    return DistillConfig(**fields)
