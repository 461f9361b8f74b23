"""What a MaskCLIP+ run is: one frozen config for every mode, written as JSON and read back, unknown keys refused.

Its parts, `student`, `teacher` and `augmentation`, are configs too: `--set` and messages name their keys with a dot.

Two numbers are no classes, wherever labels are: `IGNORE` (255) pixels have no loss, `UNLABELLED` (254) pixels are to be
pseudo-labelled. With `background`, class 0 is the background and the named classes are 1 … C.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from maskclip_jax.data.augment import UNLABELLED, AugmentConfig
from maskclip_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from maskclip_jax.data.schema import check_choices, check_ranges, read_config
from maskclip_jax.data.vocabulary import ClassName, as_classes, parse_classes
from maskclip_jax.data.whole_files import cut
from maskclip_jax.errors import UserError
from maskclip_jax.segment.options import Options
from maskclip_jax.students import StudentConfig

MODES = ("annotation-free", "zero-shot", "supervised", "feature", "finetuned-clip")
CHOICES = {
    "mode": MODES,
    "foreground": ("none", "annotation"),
    "loss_mean": ("labelled", "all"),
    "mapper": (None, "identity", "linear", "mlp"),
    "dtype": ("float32", "bfloat16", "float64"),
    "optimizer": ("sgd", "adamw"),
}

# What a number may be: beyond these a run fails later, or needs more memory than any machine has.
RANGES = {
    "steps": (1, 10**9), "batch_size": (1, 2**16), "accumulate": (1, 2**16), "crop_size": (8, 2**14),
    "bn_group_size": (1, 2**16), "guided_steps": (0, 10**9), "evaluate_every": (1, 10**12),
    "checkpoint_every": (1, 10**12), "log_every": (1, 10**12), "keep_last": (1, 10**6), "seed": (0, 2**32 - 1),
    "learning_rate": (0, 1e3),
    "min_learning_rate": (0, 1e3), "backbone_rate": (0, 1e3), "power": (0, 100), "momentum": (0, 1),
    "weight_decay": (0, 100), "image_mean": (-1e3, 1e3), "image_std": (1e-6, 1e3),
}  # fmt: skip
MOST_PIXELS = 2**34  # of a micro-batch, over all devices


# Keys of configs that were written before the teacher had a config of its own, and where their values are now.
_TEACHER_KEYS = {"teacher": "model", "teacher_fidelity": "fidelity", "teacher_activation": "activation"}
_TEACHER_KEYS |= {"teacher_method": "method", "dense_stride": "dense_stride", "templates": "templates"}
_TEACHER_KEYS |= {"prompt_denoising": "prompt_denoising", "key_smoothing": "key_smoothing"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Options):
    """The teacher: which CLIP, and those `Options` that apply to training crops (`OPTIONS`).

    Fields:
      model, fidelity, dense_stride: arguments of `load_clip`.
      activation: of weights that come without a config (None: QuickGELU; "gelu" for open_clip's).

    Raises:
      UserError: as `Options` does, and for an option that says how an image is resized, cut or shown.
    """

    OPTIONS: ClassVar = ("method", "templates", "prompt_denoising", "key_smoothing", "probability", "affinity")
    JSON_FIELDS: ClassVar = ("model", "fidelity", "dense_stride", "activation", *OPTIONS)

    model: str = "embedded"
    fidelity: str = "clip"
    dense_stride: int | None = None
    activation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, {"fidelity": ("clip", "released"), "activation": (None, "quick_gelu", "gelu")}, "teacher.")
        check_ranges(self, {"dense_stride": (8, 32)}, "teacher.")
        if unfit := [name for name in self.changed() if name not in self.OPTIONS]:
            raise UserError(f"a teacher takes the options {', '.join(self.OPTIONS)}, got {unfit[0]}: leave it out")


def current_key(key: str) -> str:
    """The key that a config has today for one of an older version's: "teacher_method" is "teacher.method"."""
    return f"teacher.{_TEACHER_KEYS[key]}" if key in _TEACHER_KEYS else key


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A run of MaskCLIP+ (paper, section 3.3), or of what it is compared with.

    Fields:
      classes: names in label order ("sofa,couch" gives synonyms), or the name of a class set; without background.
      student: what is trained; its dtype, background, mapper and SyncBN are taken from here (`student_config`).
      mode: "annotation-free", "zero-shot" (seen classes keep their annotation), "supervised" (all do), "feature" (L1 to
        the teacher's features), "finetuned-clip" (paper, section 3.2: CLIP's own ResNet, trained on seen classes).
      unseen: names of the classes without annotation (zero-shot, finetuned-clip; elsewhere for scores only).
      foreground: annotation-free only: "annotation" keeps annotated background out (what the published VOC20 and
        Context59 runs saw); "none" uses no annotation at all.
      background: class 0 is the background, a learnable embedding; never a pseudo label.
      teacher: the CLIP that labels, and how it is read.
      conf_thresh: pseudo labels less probable than this (softmax over the candidate classes) become 255; None is off.
      labels_from: "online" (the teacher inside the step), a folder of masks made before (`run.py label`: its labels/),
        or "data": the train data's own labels are such masks (its records).
      guided_steps: length of phase 1, in optimiser steps; the paper takes a tenth of `steps`.
      self_training: after `guided_steps` the student labels for itself (phase 2); False stays in phase 1.
      train_data, eval_data: what the pipeline reads.
      steps: optimiser steps.   batch_size: images per optimiser step, over all devices of all hosts.
      accumulate: micro-batches that a device takes its share in, one after the other; gradients are summed exactly.
      bn_group_size: devices that share batch statistics in training (SyncBN), which divide their number; None is all.
      crop_size: side of the training crop, in pixels.
      optimizer: "sgd" (the paper's) or "adamw".
      backbone_rate: the backbone learns at so much of the learning rate; below 1 keeps what it started from.
      learning_rate, min_learning_rate, power, momentum, weight_decay: of the optimizer, with the polynomial schedule.
      scale_learning_rate: both learning rates are those of a batch of 16 (the paper's), and are multiplied by
        batch_size / 16.
      loss_mean: cross-entropy over the "labelled" pixels, or over "all", ignored ones too (the released code).
      mapper: M(t) of finetuned-clip.
      backbone_weights: ImageNet weights to start from (file, folder or hub id), or None.
      init_from: a student to start from, all of whose weights this one has too: what `load_student` reads; or None.
      image_mean, image_std: the student's, per RGB channel in units of 0..1 (ImageNet's; finetuned-clip uses CLIP's).
      dtype: what student and teacher compute in; parameters are float32, or float64 where that is it (for comparisons:
        it needs JAX_ENABLE_X64).
      evaluate_every, checkpoint_every, log_every: in optimiser steps.   keep_last: checkpoints.

    Raises:
      UserError: for values that contradict each other.
    """

    classes: tuple[str, ...] | str
    student: StudentConfig
    mode: str = "annotation-free"
    unseen: tuple[str, ...] = ()
    foreground: str = "none"
    background: bool = False
    teacher: TeacherConfig = TeacherConfig()
    conf_thresh: float | None = None
    labels_from: str = "online"
    guided_steps: int = 0
    self_training: bool = False
    train_data: str = ""
    eval_data: str = ""
    steps: int = 20_000
    batch_size: int = 16
    accumulate: int = 1
    bn_group_size: int | None = None
    crop_size: int = 512
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    min_learning_rate: float = 1e-4
    scale_learning_rate: bool = False
    backbone_rate: float = 1.0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    loss_mean: str = "labelled"
    mapper: str | None = None
    backbone_weights: str | None = None
    init_from: str | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    dtype: str = "float32"
    seed: int = 0
    augmentation: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 10
    keep_last: int = 3

    def __post_init__(self):
        check_choices(self, CHOICES)
        check_ranges(self, RANGES)
        if (pixels := self.batch_size * self.crop_size**2 // self.accumulate) > MOST_PIXELS:
            raise UserError(
                f"a micro-batch has at most {MOST_PIXELS:,} pixels, but batch_size {self.batch_size} and crop_size "
                f"{self.crop_size} make {pixels:,}: lower one, or raise accumulate"
            )
        if self.conf_thresh is not None and not 0 < self.conf_thresh <= 1:
            raise UserError(
                f"conf_thresh is a probability above 0 and up to 1, got {self.conf_thresh}: null turns it off"
            )
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise UserError(
                f"the learning rate falls to min_learning_rate, got {self.learning_rate} -> {self.min_learning_rate}: "
                "make the minimum the smaller one"
            )
        if self.self_training and not 0 <= self.guided_steps <= self.steps:
            raise UserError(f"guided_steps is within 0..{self.steps} (steps), got {self.guided_steps}")
        self._check_classes()
        self._check_student()

    def _check_classes(self):
        if self.num_classes > UNLABELLED:
            raise UserError(f"labels are classes below {UNLABELLED}, but there are {self.num_classes}: use fewer")
        unknown = sorted(set(self.unseen) - {str(name) for name in self.class_names})
        if unknown or len(set(self.unseen)) != len(self.unseen):
            raise UserError(f"unseen names classes, each once, got {cut(unknown or list(self.unseen))}: correct them")
        splits = self.mode in ("zero-shot", "finetuned-clip")
        if splits and not 0 < len(self.unseen) < len(self.class_names):
            raise UserError(f"{self.mode} needs some unseen classes, not none or all: name them in unseen")
        for name in ("labels_from", "backbone_weights", "init_from"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"{name} has a name or a path, got nothing: name one ('.' is the working folder)")
        if self.labels_from == "data" and (self.mode != "annotation-free" or self.foreground != "none"):
            raise UserError(
                "labels_from='data' takes pseudo labels from where annotation is, so there is none: "
                "set mode='annotation-free' and foreground='none', or give a folder of masks"
            )
        if self.background and self.mode in ("annotation-free", "feature") and self.foreground == "none":
            raise UserError(
                f"a teacher has no background class, so {self.mode} needs its annotation: "
                "set foreground='annotation', or background=False"
            )

    def _check_student(self):
        if (self.mapper is not None) != (self.mode == "finetuned-clip"):
            raise UserError(
                f"mapper is for finetuned-clip, which needs one, got {self.mode} with {self.mapper}: correct it"
            )
        if self.init_from is not None and (self.backbone_weights is not None or self.mode == "finetuned-clip"):
            other = "backbone_weights" if self.backbone_weights is not None else "finetuned-clip"
            raise UserError(f"a student starts from one place, got init_from and {other}: leave one of them out")
        if self.mode == "finetuned-clip" and self.student.stem != "clip":
            raise UserError("finetuned-clip starts from CLIP's ResNet: set student.stem to 'clip'")
        if self.student.classifier == "learned" and self.mode != "supervised":
            raise UserError(f"mode {self.mode} classifies by text embeddings: set student.classifier to 'text'")
        if self.student.classifier == "learned" and self.student.num_classes != self.num_classes:
            raise UserError(
                f"student.num_classes must be that of the labels, {self.num_classes}, not {self.student.num_classes}"
            )

    @functools.cached_property
    def class_names(self) -> tuple[ClassName, ...]:
        """The named classes in label order, without background."""
        return parse_classes(self.classes) if isinstance(self.classes, str) else as_classes(self.classes)

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        """What each label value is called, the background first where there is one."""
        return ("background",) * self.background + tuple(str(name) for name in self.class_names)

    @property
    def num_classes(self) -> int:
        """Label values: the named classes and the background."""
        return len(self.class_names) + self.background

    @functools.cached_property
    def unseen_labels(self) -> tuple[int, ...]:
        """Label values of the unseen classes, ascending."""
        return tuple(i for i, name in enumerate(self.label_names) if name in self.unseen)

    @functools.cached_property
    def candidates(self) -> tuple[int, ...]:
        """Label values that a pseudo label can be: the unseen classes, or without annotation all but the background."""
        if self.mode == "zero-shot":
            return self.unseen_labels
        return tuple(range(int(self.background), self.num_classes))

    @property
    def uses_pseudo_labels(self) -> bool:
        """Whether unlabelled pixels get labels in the step."""
        return self.mode in ("annotation-free", "zero-shot")

    @property
    def uses_teacher(self) -> bool:
        """Whether the step runs the teacher's image tower."""
        return self.mode == "feature" or (self.uses_pseudo_labels and self.labels_from == "online")

    @property
    def student_config(self) -> StudentConfig:
        """`student` with the fields that this config sets: the argument of `create_student` for training."""
        learned = self.student.classifier == "learned"
        return dataclasses.replace(
            self.student,
            dtype=self.dtype,
            bn_axis_name="batch",
            bn_group_size=self.bn_group_size,
            background=self.background and not learned,
            mapper="identity" if self.mapper is None else self.mapper,
        )

    def per_device(self, devices: int) -> int:
        """Images of an optimiser step on each of `devices` (all hosts'). Raises UserError where they do not divide."""
        if devices % (self.bn_group_size or 1):
            fits = [str(size) for size in range(1, devices + 1) if devices % size == 0]
            raise UserError(
                f"bn_group_size divides the number of devices, {devices}, got {self.bn_group_size}: "
                f"use {', '.join(fits[:-1])}{' or ' * (len(fits) > 1)}{fits[-1]}, or null for all"
            )
        parts = devices * self.accumulate
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            fits = f"{lower} or {lower + parts}" if lower else f"{parts}"
            kind = f"{devices} devices" + (f" × {self.accumulate} micro-batches" if self.accumulate > 1 else "")
            raise UserError(f"batch size {self.batch_size} must be divisible by the {kind}: use {fits}")
        return self.batch_size // devices

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts: what JSON holds."""
        values = dataclasses.asdict(self)
        values["teacher"] = {name: values["teacher"][name] for name in TeacherConfig.JSON_FIELDS}
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """The inverse of `to_dict`, also of an older version's. Raises UserError as `data.schema.read_config` does."""
        older = {k: v for k, v in values.items() if k in _TEACHER_KEYS and not isinstance(v, Mapping | TeacherConfig)}
        if older:
            teacher = {_TEACHER_KEYS[key]: value for key, value in older.items()}
            values = {key: value for key, value in values.items() if key not in older}
            values["teacher"] = {**values.get("teacher", {}), **teacher}
        return read_config(cls, values, "config")
