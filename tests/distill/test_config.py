"""The config refuses what contradicts itself, reads back what it wrote, and settles what the student is."""

import dataclasses
import json

import jax
import pytest
from tiny_distill import CLASSES, STUDENT, config_of

from maskclip_jax.data.augment import AugmentConfig
from maskclip_jax.distill.config import DistillConfig, TeacherConfig
from maskclip_jax.errors import UserError
from maskclip_jax.students import StudentConfig, create_student

NACLIP = TeacherConfig(model="a/b", fidelity="released", dense_stride=16, method="naclip", prompt_denoising=0.5)


def test_json_round_trip():
    config = config_of(mode="zero-shot", unseen=("cat",), augmentation=AugmentConfig(scale=(0.7, 1.3)), teacher=NACLIP)
    assert DistillConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len({config, DistillConfig.from_dict(config.to_dict())}) == 1  # hashable: a program belongs to it


def test_configs_of_before_the_teacher_had_its_own():
    """config.json of older runs: flat keys, each of which is one of the teacher's now."""
    new = config_of(teacher=dataclasses.replace(NACLIP, activation="gelu", templates="single", key_smoothing=1.0))
    older = new.to_dict() | {"teacher": "a/b", "teacher_fidelity": "released", "teacher_activation": "gelu"}
    older |= {"teacher_method": "naclip", "dense_stride": 16, "templates": "single"}
    older |= {"prompt_denoising": 0.5, "key_smoothing": 1.0}
    assert DistillConfig.from_dict(json.loads(json.dumps(older))) == new
    some = {name: value for name, value in config_of().to_dict().items() if name != "teacher"}
    assert DistillConfig.from_dict(some | {"key_smoothing": 1.0}).teacher == TeacherConfig(key_smoothing=1.0)


def test_numbers_as_a_person_writes_them():
    values = config_of().to_dict() | {"learning_rate": 1, "conf_thresh": 1, "classes": "voc20"}
    config = DistillConfig.from_dict(values)
    assert (config.learning_rate, config.conf_thresh, config.num_classes) == (1.0, 1.0, 20)
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stepz": 1}, ["unknown", "stepz", "steps"]),
        ({"augmentation": {"zoom": 2}}, ["config.augmentation", "zoom"]),
        ({"student": {"width": 8, "depth": 3}}, ["student", "depth"]),
        ({"steps": "many"}, ["config.steps", "int", "many"]),
        ({"steps": 1.5}, ["config.steps", "1.5"]),
        ({"self_training": 1}, ["config.self_training", "bool"]),
        ({"seed": True}, ["config.seed", "True"]),
        ({"image_mean": [0.5, 0.5]}, ["config.image_mean"]),
        ({"unseen": "cat"}, ["config.unseen", "cat"]),
        ({"teacher": {"short_side": 64}}, ["config.teacher", "short_side", "method, templates"]),
        ({"teacher": {"method": 3}}, ["config.teacher.method", "3"]),
        ({"teacher": ["embedded"]}, ["config.teacher.model", "embedded"]),
        ({"key_smoothing": "much"}, ["config.teacher.key_smoothing", "much"]),
    ],
)
def test_unreadable_values(change, words):
    with pytest.raises(UserError) as error:
        DistillConfig.from_dict(config_of().to_dict() | change)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_missing_keys():
    with pytest.raises(UserError, match="lacks classes, student"):
        DistillConfig.from_dict({})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "magic"}, "annotation-free, zero-shot"),
        ({"steps": 0}, "steps is within 1.."),
        ({"conf_thresh": 1.5}, "conf_thresh"),
        ({"min_learning_rate": 0.5}, "min_learning_rate"),
        ({"self_training": True, "guided_steps": 11}, "guided_steps"),
        ({"mode": "zero-shot"}, "unseen"),
        ({"mode": "zero-shot", "unseen": CLASSES}, "unseen"),
        ({"unseen": ("wolf",)}, "wolf"),
        ({"unseen": ("cat", "cat")}, "each once"),
        ({"background": True}, "foreground='annotation'"),
        ({"mapper": "mlp"}, "finetuned-clip"),
        ({"mode": "finetuned-clip", "unseen": ("cat",)}, "mapper"),
        ({"mode": "finetuned-clip", "unseen": ("cat",), "mapper": "mlp"}, "stem"),
        ({"student": StudentConfig(12, classifier="learned", num_classes=5)}, "text"),
        ({"mode": "supervised", "student": StudentConfig(12, classifier="learned", num_classes=4)}, "5, not 4"),
        ({"classes": tuple(map(str, range(255)))}, "255"),
        ({"augmentation": {"scale": (2.0, 0.5)}}, "scale"),
        ({"augmentation": {"within": (520, 520), "short_side": 512}}, "short_side or within a frame"),
        ({"augmentation": {"within": (520, 0)}}, "within is within 1.."),
        ({"augmentation": {"short_side": 0}}, "short_side is within 1.."),
        ({"augmentation": {"interpolation": "lanczos"}}, "bilinear, opencv"),
        ({"augmentation": {"crop_retries": -1}}, "crop_retries is within 0.."),
        ({"dtype": "float16"}, "float64"),
    ],
)
def test_contradictions(change, words):
    if isinstance(change.get("augmentation"), dict):
        with pytest.raises(UserError, match=words):
            AugmentConfig(**change["augmentation"])
        return
    with pytest.raises(UserError) as error:
        config_of(**change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_sixty_four_bits_are_asked_for_by_name():
    """Without them JAX would compute in 32 and say little about it."""
    config = config_of(dtype="float64")
    assert DistillConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="set JAX_ENABLE_X64=1"):
        create_student(config.student_config)
    with jax.enable_x64(True):
        assert create_student(config.student_config).config.dtype == "float64"


