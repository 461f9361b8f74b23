"""What a MaskCLIP+ run is: one frozen config for every mode, written as JSON and read back, unknown keys refused.

Two numbers are no classes, wherever labels are: `IGNORE` (255) pixels have no loss, `UNLABELLED` (254) pixels are to be
pseudo-labelled. With `background`, class 0 is the background and the named classes are 1 … C.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from maskclip_jax.data.augment import UNLABELLED as UNLABELLED
from maskclip_jax.data.images import IGNORE as IGNORE
from maskclip_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from maskclip_jax.data.vocabulary import ClassName, as_classes, parse_classes
from maskclip_jax.data.whole_files import cut
from maskclip_jax.encoders.dense import METHODS
from maskclip_jax.errors import UserError
from maskclip_jax.students import StudentConfig
from maskclip_jax.students.model import check_ranges

MODES = ("annotation-free", "zero-shot", "supervised", "feature", "finetuned-clip")
AUGMENT_INTERPOLATIONS = ("bilinear", "opencv")
CHOICES = {
    "mode": MODES,
    "teacher_fidelity": ("clip", "released"),
    "teacher_method": tuple(METHODS),
    "teacher_activation": (None, "quick_gelu", "gelu"),
    "foreground": ("none", "annotation"),
    "loss_mean": ("labelled", "all"),
    "mapper": (None, "identity", "linear", "mlp"),
    "dtype": ("float32", "bfloat16", "float64"),
    "optimizer": ("sgd", "adamw"),
}

# What a number may be: beyond these a run fails later, or asks for more memory than there is anywhere.
RANGES = {
    "steps": (1, 10**9), "batch_size": (1, 2**16), "accumulate": (1, 2**16), "crop_size": (8, 2**14),
    "guided_steps": (0, 10**9), "evaluate_every": (1, 10**12), "checkpoint_every": (1, 10**12),
    "log_every": (1, 10**12), "keep_last": (1, 10**6), "seed": (0, 2**32 - 1), "learning_rate": (0, 1e3),
    "min_learning_rate": (0, 1e3), "backbone_rate": (0, 1e3), "power": (0, 100), "momentum": (0, 1),
    "weight_decay": (0, 100), "image_mean": (-1e3, 1e3), "image_std": (1e-6, 1e3), "dense_stride": (8, 32),
}  # fmt: skip
AUGMENT_RANGES = {
    "short_side": (1, 2**16), "long_side": (1, 2**16), "scale": (1e-3, 100), "crop_retries": (0, 10**4),
    "brightness": (0, 255), "contrast": (1e-6, 100), "saturation": (1e-6, 100), "hue": (0, 360),
}  # fmt: skip
MOST_PIXELS = 2**34  # of a micro-batch, over all devices


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How a training image is varied (mmsegmentation's pipeline for these data sets).

    Fields:
      short_side, long_side: resize to this short side first (long side at most that); None keeps the size.
      within: resize to the largest size that fits this height and width instead (Pascal Context: 520, 520).
      interpolation: of images, "bilinear" (Pillow's, antialiased) or "opencv" (not antialiased: the released code).
      scale: range of the random scale, uniform.
      flip: probability of a horizontal flip.
      category_max_ratio: a crop is drawn again while one class covers more than this of its pixels that are not 255 …
      least_classes: … or while there are fewer classes in it …
      crop_retries: … at most this often.
      count_unlabelled: unlabelled pixels (254) are one more class in this, as published; False leaves them out too.
      photometric: brightness, contrast, saturation and hue, each with probability ½.
      brightness: largest shift, in 0..255.   contrast, saturation: ranges of the factor.
      hue: largest turn, in degrees (mmsegmentation's 18 are half-degrees of OpenCV's).
    """

    short_side: int | None = None
    long_side: int | None = None
    within: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    category_max_ratio: float = 0.75
    least_classes: int = 2
    crop_retries: int = 10
    count_unlabelled: bool = True
    photometric: bool = True
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: float = 36.0

    def __post_init__(self):
        check_ranges(self, AUGMENT_RANGES, "augmentation.")
        for name in ("scale", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"augmentation.{name} is a range (low, high) above 0, but {(low, high)} came: order it")
        if self.interpolation not in AUGMENT_INTERPOLATIONS:
            raise UserError(
                f"augmentation.interpolation is one of {', '.join(AUGMENT_INTERPOLATIONS)}, but "
                f"{self.interpolation!r} came: choose one"
            )
        if self.within is not None and self.short_side is not None:
            raise UserError(
                f"augmentation sizes images by short_side or within, but both came ({self.short_side}, {self.within}): "
                "set one of them to null"
            )
        sides = (self.short_side, self.long_side, *(self.within or ()))
        if any(side is not None and side < 1 for side in sides):
            raise UserError(f"augmentation's sides are at least one pixel, but {sides} came: use positive numbers")
        if self.least_classes < 0 or self.crop_retries < 0:
            raise UserError(
                f"augmentation.least_classes and crop_retries are counts, but {self.least_classes} and "
                f"{self.crop_retries} came: use 0 or more"
            )
        if not (0 <= self.flip <= 1 and 0 < self.category_max_ratio <= 1):
            raise UserError(
                f"augmentation.flip and category_max_ratio are shares of 1, but {self.flip} and "
                f"{self.category_max_ratio} came: use numbers from 0 to 1"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A run of MaskCLIP+ (paper, section 3.3), or of what it is compared with.

    Fields:
      classes: names in label order ("sofa,couch" gives synonyms), or the name of a class set; without background.
      student: what is trained; its dtype, background, mapper and SyncBN axis are taken from here (`student_config`).
      mode: "annotation-free", "zero-shot" (seen classes keep their annotation), "supervised" (all do), "feature" (L1 to
        the teacher's features), "finetuned-clip" (paper, section 3.2: CLIP's own ResNet, trained on seen classes).
      unseen: names of the classes without annotation (zero-shot, finetuned-clip; elsewhere for scores only).
      foreground: annotation-free only: "annotation" keeps annotated background out (what the published VOC20 and
        Context59 runs saw); "none" uses no annotation at all.
      background: class 0 is the background, a learnable embedding; never a pseudo label.
      teacher, teacher_fidelity, dense_stride: arguments of `load_clip`.   templates: of `text_classifier`.
      teacher_method: how the teacher's last blocks are read (`maskclip_jax.encoders.dense.METHODS`).
      teacher_activation: of a teacher whose weights come without a config (None: QuickGELU; "gelu" for open_clip's).
      prompt_denoising, key_smoothing: thresholds of the teacher's refinement; None is off.
      conf_thresh: pseudo labels less probable than this (softmax over the candidate classes) become 255; None is off.
      labels_from: "online" (the teacher inside the step), a folder of masks made before (`run.py label`: its labels/),
        or "data": the train data's own labels are such masks (its records).
      guided_steps: length of phase 1, in optimiser steps; the paper takes a tenth of `steps`.
      self_training: after `guided_steps` the student labels for itself (phase 2); False stays in phase 1.
      train_data, eval_data: what the pipeline reads.
      steps: optimiser steps.   batch_size: images per optimiser step, over all devices of all hosts.
      accumulate: micro-batches that a device takes its share in, one after the other; gradients are summed exactly.
      crop_size: side of the training crop, in pixels.
      optimizer: "sgd" (the paper's) or "adamw".
      backbone_rate: the backbone learns at so much of the learning rate; below 1 keeps what it started from.
      learning_rate, min_learning_rate, power, momentum, weight_decay: of the optimizer, with the polynomial schedule.
      loss_mean: cross-entropy over the "labelled" pixels, or over "all", ignored ones too (the released code).
      mapper: M(t) of finetuned-clip.
      backbone_weights: ImageNet weights to start from (file, folder or hub id), or None.
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
    teacher: str = "embedded"
    teacher_fidelity: str = "clip"
    teacher_method: str = "maskclip"
    teacher_activation: str | None = None
    dense_stride: int | None = None
    templates: str | None = None
    prompt_denoising: float | None = None
    key_smoothing: float | None = None
    conf_thresh: float | None = None
    labels_from: str = "online"
    guided_steps: int = 0
    self_training: bool = False
    train_data: str = ""
    eval_data: str = ""
    steps: int = 20_000
    batch_size: int = 16
    accumulate: int = 1
    crop_size: int = 512
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    min_learning_rate: float = 1e-4
    backbone_rate: float = 1.0
    power: float = 0.9
    momentum: float = 0.9
    weight_decay: float = 5e-4
    loss_mean: str = "labelled"
    mapper: str | None = None
    backbone_weights: str | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD
    dtype: str = "float32"
    seed: int = 0
    augmentation: AugmentConfig = AugmentConfig()
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 10
    keep_last: int = 3

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                options = ", ".join(map(str, allowed))
                raise UserError(f"{name} is one of {options}, but {cut(getattr(self, name))} came: choose one of them")
        check_ranges(self, RANGES)
        if (pixels := self.batch_size * self.crop_size**2 // self.accumulate) > MOST_PIXELS:
            raise UserError(
                f"a micro-batch has at most {MOST_PIXELS:,} pixels, but batch_size {self.batch_size} and crop_size "
                f"{self.crop_size} make {pixels:,}: lower one, or raise accumulate"
            )
        for name in ("prompt_denoising", "key_smoothing", "conf_thresh"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} is a probability above 0 and up to 1, but {value} came: null turns it off")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise UserError(
                f"the learning rate falls to min_learning_rate, but {self.learning_rate} -> {self.min_learning_rate} "
                "came: make the minimum the smaller one"
            )
        if self.self_training and not 0 <= self.guided_steps <= self.steps:
            raise UserError(f"guided_steps is within 0..{self.steps} (steps), but {self.guided_steps} came")
        self._check_classes()
        self._check_student()

    def _check_classes(self):
        if self.num_classes > UNLABELLED:
            raise UserError(f"labels are classes below {UNLABELLED}, but there are {self.num_classes}: use fewer")
        unknown = sorted(set(self.unseen) - {str(name) for name in self.class_names})
        if unknown or len(set(self.unseen)) != len(self.unseen):
            raise UserError(
                f"unseen names classes, each once, but {cut(unknown or list(self.unseen))} came: correct them"
            )
        splits = self.mode in ("zero-shot", "finetuned-clip")
        if splits and not 0 < len(self.unseen) < len(self.class_names):
            raise UserError(f"{self.mode} needs some unseen classes, not none or all: name them in unseen")
        for name in ("labels_from", "backbone_weights"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise UserError(f"{name} has a name or a path, but nothing came: name one ('.' is the working folder)")
        if self.labels_from == "data" and (self.mode != "annotation-free" or self.foreground != "none"):
            raise UserError(
                "labels_from='data' takes pseudo labels from where annotation is, so there is none: "
                "set mode='annotation-free' and foreground='none', or give a folder of masks"
            )
        if self.background and self.mode in ("annotation-free", "feature") and self.foreground == "none":
            raise UserError(
                f"no teacher knows the background, so {self.mode} needs its annotation: "
                "set foreground='annotation', or background=False"
            )

    def _check_student(self):
        if (self.mapper is not None) != (self.mode == "finetuned-clip"):
            raise UserError(
                f"mapper is for finetuned-clip, which needs one, but {self.mode} came with {self.mapper}: correct it"
            )
        if self.mode == "finetuned-clip" and self.student.stem != "clip":
            raise UserError("finetuned-clip starts from CLIP's ResNet: set student.stem to 'clip'")
        if self.student.classifier == "learned" and self.mode != "supervised":
            raise UserError(f"mode {self.mode} classifies by text embeddings: set student.classifier to 'text'")
        if self.student.classifier == "learned" and self.student.num_classes != self.num_classes:
            raise UserError(
                f"student.num_classes must be that of the labels, {self.num_classes}, not {self.student.num_classes}"
            )

    @property
    def class_names(self) -> tuple[ClassName, ...]:
        """The named classes in label order, without background."""
        return parse_classes(self.classes) if isinstance(self.classes, str) else as_classes(self.classes)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What each label value is called, the background first where there is one."""
        return ("background",) * self.background + tuple(str(name) for name in self.class_names)

    @property
    def num_classes(self) -> int:
        """Label values: the named classes and the background."""
        return len(self.class_names) + self.background

    @property
    def unseen_labels(self) -> tuple[int, ...]:
        """Label values of the unseen classes, ascending."""
        return tuple(i for i, name in enumerate(self.label_names) if name in self.unseen)

    @property
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
        """`student` with what this config says about it: what to give to `create_student` for training."""
        learned = self.student.classifier == "learned"
        return dataclasses.replace(
            self.student,
            dtype=self.dtype,
            bn_axis_name="batch",
            background=self.background and not learned,
            mapper="identity" if self.mapper is None else self.mapper,
        )

    def per_device(self, devices: int) -> int:
        """Images of an optimiser step on each of `devices` (all hosts'). Raises UserError where they do not divide."""
        parts = devices * self.accumulate
        if self.batch_size % parts:
            lower = self.batch_size // parts * parts
            fits = f"{lower} or {lower + parts}" if lower else f"{parts}"
            kind = f"{devices} devices" + (f" × {self.accumulate} micro-batches" if self.accumulate > 1 else "")
            raise UserError(f"batch size {self.batch_size} must be divisible by the {kind}: use {fits}")
        return self.batch_size // devices

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts: what JSON holds."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DistillConfig:
        """The inverse of `to_dict`. Raises UserError for unknown keys, missing ones and values of a wrong type."""
        return _read(cls, values, "config")


def _read(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is a set of keys, but {cut(values)} came")
    hints = typing.get_type_hints(cls)
    if cls is StudentConfig:
        typed = {k: _value(hints[k], v, f"{where}.{k}") if k in hints else v for k, v in values.items()}
        return StudentConfig.from_dict(typed)
    if unknown := sorted(set(values) - set(hints)):
        raise UserError(f"{where} has unknown keys {cut(unknown)}: known are {sorted(hints)}")
    fields = dataclasses.fields(cls)
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    if needed:
        raise UserError(f"{where} lacks {', '.join(needed)}: add it")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value`, as it comes from JSON or the command line, as the type that the field has."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _read(hint, value, where)
    arms = typing.get_args(hint) if typing.get_origin(hint) is not tuple else ()
    for arm in arms or (hint,):
        items = typing.get_args(arm)
        if typing.get_origin(arm) is tuple and isinstance(value, list | tuple):
            kinds = [items[0]] * len(value) if items[-1] is Ellipsis else items
            if len(kinds) == len(value):
                return tuple(_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
        elif arm is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif isinstance(arm, type) and isinstance(value, arm) and (arm is bool or not isinstance(value, bool)):
            return value
    wanted = getattr(hint, "__name__", str(hint)) if not arms else str(hint)
    raise UserError(f"{where} is {wanted}, but {cut(value)} came: correct it")