def test_label_values_with_background():
    """VOC 21: the background is 0, so every named class moves up by one."""
    config = config_of(mode="zero-shot", unseen=("sky", "cat"), background=True)
    assert config.num_classes == 6
    assert config.label_names == ("background", *CLASSES)
    assert config.unseen_labels == config.candidates == (2, 4)
    assert config_of(background=True, foreground="annotation").candidates == (1, 2, 3, 4, 5)


def test_names_are_read_once(monkeypatch):
    """Every training example asks for the label values: reading 66 names each time took half of an example's time."""
    config = DistillConfig(classes="scenes66", student=STUDENT)
    first = (config.class_names, config.label_names, config.unseen_labels, config.candidates)
    for name in ("as_classes", "parse_classes"):
        monkeypatch.setattr(f"maskclip_jax.distill.config.{name}", None)
    assert (config.class_names, config.label_names, config.unseen_labels, config.candidates) == first


def test_the_student_follows_the_run():
    config = config_of(mode="supervised", background=True, dtype="bfloat16")
    student = config.student_config
    assert (student.dtype, student.background, student.bn_axis_name) == ("bfloat16", True, "batch")
    assert (student.width, student.rates) == (STUDENT.width, STUDENT.rates)


def test_images_per_device():
    assert config_of(batch_size=16).per_device(4) == 4
    assert config_of(batch_size=16, accumulate=4).per_device(4) == 4
    with pytest.raises(UserError, match="batch size 6 must be divisible by the 4 devices: use 4 or 8"):
        config_of(batch_size=6).per_device(4)
    with pytest.raises(UserError, match="batch size 2 must be divisible by the 4 devices: use 4"):
        config_of(batch_size=2).per_device(4)
    with pytest.raises(UserError, match="4 devices × 2 micro-batches: use 8 or 16"):
        config_of(batch_size=12, accumulate=2).per_device(4)


def test_groups_of_devices_divide_them():
    config = config_of(batch_size=12, bn_group_size=2)
    assert config.student_config.bn_group_size == 2
    assert config.per_device(4) == 3
    with pytest.raises(UserError, match="bn_group_size divides the number of devices, 3, got 2: use 1 or 3, or null"):
        config.per_device(3)
    with pytest.raises(UserError, match="devices, 1, got 2: use 1, or null"):
        config.per_device(1)
    with pytest.raises(UserError, match="bn_group_size"):
        config_of(bn_group_size=0)


def test_which_modes_ask_the_teacher():
    asks = {mode: config_of(mode=mode, unseen=("cat",)).uses_teacher for mode in ("annotation-free", "zero-shot")}
    asks |= {mode: config_of(mode=mode).uses_teacher for mode in ("feature", "supervised")}
    assert asks == {"annotation-free": True, "zero-shot": True, "feature": True, "supervised": False}
    assert not config_of(labels_from="masks/").uses_teacher


def test_a_student_starts_from_one_place():
    assert DistillConfig.from_dict(config_of(init_from="runs/a").to_dict()).init_from == "runs/a"
    with pytest.raises(UserError, match="got init_from and backbone_weights: leave one of them out"):
        config_of(init_from="runs/a", backbone_weights="resnet50c")
    student = dataclasses.replace(STUDENT, stem="clip", expansion=4)
    with pytest.raises(UserError, match="got init_from and finetuned-clip"):
        config_of(init_from="runs/a", mode="finetuned-clip", mapper="identity", unseen=("cat",), student=student)
